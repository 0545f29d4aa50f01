"""Entropy bound (DiffusionGemma, SDAR): commit the most certain positions while their summed entropy stays small."""

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
    slug="entropy-bound",
    title="Entropy-bounded unmasking",
    paper="2505.24857",
    date="2025-05",
    plugs_into="unmask",
    exactness="lossy",
    claim="The summed entropy of positions committed together bounds what ignoring their dependence can cost.",
    no_help="Models that are sure of everything or of nothing: then it is the threshold, or one token per forward.",
    knobs={"bound": "nats of entropy besides the largest that one forward may commit, at least 0"},
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the bound; DiffusionGemma uses 0.1 nats, SDAR names 0.35."""

    bound: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.bound <= 1000:
            raise out_of_range("entropy-bound.bound", self.bound, "at least 0")


class EntropyBound:
    """Selects the k open positions of least entropy with (their summed entropy - the largest of them) <= bound."""

    name = "entropy-bound"
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
        """(history, bool [P]); one position always qualifies."""
        open_ = view.masked & view.inside
        logs = view.changed.log_softmax(-1)
        entropy = torch.special.entr(logs.exp()).sum(-1).masked_fill(~open_, torch.inf)
        order = entropy.sort(stable=True)
        fits = order.values.cumsum(0) - order.values <= self.config.bound
        chosen = torch.zeros_like(open_)
        chosen[order.indices[fits]] = True
        return history, chosen & open_


method = EntropyBound
