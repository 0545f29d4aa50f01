"""Lexical unit decoding: the model guesses a span of tokens from placeholders, and keeps it as far as it is confident."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.engine.contracts import EMPTY_DRAFT, Draft, Draws, Feedback, Law, MethodContext, Needs, RowView
from hasten.engine.sampling import draw, uniform
from hasten.errors import IncompatibleError, out_of_range
from hasten.models.feature import weights_path
from hasten.models.native import as_transformer
from hasten.models.pseudo import load_inputs
from hasten.models.stack import DecoderStack
from hasten.types import MethodCard

card = MethodCard(
    slug="lud",
    title="Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs",
    paper="2405.15208",
    date="2024-05",
    plugs_into="draft",
    exactness="exact",
    claim="33 % less time for text without loss, 30 % for code at 3 % lower quality (LLaMA-13B, fine-tuned, unverified).",
    no_help="Models for which nothing was trained; mode=trust is lossy: it commits what nobody has verified.",
    knobs={
        "weights": "file of the trained inputs and adapter (empty: trained here, or shipped with hasten)",
        "mode": "lossless: spans are verified, the text is plain decoding's; trust: they are committed as they are (lossy)",
        "k": "tokens guessed ahead (0..as many as were trained; 0 is plain decoding)",
        "beta": "a span goes on while the best token is at least so likely (0 or more; above 1: no spans); trust wants 0.9",
        "places": "placeholders behind the root and the last drafted token (ends), or behind all of them (all)",
        "sampled": "accept that trust changes the distribution when temperature is above 0 (true or false)",
    },
    needs=("causal", "hooks"),
    conflicts=("hidden-transfer",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of LUD. The paper commits unverified; it tells neither k nor the threshold of the published models."""

    weights: str = ""
    mode: str = "lossless"
    k: int = 3
    beta: float = 0.3
    places: str = "ends"
    sampled: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("lossless", "trust"):
            raise out_of_range("lud.mode", self.mode, "lossless or trust")
        if self.places not in ("ends", "all"):
            raise out_of_range("lud.places", self.places, "ends or all")
        if not 0 <= self.k <= 16:
            raise out_of_range("lud.k", self.k, "an integer in [0, 16]")
        if not (0.0 <= self.beta < math.inf):
            raise out_of_range("lud.beta", self.beta, "a finite number, 0 or more")


class Lud:
    """Drafts the span that the placeholders behind the last accepted token are confident of; keeps their states per row."""

    name = "lud"
    scope: Literal["row", "shared"] = "row"
    draws: Draws = "point"

    def __init__(self, config: Config, context: MethodContext) -> None:
        target = context.backbone
        if not isinstance(target, DecoderStack):
            raise IncompatibleError(
                f"method 'lud' needs a model of hasten's own decoder stack; {context.model!r} runs on {target.name!r}",
                hint="choose another method (`hasten methods`)",
                field="method",
            )
        self.config = config
        self.inputs = load_inputs(weights_path("lud", target, context.model, config.weights), target)
        if config.k > self.inputs.count:
            raise out_of_range("lud.k", config.k, f"at most the {self.inputs.count} inputs that were trained")
        trust = config.mode == "trust"
        self.law: Law | None = "trust" if trust else None
        self.sampled = config.sampled
        self.needs = Needs()
        if config.k and config.beta <= 1.0:  # above 1 no span could ever start
            as_transformer(target)  # loads the stack that runs placeholders, whose seconds are not the first pass's
            ends: Literal["ends", "all"] = "all" if config.places == "all" else "ends"
            self.needs = Needs(pseudo=self.inputs.pseudo(config.k, "last" if trust else ends))
        self._ahead: dict[int, Tensor] = {}

    def max_nodes(self, budget: int) -> int:
        """The length of a span, or the budget if that is less."""
        return min(self.config.k if self.needs.pseudo else 0, budget)

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """Nothing is drafted before the first pass with placeholders."""

    def close(self, row: int) -> None:
        """Forget the row's states."""
        self._ahead.pop(row, None)

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Keep the placeholders behind the last accepted token; where it had none, the next draft is empty."""
        for report in feedback:
            self._ahead.pop(report.row, None)
            if report.pseudo is not None:
                self._ahead[report.row] = report.pseudo.clone()

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """A chain per row: the leading guesses whose confidence reaches beta and that repeat nothing."""
        drafts: list[Draft] = [EMPTY_DRAFT] * len(rows)
        asked = [i for i, row in enumerate(rows) if budgets[i] > 0 and row.id in self._ahead]
        if not asked:
            return drafts
        with torch.inference_mode():
            logits = self.inputs.logits(torch.stack([self._ahead[rows[i].id] for i in asked]))
            for i, own in zip(asked, logits, strict=True):
                drafts[i] = self._span(rows[i], own[: self.max_nodes(budgets[i])])
        return drafts

    def _span(self, row: RowView, logits: Tensor) -> Draft:
        """The span that `logits` [guesses, draft vocabulary] are confident of."""
        trust = self.config.mode == "trust"
        warm = trust and row.temperature > 0
        shares = (logits / row.temperature if warm else logits).softmax(-1)
        best = shares.max(-1)
        text = list(row.tokens[-3:])
        tokens: list[int] = []
        for step, chance in enumerate(best.values.tolist()):
            if chance < self.config.beta:
                break
            chosen = int(best.indices[step])
            if warm:
                chosen = draw(shares[step], uniform(row.seed, len(row.tokens) + step))
            token = int(self.inputs.kept[chosen])
            # placeholders do not see what the others say, and tend to say it again; verified, a repeat costs one node
            if trust and (token == text[-1] or [text[-1], token] == text[-3:-1]):
                break
            tokens.append(token)
            text.append(token)
        chain = tuple(range(-1, len(tokens) - 1))
        return Draft(tuple(tokens), chain, scores=tuple(best.values[: len(tokens)].tolist())) if tokens else EMPTY_DRAFT

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is learnt."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


method = Lud
