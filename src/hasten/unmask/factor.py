"""Factor rule (Fast-dLLM): commit as many positions as their joint doubt allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import CanvasRow, PartRange, View
from hasten.errors import out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

card = MethodCard(
    slug="factor",
    title="Factor-based parallel decoding (Fast-dLLM)",
    paper="2505.22618",
    date="2025-05",
    plugs_into="unmask",
    exactness="lossy",
    claim="Commits n positions at once only while (n + 1) times the doubt about the worst of them stays below a factor.",
    no_help="Where a fixed threshold does as well; the factor only adapts the bar to how many are committed together.",
    knobs={"f": "bound on (n + 1)(1 - confidence of the n-th), above 0; small values commit one per forward"},
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the factor rule; 1.0 is the published one."""

    f: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.f <= 1000:
            raise out_of_range("factor.f", self.f, "in (0, 1000]")


class Factor:
    """Selects the largest n of the surest open positions with (n + 1)(1 - c_n) < f."""

    name = "factor"
    range: PartRange = "block"
    memoryless = True
    lossless = False
    mutates_committed = False

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config

    @property
    def policy(self) -> Policy:
        """This selector."""
        return Policy(selectors=(self,))

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history, bool [P]); the loop adds the best position when none qualifies."""
        open_ = view.masked & view.inside
        order = view.score.masked_fill(~open_, -torch.inf).sort(descending=True, stable=True)
        count = torch.arange(2, len(order.values) + 2)
        fits = (count * (1 - order.values) < self.config.f).nonzero()[:, 0]
        chosen = torch.zeros_like(open_)
        if len(fits):
            chosen[order.indices[: int(fits[-1]) + 1]] = True
        return history, chosen & open_


method = Factor
