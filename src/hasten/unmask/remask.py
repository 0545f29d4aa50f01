"""Remasking (dInfer): a committed token that the model has come to doubt is opened again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import SLOT, CanvasRow, PartRange, View
from hasten.errors import out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

card = MethodCard(
    slug="remask",
    title="Remasking of doubted tokens (dInfer)",
    paper="2510.08666",
    date="2025-10",
    plugs_into="unmask",
    exactness="lossy",
    claim="Takes back early mistakes of parallel decoding while the block is still open.",
    no_help="Decoding that commits only what is sure: nothing is doubted later.",
    knobs={"low": "a committed token of the block whose position's best probability falls below this is opened again"},
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of remasking; 0.4 is dInfer's."""

    low: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1:
            raise out_of_range("remask.low", self.low, "in [0, 1]")


class Remask:
    """Opens doubted positions of the block again, always fewer than the step has committed, so that blocks end."""

    name = "remask"
    range: PartRange = "block"
    memoryless = True
    lossless = False
    mutates_committed = True

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config

    @property
    def policy(self) -> Policy:
        """This reviser."""
        return Policy(reviser=self)

    def revise(self, history: Any, view: View, row: CanvasRow) -> tuple[Any, Mapping[int, int | None]]:
        """(history, position -> None for every position to open)."""
        new = int((view.masked & row.accepted[view.positions]).sum())
        old = view.inside & ~view.masked & (row.provenance[view.positions] == SLOT)
        best = view.changed.softmax(-1).amax(-1)
        doubted = (old & (best < self.config.low)).nonzero()[:, 0]
        worst = doubted[best[doubted].argsort(stable=True)][: max(0, new - 1)]
        return history, dict.fromkeys(view.positions[worst].tolist())


method = Remask
