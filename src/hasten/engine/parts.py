"""Contracts of the policy parts of the canvas loop: what they are asked, in which order, and how they combine.

One step of a row: raw logits -> logit stages -> candidates and their scores -> score stages -> stop rules that fill ->
selectors (united) -> commit -> reviser -> stop rules that cut -> the next block's plan. A part is a pure function of
what it is given: its `history` is returned, never changed, so that drafted steps, batching and preemption can fork it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from hasten.engine.contracts import Capabilities
from hasten.types import SamplingParams

StopAction = Literal["continue", "fill_all", "truncate", "finish"]
PartRange = Literal["block", "all_masked", "block_start_full"]
PROMPT, FIXED, SLOT = 0, 1, 2  # provenance of a canvas position


@dataclass(slots=True)
class CanvasRow:
    """The state of one canvas: `tokens` int64 [L] (prompt, fixed text and slots), `provenance` uint8 [L].

    `accepted` bool [L] marks final positions (models without a mask token have no other sign). `window` is the active
    block [start, end), empty between blocks; `end` of the canvas may shrink. `step_in_block` and `global_step` count
    commits, `quotas` are those of the block's steps and `planned` all the canvas needs; `blank` is the token
    of open positions. `stored` positions have valid keys,
    computed `fresh` forwards ago (-1: not in this block). Noise is keyed by (seed,
    global_step, position). `history` maps a part's name to its own value. Tensors are replaced, never written to.
    """

    id: int
    tokens: Tensor
    provenance: Tensor
    accepted: Tensor
    prompt_len: int
    end: int
    window: tuple[int, int]
    sampling: SamplingParams
    seed: int = 0
    step_in_block: int = 0
    global_step: int = 0
    quotas: tuple[int, ...] = ()
    planned: int = 1
    blank: int = 0
    fresh: int = -1
    stored: int = 0
    history: Mapping[str, Any] = field(default_factory=dict)

    @property
    def masked(self) -> Tensor:
        """Open positions bool [L], those from `end` on excluded."""
        masked = ~self.accepted
        masked[self.end :] = False
        return masked

    @property
    def left(self) -> int:
        """Open positions of the window."""
        return (self.window[1] - self.window[0]) - int(self.accepted[self.window[0] : self.window[1]].sum())

    @property
    def quota(self) -> int:
        """Commits due in this step: the schedule's, at least 1 and at most what is open."""
        due = self.quotas[self.step_in_block] if self.step_in_block < len(self.quotas) else 1
        return max(1, min(due, self.left))


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward computed at absolute `positions` int64 [P], ascending: aligned raw `logits` float32 [P, vocab].

    `best` int64 [P] are their arg-max where the backbone had it at hand; the mask token has logit -inf.
    """

    logits: Tensor
    positions: Tensor
    best: Tensor | None = None


@dataclass(slots=True)
class View:
    """A forward as the parts of one step see it, at `positions` int64 [P] for the raw `logits` [P, vocab].

    `masked` bool [P]: still open. `inside` bool [P]: of the window. After the logit stages `changed` [P, vocab] are the
    logits that candidates come from, `x0` [P] the candidates, `prob` [P] their scores before the score stages and
    `score` [P] after. The mask token has logit -inf throughout.
    """

    forward: Forward
    logits: Tensor
    positions: Tensor
    masked: Tensor
    inside: Tensor
    changed: Tensor
    x0: Tensor
    prob: Tensor
    score: Tensor


@dataclass(frozen=True, slots=True)
class Taken:
    """One step of a canvas: the state after it and what it wrote, (position, token or -1 for opened again, score)."""

    row: CanvasRow
    writes: tuple[tuple[int, int, float], ...] = ()


Advance = Callable[[CanvasRow, Forward], Taken]


class CanvasPart(Protocol):
    """Common declarations: a part's name, the positions it reads, and what it breaks.

    `range`: the block, all masked positions that a forward shows, or everything at a block's start.
    `memoryless`: keeps no history. `lossless`: changes no result. `mutates_committed`: may take back what is final.
    """

    name: str
    range: PartRange
    memoryless: bool
    lossless: bool
    mutates_committed: bool


class BlockPlanner(CanvasPart, Protocol):
    """Decides where the next block ends."""

    def plan(self, view: View | None, row: CanvasRow) -> int:
        """End (exclusive) of the block that starts at row.window[0]; the view is there with range block_start_full."""


class Schedule(CanvasPart, Protocol):
    """How many positions each step of a block commits at least."""

    def quotas(self, row: CanvasRow) -> tuple[int, ...]:
        """Quotas of the block row.window, summing to its open positions."""

    def planned(self, row: CanvasRow) -> int:
        """Steps of the whole canvas."""


class Scorer(CanvasPart, Protocol):
    """Draws a candidate per position and scores it."""

    def draw(self, view: View, row: CanvasRow) -> tuple[Tensor, Tensor]:
        """(x0 [P], score float [P]) from view.changed."""


class LogitStage(CanvasPart, Protocol):
    """Changes logits before candidates are drawn (guidance, grammar, credit)."""

    def apply(self, history: Any, view: View, row: CanvasRow) -> tuple[Any, Tensor]:
        """(history', logits' [P, vocab])."""


class ScoreStage(CanvasPart, Protocol):
    """Changes the scores by which positions are ranked."""

    def rescore(self, view: View, row: CanvasRow) -> Tensor:
        """score' [P]."""


class Selector(CanvasPart, Protocol):
    """Chooses the positions to commit; several selectors are united."""

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history', bool [P])."""


class Stepper(CanvasPart, Protocol):
    """Owns the forwards of a step: plain, or drafted states that are checked together."""

    most: int  # branches of one pass at most

    def branches(self, row: CanvasRow, seen: Forward | None, advance: Advance) -> Sequence[CanvasRow]:
        """States this pass is to compute: [row] alone while nothing was `seen` of it, none when that is enough."""

    def settle(
        self,
        row: CanvasRow,
        seen: Forward | None,
        branches: Sequence[CanvasRow],
        forwards: Sequence[Forward],
        advance: Advance,
    ) -> tuple[Sequence[Taken], Forward | None]:
        """The steps taken, in order, and the forward of the last state where it is known."""


class Reviser(CanvasPart, Protocol):
    """Takes back or replaces committed positions of the window."""

    def revise(self, history: Any, view: View, row: CanvasRow) -> tuple[Any, Mapping[int, int | None]]:
        """(history', position -> replacement token, or None to open it again)."""


class StopRule(CanvasPart, Protocol):
    """Ends a canvas early: before the commits of a step ("fill_all"), or after them ("truncate", "finish")."""

    when: Literal["before", "after"]

    def check(self, view: View, row: CanvasRow, chosen: Tensor) -> tuple[StopAction, int]:
        """What to do, and the new end for "truncate" (else -1); `chosen` bool [P] are this step's commits."""


class CachePolicy(CanvasPart, Protocol):
    """Which positions a forward recomputes; says when it is exact for a model."""

    stores: bool  # whether keys are kept between forwards

    def exact(self, capabilities: Capabilities) -> bool:
        """Whether this policy changes no result on such a model."""

    def refresh(self, row: CanvasRow) -> bool:
        """Whether the next forward must recompute everything."""

    def span(self, row: CanvasRow, refresh: bool, shift: int) -> tuple[int, int]:
        """Queries [low, high) of the next forward."""

    def length(self, row: CanvasRow, refresh: bool, high: int) -> int:
        """Positions whose keys stay valid after that forward."""
