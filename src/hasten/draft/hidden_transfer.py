"""Hidden transfer: a map of an inner state stands in for the next tokens' states, which the model's own layers refine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.draft._ahead import likeliest
from hasten.engine.contracts import EMPTY_DRAFT, Draft, Draws, Feedback, MethodContext, Needs, RowView
from hasten.errors import IncompatibleError, out_of_range
from hasten.models.feature import weights_path
from hasten.models.native import as_transformer
from hasten.models.placeholders import look_ahead
from hasten.models.pseudo import load_maps
from hasten.models.stack import DecoderStack
from hasten.types import MethodCard

card = MethodCard(
    slug="hidden-transfer",
    title="Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration",
    paper="2404.12022",
    date="2024-04",
    plugs_into="draft",
    exactness="exact",
    claim="Faster than the other methods of one model alone, Medusa and self-speculative decoding among them.",
    no_help="Models for which no maps were trained, and CPUs: the upper layers run over the guesses too.",
    knobs={
        "weights": "file of the trained maps (empty: trained here, or shipped with hasten)",
        "mode": "two-phase: guesses run after verification, for the accepted token; fused: in the pass, for all nodes",
        "k": "tokens guessed ahead (0..as many as were trained; 0 is plain decoding)",
        "nodes": "most nodes of a draft (1..256); the measured budget verifies what pays",
        "ranks": "best tokens of each depth that are combined (1..32); 1 drafts a chain",
        "floor": "a path less likely than this is not drafted (0 up to 1)",
    },
    needs=("causal", "hidden_states", "hooks"),
    conflicts=("lud",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of hidden transfer; the paper's are one pass (fused), k = 3 and a tree."""

    weights: str = ""
    mode: str = "two-phase"
    k: int = 3
    nodes: int = 8
    ranks: int = 3
    floor: float = 0.05

    def __post_init__(self) -> None:
        if self.mode not in ("two-phase", "fused"):
            raise out_of_range("hidden-transfer.mode", self.mode, "two-phase or fused")
        if not 0 <= self.k <= 16:
            raise out_of_range("hidden-transfer.k", self.k, "an integer in [0, 16]")
        for name, top in (("nodes", 256), ("ranks", 32)):
            if not 1 <= getattr(self, name) <= top:
                raise out_of_range(f"hidden-transfer.{name}", getattr(self, name), f"an integer in [1, {top}]")
        if not 0.0 <= self.floor < 1.0:
            raise out_of_range("hidden-transfer.floor", self.floor, "in [0, 1)")


class HiddenTransfer:
    """Drafts from placeholders that start from maps of the accepted token's inner state; keeps these states per row."""

    name = "hidden-transfer"
    scope: Literal["row", "shared"] = "row"
    draws: Draws = "point"

    def __init__(self, config: Config, context: MethodContext) -> None:
        target = context.backbone
        if not isinstance(target, DecoderStack):
            raise IncompatibleError(
                f"method 'hidden-transfer' needs a model of hasten's own decoder stack; {context.model!r} runs on "
                f"{target.name!r}",
                hint="choose another method (`hasten methods`)",
                field="method",
            )
        self.config = config
        self.maps = load_maps(weights_path("hidden-transfer", target, context.model, config.weights), target)
        if config.k > self.maps.count:
            raise out_of_range("hidden-transfer.k", config.k, f"at most the {self.maps.count} maps that were trained")
        self._pseudo = self.maps.pseudo(config.k)
        self.needs = Needs()
        # the stack that runs placeholders is loaded here, lest its seconds count as those of a draft
        self._stack = as_transformer(target) if config.k else None
        if config.k:
            fused = config.mode == "fused"
            self.needs = Needs(pseudo=self._pseudo) if fused else Needs(hidden=tuple(sorted(set(self._pseudo.layers))))
        self._tips: dict[int, Mapping[int, Tensor] | Tensor] = {}  # states by layer, or fused: the placeholders' final ones

    def max_nodes(self, budget: int) -> int:
        """The configured number of nodes, or the budget if that is less."""
        return min(self.config.nodes, budget) if self.config.k else 0

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """Nothing is drafted before the prompt's last token was read."""

    def close(self, row: int) -> None:
        """Forget the row's states."""
        self._tips.pop(row, None)

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Keep what the last accepted token left behind; in a fused pass that had no room for placeholders, nothing."""
        for report in feedback:
            if not report.nodes or not self.config.k:
                continue
            self._tips.pop(report.row, None)
            if self.config.mode == "two-phase":
                self._tips[report.row] = {layer: states[-1].clone() for layer, states in report.hidden.items()}
            elif report.pseudo is not None:
                self._tips[report.row] = report.pseudo.clone()

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One tree per row, likeliest paths first; guesses of all rows run through the upper layers together."""
        drafts: list[Draft] = [EMPTY_DRAFT] * len(rows)
        asked = [i for i, row in enumerate(rows) if budgets[i] > 0 and row.id in self._tips and self._fits(row)]
        if not asked:
            return drafts
        with torch.inference_mode():
            logits = self.maps.logits(self._finals([rows[i] for i in asked]))
            best = logits.topk(min(self.config.ranks, logits.shape[-1]))
            chances = (best.values - logits.logsumexp(-1, keepdim=True)).exp().tolist()
            tokens = self.maps.kept[best.indices].tolist()
        for i, ids, shares in zip(asked, tokens, chances, strict=True):
            drafts[i] = likeliest(ids, shares, self.max_nodes(budgets[i]), self.config.floor)
        return drafts

    def _fits(self, row: RowView) -> bool:
        """Whether the row's keys end with the token that the kept states belong to, and have room for placeholders."""
        if self.config.mode == "fused":
            return True
        return row.past is not None and row.past.length == len(row.tokens) - 1 and row.past.room >= self.config.k

    def _finals(self, rows: Sequence[RowView]) -> Tensor:
        """Final states [rows, k, hidden] of the placeholders behind each row's last accepted token."""
        tips = [self._tips[row.id] for row in rows]
        if self.config.mode == "fused":
            return torch.stack([tip for tip in tips if isinstance(tip, Tensor)])
        known = [(row.past, tip) for row, tip in zip(rows, tips, strict=True) if row.past and not isinstance(tip, Tensor)]
        assert self._stack is not None  # noqa: S101 - a decoder stack has one, or cannot serve hooks
        return look_ahead(self._stack, known, self._pseudo)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is learnt."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


method = HiddenTransfer
