"""Medusa: heads on the target's last state guess the next tokens, each without knowing what the others chose."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.engine.contracts import EMPTY_DRAFT, Draft, Draws, Feedback, MethodContext, Needs, RowView
from hasten.errors import IncompatibleError, out_of_range
from hasten.models.feature import weights_path
from hasten.models.heads import load_heads
from hasten.models.stack import DecoderStack
from hasten.types import MethodCard

card = MethodCard(
    slug="medusa",
    title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
    paper="2401.10774",
    date="2024-01",
    plugs_into="draft",
    exactness="exact",
    claim="2.2x with frozen backbones (Medusa-1), 2.3x to 3.6x with trained ones, on Vicuna 7B to 33B.",
    no_help="Models for which no heads were trained; later heads guess without knowing what the earlier ones chose.",
    knobs={
        "weights": "file of the trained heads (empty: trained here, or shipped with hasten)",
        "nodes": "most nodes of a draft (1..256); the measured budget verifies what pays",
        "ranks": "best tokens of each head that are combined (1..32)",
        "floor": "a path less likely than this is not drafted (0 up to 1)",
    },
    needs=("causal", "hidden_states"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of Medusa; the published code's are fixed trees of 63 nodes over ranks below 10."""

    weights: str = ""
    nodes: int = 24
    ranks: int = 10
    floor: float = 0.01

    def __post_init__(self) -> None:
        for name, top in (("nodes", 256), ("ranks", 32)):
            if not 1 <= getattr(self, name) <= top:
                raise out_of_range(f"medusa.{name}", getattr(self, name), f"an integer in [1, {top}]")
        if not 0.0 <= self.floor < 1.0:
            raise out_of_range("medusa.floor", self.floor, "in [0, 1)")


class Medusa:
    """Combines the heads' best tokens into the likeliest paths; keeps one state per row."""

    name = "medusa"
    scope: Literal["row", "shared"] = "row"
    draws: Draws = "point"
    needs = Needs(final_hidden=True, feedback="accepted")

    def __init__(self, config: Config, context: MethodContext) -> None:
        target = context.backbone
        if not isinstance(target, DecoderStack):
            raise IncompatibleError(
                f"method 'medusa' needs a model of hasten's own decoder stack; {context.model!r} runs on {target.name!r}",
                hint="choose another method (`hasten methods`)",
                field="method",
            )
        self.config = config
        self.heads = load_heads(weights_path("medusa", target, context.model, config.weights), target)
        self._tips: dict[int, Tensor] = {}

    def max_nodes(self, budget: int) -> int:
        """The configured number of nodes, or the budget if that is less."""
        return min(self.config.nodes, budget)

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """Nothing is drafted before the first state is known."""

    def close(self, row: int) -> None:
        """Forget the row's state."""
        self._tips.pop(row, None)

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Keep the state of the last accepted token."""
        for report in feedback:
            if report.final is not None and report.nodes:
                self._tips[report.row] = report.final[-1].clone()

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One tree per row, likeliest paths first; all rows' heads run in one pass."""
        drafts: list[Draft] = [EMPTY_DRAFT] * len(rows)
        asked = [i for i, (row, budget) in enumerate(zip(rows, budgets, strict=True)) if budget and row.id in self._tips]
        if not asked:
            return drafts
        with torch.inference_mode():
            logits = self.heads(torch.stack([self._tips[rows[i].id] for i in asked]))
            best = logits.topk(min(self.config.ranks, logits.shape[-1]))
            chances = (best.values - logits.logsumexp(-1, keepdim=True)).exp().tolist()
            tokens = self.heads.kept[best.indices].tolist()
        for i, ids, shares in zip(asked, tokens, chances, strict=True):
            drafts[i] = self._tree(ids, shares, self.max_nodes(budgets[i]))
        return drafts

    def _tree(self, ids: list[list[int]], chances: list[list[float]], budget: int) -> Draft:
        """The `budget` likeliest paths of (rank per head), parents before children."""
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        heap = [(-chance, 0, rank, -1) for rank, chance in enumerate(chances[0]) if chance >= self.config.floor]
        heapq.heapify(heap)
        while heap and len(tokens) < budget:
            reach, depth, rank, parent = heapq.heappop(heap)
            tokens.append(ids[depth][rank])
            parents.append(parent)
            scores.append(chances[depth][rank])
            for following, chance in enumerate(chances[depth + 1] if depth + 1 < len(chances) else ()):
                if -reach * chance >= self.config.floor:
                    heapq.heappush(heap, (reach * chance, depth + 1, following, len(tokens) - 1))
        return Draft(tuple(tokens), tuple(parents), scores=tuple(scores)) if tokens else EMPTY_DRAFT

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is learnt."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


method = Medusa
