"""Confidence threshold (Fast-dLLM): commit every position of the block that the model is sure of, at least one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import CanvasRow, PartRange, View
from hasten.errors import out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

card = MethodCard(
    slug="threshold",
    title="Confidence-aware parallel decoding (Fast-dLLM)",
    paper="2505.22618",
    date="2025-05",
    plugs_into="unmask",
    exactness="lossy",
    claim="LLaDA-8B on GSM8K, with its block cache: 8.1x at 256 tokens and 11.0x at 512, within a point of accuracy.",
    no_help="Text whose next token depends on the one before it, such as chained sums: nothing else is sure yet.",
    knobs={"tau": "probability from which a position is committed, in [0, 1]; above 1 commits one per forward"},
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of threshold decoding; 0.9 is the published one."""

    tau: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 2:
            raise out_of_range("threshold.tau", self.tau, "in [0, 1], or above 1 for one token per forward")


class Threshold:
    """Selects the open positions of the block whose score reaches `tau`."""

    name = "threshold"
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
        """(history, bool [P]); the loop adds the best position when nothing is sure."""
        return history, view.score >= self.config.tau


method = Threshold
