"""Hierarchical rule (dInfer): besides sure positions, the best of every run of masks, so that text grows in many places."""

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
    slug="hierarchy",
    title="Hierarchical decoding (dInfer)",
    paper="2510.08666",
    date="2025-10",
    plugs_into="unmask",
    exactness="lossy",
    claim="Splits runs of masks in the middle: log2 of a run's length forwards fill it where the model is fairly sure.",
    no_help="Text that grows from left to right only: the middle of a run is a guess there.",
    knobs={
        "tau": "probability from which a position is committed anyway",
        "low": "probability that the best of a run needs",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the hierarchical rule; dInfer's evaluation uses low 0.62."""

    tau: float = 0.9
    low: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 2:
            raise out_of_range("hierarchy.tau", self.tau, "in [0, 1], or above 1 for none")
        if not 0 <= self.low <= self.tau:
            raise out_of_range("hierarchy.low", self.low, f"in [0, tau = {self.tau}]")


class Hierarchy:
    """Selects positions above `tau`, and of every contiguous run of open positions the best one if above `low`."""

    name = "hierarchy"
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
        chosen = open_ & (view.score > self.config.tau)
        at = open_.nonzero()[:, 0]
        if len(at):
            starts = torch.cat((torch.tensor([True]), view.positions[at][1:] != view.positions[at][:-1] + 1))
            run = starts.cumsum(0) - 1
            best = torch.full((int(run[-1]) + 1,), -torch.inf).scatter_reduce(0, run, view.score[at].float(), "amax")
            first = (view.score[at] == best[run]) & (best[run] > self.config.low)
            ranks = torch.where(first, at, len(open_))  # at ties the lowest position
            lowest = torch.full((int(run[-1]) + 1,), len(open_)).scatter_reduce(0, run, ranks, "amin")
            chosen[lowest[lowest < len(open_)]] = True
        return history, chosen


method = Hierarchy
