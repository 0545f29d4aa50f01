"""CreditDecoding: a decaying credit for the tokens that were best in recent steps is added to the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import CanvasRow, PartRange, View
from hasten.errors import out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

STORES = ("sparse", "dense")

card = MethodCard(
    slug="creditdecoding",
    title="CreditDecoding: trace credits",
    paper="2510.06133",
    date="2025-10",
    plugs_into="unmask",
    exactness="lossy",
    claim="LLaDA-8B over eight tasks: 5.48x the speed of one token per step and 0.48 points more accuracy.",
    no_help="Blocks of a few tokens, or few steps per block: no prediction stays long enough to earn anything.",
    knobs={
        "fusion": "strength of the credit in the logits, at least 0 (0: off)",
        "exponent": "power of the probability that a step's vote counts, above 0; below 1 lifts small ones",
        "decay": "share of the credit that is left after a step, in [0, 1)",
        "store": "sparse (the last `slots` different best tokens of a position) or dense (all of the vocabulary)",
        "slots": "tokens that a position remembers in the sparse store, at least 1",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the credit; dInfer's own. The paper's are said to be 0.7, 0.5, 0.65 with a threshold of 0.95."""

    fusion: float = 0.7
    exponent: float = 0.2
    decay: float = 0.8
    store: str = "sparse"
    slots: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.fusion <= 100:
            raise out_of_range("creditdecoding.fusion", self.fusion, "in [0, 100]")
        if not 0 < self.exponent <= 100:
            raise out_of_range("creditdecoding.exponent", self.exponent, "above 0, at most 100")
        if not 0 <= self.decay < 1:
            raise out_of_range("creditdecoding.decay", self.decay, "in [0, 1)")
        if self.store not in STORES:
            raise out_of_range("creditdecoding.store", self.store, ", ".join(STORES))
        if self.slots < 1:
            raise out_of_range("creditdecoding.slots", self.slots, "at least 1")


class Credits(NamedTuple):
    """Credit of the positions of a block: `ids` int64 [W, K], -1 where empty, and `values` float32 [W, K].

    The dense store has no ids: K is the vocabulary. `lost` counts tokens whose credit was given up for want of a slot.
    """

    ids: Tensor | None
    values: Tensor
    lost: int = 0


class CreditDecoding:
    """A logit stage: candidates and their scores come from raw logits + fusion * ln(1 + credit).

    One vote per step and open position, out of raw probabilities, for the position's best token; the vote counts in the
    step it is cast. Credit belongs to a block and ends with it. What reads `view.logits` sees nothing of it.
    """

    name = "creditdecoding"
    range: PartRange = "block"
    memoryless = False
    lossless = False
    mutates_committed = False

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config

    @property
    def policy(self) -> Policy:
        """This logit stage."""
        return Policy(stages=(self,))

    def apply(self, history: Credits | None, view: View, row: CanvasRow) -> tuple[Credits, Tensor]:
        """(credits with this step's votes, view.changed with their bonus)."""
        low, high = row.window
        width, vocab = high - low, view.logits.shape[-1]
        lines = view.inside.nonzero()[:, 0]
        at = view.positions[lines] - low
        best = view.logits[lines].softmax(-1).max(-1)
        vote = (best.values**self.config.exponent).masked_fill(~view.masked[lines], 0.0)
        votes = view.logits.new_zeros(width).index_copy(0, at, vote)
        token = at.new_zeros(width).index_copy(0, at, best.indices)
        if self.config.store == "dense":
            credits = _dense(history, token, votes, self.config.decay, vocab)
        else:
            credits = _sparse(history, token, votes, self.config.decay, min(self.config.slots, vocab))
        bonus = self.config.fusion * credits.values[at].log1p()
        if self.config.fusion == 0:
            return credits, view.changed
        if credits.ids is None:
            return credits, view.changed.index_add(0, lines, bonus)
        ids = credits.ids[at]
        fused = view.changed.clone()
        spread = lines[:, None].expand_as(ids)
        fused.index_put_((spread, ids.clamp(min=0)), bonus.masked_fill(ids < 0, 0.0), accumulate=True)
        return credits, fused


def _dense(history: Credits | None, token: Tensor, votes: Tensor, decay: float, vocab: int) -> Credits:
    """Credits after a step's `votes` [W] for `token` [W]; those of before count by `decay`."""
    values = votes.new_zeros(len(votes), vocab) if history is None else history.values * decay
    return Credits(None, values.scatter_add(1, token[:, None], votes[:, None]))


def _sparse(history: Credits | None, token: Tensor, votes: Tensor, decay: float, slots: int) -> Credits:
    """The same, where a position has `slots` tokens; a new one takes an empty slot, else that of the least credit."""
    width = len(votes)
    if history is None or history.ids is None:
        old, values, before = token.new_full((width, slots), -1), votes.new_zeros(width, slots), 0
    else:
        old, values, before = history.ids, history.values * decay, history.lost
    own = old == token[:, None]
    known, cast = own.any(1), votes > 0
    room = values.masked_fill(old < 0, -1.0).argmin(1)  # an empty slot is less than any credit
    slot = torch.where(known, own.to(torch.uint8).argmax(1), room)[:, None]
    taken = old.gather(1, slot)
    lost = (cast & ~known)[:, None] & (taken >= 0)
    kept = values.gather(1, slot).where(known[:, None], 0.0)
    ids = old.scatter(1, slot, token[:, None].where(cast[:, None], taken))
    values = values.scatter(1, slot, (kept + votes[:, None]).where(cast[:, None], values.gather(1, slot)))
    return Credits(ids, values, before + int(lost.sum()))


method = CreditDecoding
