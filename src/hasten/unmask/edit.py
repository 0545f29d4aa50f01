"""Token editing (LLaDA-2.1): a committed token of the block is replaced when the model is sure of another one."""

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
    slug="edit",
    title="Token editing (LLaDA-2.1)",
    paper="2602.08676",
    date="2026-02",
    plugs_into="unmask",
    exactness="lossy",
    claim="Corrects tokens in place, so that bolder thresholds can be used.",
    no_help="Models that were not trained to correct visible tokens: they copy what they see, right or wrong.",
    knobs={"tau": "probability that another token needs to replace a committed one, in [0, 1]"},
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of editing; 0.9 is LLaDA-2.1's."""

    tau: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise out_of_range("edit.tau", self.tau, "in [0, 1]")


class Edit:
    """Replaces committed slots of the block by the candidate the model is surer than `tau` of, while masks are left."""

    name = "edit"
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
        """(history, position -> replacement)."""
        old = view.inside & ~view.masked & (row.provenance[view.positions] == SLOT)
        prob, token = view.changed.softmax(-1).max(-1)
        other = old & (token != row.tokens[view.positions]) & (prob > self.config.tau)
        return history, dict(zip(view.positions[other].tolist(), token[other].tolist(), strict=True))


method = Edit
