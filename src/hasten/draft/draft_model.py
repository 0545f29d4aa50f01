"""Draft model: a smaller model of the same vocabulary writes a chain ahead, and the target checks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hasten.draft._assistant import open_assistant
from hasten.engine.contracts import EMPTY_DRAFT, NO_NEEDS, Draft, Draws, Feedback, MethodContext, Needs, RowView
from hasten.engine.sampling import choice_seed, draw, uniform
from hasten.errors import out_of_range
from hasten.models.assistant import Assistant
from hasten.types import MethodCard

card = MethodCard(
    slug="draft-model",
    title="Fast Inference from Transformers via Speculative Decoding",
    paper="2211.17192",
    date="2022-11",
    plugs_into="draft",
    exactness="exact",
    claim="2x to 3x with T5-XXL and a draft model 1/100 of its size.",
    no_help="Targets for which no much smaller model of the same vocabulary exists.",
    knobs={
        "model": "the draft model: catalog name, directory, hub id or file",
        "nodes": "tokens drafted ahead (1..32)",
        "sample": "draw drafts at the request's temperature, judged by rejection (true), or draft the best token",
        "temperature": "the draft's temperature (0 up to 2; -1: that of the request)",
        "cache_mb": "memory of the draft model's keys and values, in megabytes",
    },
    needs=("causal",),
)

_STREAM = 1 << 31  # seeds of the draft's draws, apart from those of acceptance and of plain sampling


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the draft model."""

    model: str = ""
    nodes: int = 4
    sample: bool = True
    temperature: float = -1.0
    cache_mb: int = 256

    def __post_init__(self) -> None:
        for name, top in (("nodes", 32), ("cache_mb", 1 << 20)):
            if not 1 <= getattr(self, name) <= top:
                raise out_of_range(f"draft-model.{name}", getattr(self, name), f"an integer in [1, {top}]")
        if self.temperature != -1.0 and not 0.0 <= self.temperature <= 2.0:
            raise out_of_range("draft-model.temperature", self.temperature, "in [0, 2], or -1")


class DraftModel:
    """Chains from a draft model; with `sample` they carry the distributions they were drawn from."""

    name = "draft-model"
    needs: Needs = NO_NEEDS
    scope: Literal["row", "shared"] = "row"

    def __init__(self, config: Config, context: MethodContext, assistant: Assistant | None = None) -> None:
        self.config = config
        self.draws: Draws = "swor" if config.sample else "point"
        self.assistant = assistant or open_assistant("draft-model", config.model, config.cache_mb, context)

    def max_nodes(self, budget: int) -> int:
        """The configured length, or the budget if that is less."""
        return min(self.config.nodes, budget)

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """The draft model follows the row."""
        self.assistant.open(row)

    def close(self, row: int) -> None:
        """The draft model forgets the row."""
        self.assistant.close(row)

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Nothing to learn: the draft model reads the committed text before the next draft."""

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One chain per row; all rows advance together, one pass of the draft model per token."""
        lengths = [self.max_nodes(budget) for budget in budgets]
        asked = [i for i, length in enumerate(lengths) if length]
        chains: dict[int, tuple[list[int], list[float], dict[int, Tensor]]] = {}
        if asked:
            most = max(lengths)
            for i, logits in zip(asked, self.assistant.begin([rows[i] for i in asked], most, most), strict=True):
                if logits is not None:
                    chains[i] = ([], [], {})
                    self._next(chains[i], logits, rows[i])
            for step in range(1, most if chains else 0):
                growing = [i for i in chains if step < lengths[i]]
                if not growing:
                    break
                asks = [(rows[i].id, [chains[i][0][-1]], [step - 2]) for i in growing]
                for i, logits in zip(growing, self.assistant.grow(asks), strict=True):
                    self._next(chains[i], logits[0], rows[i])
        drafts = []
        for i in range(len(rows)):
            tokens, scores, q = chains.get(i, ([], [], {}))
            parents = tuple(range(-1, len(tokens) - 1))
            # scores would let the engine cut a chain by its own tokens, which biases rejection sampling
            known = tuple(scores) if self.draws == "point" else None
            drafts.append(Draft(tuple(tokens), parents, q or None, scores=known) if tokens else EMPTY_DRAFT)
        return drafts

    def _next(self, chain: tuple[list[int], list[float], dict[int, Tensor]], logits: Tensor, row: RowView) -> None:
        """One more token of a chain, from logits [vocab]."""
        tokens, scores, q = chain
        temperature = row.temperature if self.config.temperature < 0 else self.config.temperature
        if self.config.sample and row.temperature > 0 and temperature > 0:
            share = (logits.float() / temperature).softmax(-1)
            token = draw(share, uniform(choice_seed(row.seed, _STREAM), len(row.tokens) + len(tokens)))
            q[len(tokens) - 1] = share
        else:
            share = logits.float().softmax(-1)
            token = int(share.argmax())
        tokens.append(token)
        scores.append(min(1.0, float(share[token])))

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is learnt."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


method = DraftModel
