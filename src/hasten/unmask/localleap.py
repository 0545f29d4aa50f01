"""LocalLeap: the threshold is lower near positions that the model is sure of in this step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import CanvasRow, PartRange, View
from hasten.errors import out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

ANCHORS = ("step", "committed")

card = MethodCard(
    slug="localleap",
    title="LocalLeap: local determinism propagation",
    paper="2510.07081",
    date="2025-10",
    plugs_into="unmask",
    exactness="lossy",
    claim="6.94x the throughput of one token per step: steps fall to 14.2 %, with little change in quality.",
    no_help="Models whose moderate guesses next to sure ones are wrong: measure both thresholds on yours.",
    knobs={
        "kappa": "probability from which a position is sure, in [0, 1]; above 1 commits one token per forward",
        "tau": "probability that is enough near a sure position, in [0, 1] and at most kappa",
        "radius": "how many positions away is near, at least 0",
        "anchors": "step: positions that are open and sure now; committed: what the canvas holds already as well",
        "eos": "whether a sure end of text makes its surroundings near (true or false)",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of LocalLeap; the published ones for LLaDA-8B-Instruct."""

    kappa: float = 0.9
    tau: float = 0.75
    radius: int = 4
    anchors: str = "step"
    eos: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.kappa <= 2:
            raise out_of_range("localleap.kappa", self.kappa, "in [0, 1], or above 1 for one token per forward")
        if not 0 <= self.tau <= min(1.0, self.kappa):
            raise out_of_range("localleap.tau", self.tau, f"in [0, 1] and at most kappa = {self.kappa}")
        if self.radius < 0:
            raise out_of_range("localleap.radius", self.radius, "at least 0")
        if self.anchors not in ANCHORS:
            raise out_of_range("localleap.anchors", self.anchors, ", ".join(ANCHORS))


class LocalLeap:
    """Selects what reaches `kappa`, and what reaches `tau` within `radius` of it; one hop, by absolute position.

    Where a logit stage lifts scores (credit), anchors are judged by the lifted ones and their neighbours by raw
    probabilities, times what score stages made of them: two reliefs at once would be too many.
    """

    name = "localleap"
    range: PartRange = "block"
    memoryless = True
    lossless = False
    mutates_committed = False

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config
        self.eos_ids = torch.tensor(context.capabilities.eos_ids, dtype=torch.long)

    @property
    def policy(self) -> Policy:
        """This selector."""
        return Policy(selectors=(self,))

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history, bool [P]); the loop adds the best position when nothing is sure."""
        config, open_ = self.config, view.masked & view.inside
        sure = open_ & (view.score >= config.kappa)
        if not bool(sure.any()):
            return history, sure
        anchors = sure if config.eos else sure & ~torch.isin(view.x0, self.eos_ids)
        low, high = row.window
        there = torch.zeros(high - low, dtype=torch.bool).index_fill(0, view.positions[anchors] - low, True)
        if config.anchors == "committed":
            text = row.accepted[low:high] & (row.provenance[low:high] > 0)
            there |= text if config.eos else text & ~torch.isin(row.tokens[low:high], self.eos_ids)
        near = widen(there, config.radius)
        inside = view.inside.nonzero()[:, 0]
        close = torch.zeros_like(sure).index_copy(0, inside, near[view.positions[inside] - low])
        return history, sure | (open_ & close & (self._plain(view) >= config.tau))

    @staticmethod
    def _plain(view: View) -> Tensor:
        """Scores float [P] without what logit stages added."""
        if view.changed is view.logits:
            return view.score
        raw = (view.logits.gather(-1, view.x0[:, None])[:, 0] - view.logits.logsumexp(-1)).exp()
        return raw * (view.score / view.prob).nan_to_num(1.0)


def widen(there: Tensor, radius: int) -> Tensor:
    """bool [W]: true within `radius` of a true place."""
    pooled = F.max_pool1d(there[None, None].float(), 2 * radius + 1, stride=1, padding=radius)
    return pooled[0, 0] > 0


method = LocalLeap
