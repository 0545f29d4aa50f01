"""dParallel's decoding: commit every position of the block whose entropy is low; for models that were trained for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten import models
from hasten.engine.contracts import MethodContext
from hasten.engine.parts import CanvasRow, PartRange, View
from hasten.errors import FormatError, out_of_range
from hasten.models.fetch import cache_dir
from hasten.models.tokenizer import read_json
from hasten.policy import Policy
from hasten.types import MethodCard

TAU = 0.5  # nats; the authors' for LLaDA-8B-Instruct

card = MethodCard(
    slug="dparallel",
    title="dParallel: learnable parallel decoding",
    paper="2509.26488",
    date="2025-09",
    plugs_into="unmask",
    exactness="lossy",
    claim="LLaDA-8B, trained to be certain of its own answers: GSM8K in 30 steps instead of 256, 8.5x, same accuracy.",
    no_help="A model that was not trained for it becomes certain of one neighbour at a time, as with a threshold.",
    knobs={"tau": "entropy in nats up to which a position is committed, at least 0 (-1: the model's own, else 0.5)"},
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of dParallel: a threshold in nats belongs to a model and its vocabulary; training calibrates it."""

    tau: float = -1.0

    def __post_init__(self) -> None:
        if not (self.tau >= 0 or self.tau == -1):
            raise out_of_range("dparallel.tau", self.tau, "at least 0 nats, or -1 for the model's own")


class DParallel:
    """Selects the open positions of the block with an entropy of at most `tau`, and always the one with the least.

    The entropy is of the whole distribution at temperature 1, of the logits that candidates come from.
    """

    name = "dparallel"
    range: PartRange = "block"
    memoryless = True
    lossless = False
    mutates_committed = False

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config
        self.tau = calibrated(context.model) if config.tau == -1 else config.tau

    @property
    def policy(self) -> Policy:
        """This selector."""
        return Policy(selectors=(self,))

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history, bool [P])."""
        open_ = view.masked & view.inside
        nats = entropy(view.changed).masked_fill(~open_, torch.inf)
        chosen = open_ & (nats <= self.tau)
        chosen[nats.argmin()] = True
        return history, chosen & open_


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, float64 [P], of logits [P, vocab]."""
    probs = logits.double().softmax(-1)
    return -(probs * (probs + 1e-12).log()).sum(-1)


def folders(model: str) -> tuple[Path, ...]:
    """Where a model may lie: at the path itself, with the package, or where `hasten train` leaves small models."""
    return Path(model), Path(models.__file__).parent / "mini" / model, cache_dir() / "minis" / model


def calibrated(model: str) -> float:
    """The threshold that training left in the card.json of a model's folder, 0.5 nats where there is none.

    `model` is a folder, or the name of one that comes with the package or that `hasten train` made. Raises FormatError for
    a card with another value than a number of nats.
    """
    for folder in folders(model):
        stored = read_json(folder / "card.json").get("dparallel")
        if stored is not None:
            tau = stored.get("tau") if isinstance(stored, dict) else None
            if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau < float("inf"):
                raise FormatError(f"dparallel.tau is {tau!r}, not a number of nats", path=str(folder / "card.json"))
            return float(tau)
    return TAU


method = DParallel
