"""Contracts of the policy parts of the canvas loop, of token reducers and of weight transforms.

The canvas loop itself arrives with the diffusion models; what its parts are asked, and in which order, stands here:
raw logits -> stop rules that need raw -> logit stages -> sample x0 -> score stages -> selectors (united) -> commit ->
reviser -> stop rules on committed state -> planner when the block is full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from hasten.engine.contracts import Capabilities

StopAction = Literal["continue", "end_block", "fill_all", "truncate", "finish"]
PartRange = Literal["block", "all_masked", "block_start_full"]


@dataclass(slots=True)
class CanvasRow:
    """One canvas: `tokens` int64 [L] (prompt, fixed text and slots), `provenance` uint8 [L] (0 prompt, 1 fixed, 2 slot).

    `accepted` bool [L] marks committed positions (models without a mask token have no other sign). `window` is the
    active block [start, end); `end` may shrink. Noise is keyed by (seed, global_step, position).
    """

    id: int
    tokens: Tensor
    provenance: Tensor
    accepted: Tensor
    prompt_len: int
    end: int
    window: tuple[int, int]
    step_in_block: int = 0
    global_step: int = 0
    nfe: int = 0
    seed: int = 0


@dataclass(slots=True)
class View:
    """What a forward tells the policy parts: aligned raw `logits` [P, vocab] for absolute `positions` [P].

    `x0` [P] is the candidate token per position, `score` [P] its confidence, `masked` [P] whether it is still open,
    `progress` the share of the canvas committed, in [0, 1].
    """

    logits: Tensor
    positions: Tensor
    x0: Tensor
    score: Tensor
    masked: Tensor
    progress: float


class CanvasPart(Protocol):
    """Common declarations of canvas policy parts; histories are pure values (returned, never mutated)."""

    name: str
    range: PartRange
    memoryless: bool
    lossless: bool
    mutates_committed: bool


class BlockPlanner(CanvasPart, Protocol):
    """Decides where the next block ends."""

    def plan(self, view: View, row: CanvasRow) -> int:
        """End (exclusive) of the block that starts at row.window[0]."""
        ...


class LogitStage(CanvasPart, Protocol):
    """Changes logits before candidates are drawn (guidance, temperature, grammar, credit)."""

    def apply(self, history: Any, view: View, row: CanvasRow) -> tuple[Any, Tensor]:
        """(history', logits' [P, vocab])."""
        ...


class ScoreStage(CanvasPart, Protocol):
    """Changes the confidence by which positions are ranked."""

    def apply(self, view: View, row: CanvasRow) -> Tensor:
        """score' [P]."""
        ...


class Selector(CanvasPart, Protocol):
    """Chooses the positions to commit; several selectors are united."""

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history', bool [P])."""
        ...


class Stepper(CanvasPart, Protocol):
    """Owns the forwards of a step: plain, or draft-and-verify several steps at once."""

    def step(self, rows: Sequence[CanvasRow], forward: Callable[..., Sequence[View]]) -> Sequence[Any]:
        """Advance every row by at least one step."""
        ...


class Reviser(CanvasPart, Protocol):
    """Takes back or replaces committed positions."""

    def revise(self, history: Any, view: View, row: CanvasRow) -> tuple[Any, Mapping[int, int | None]]:
        """(history', position -> replacement token, or None to open it again)."""
        ...


class StopRule(CanvasPart, Protocol):
    """Ends a block or a canvas early."""

    def check(self, view: View, row: CanvasRow) -> tuple[StopAction, int]:
        """What to do, and the position for "truncate" (else -1)."""
        ...


class CachePolicy(CanvasPart, Protocol):
    """Which positions a forward recomputes; says when it is exact for a model."""

    def exact(self, capabilities: Capabilities) -> bool:
        """Whether this policy changes no result on such a model."""
        ...

    def needs_refresh(self, view: View | None, row: CanvasRow) -> bool:
        """Whether the next forward must recompute everything."""
        ...


# --- reduction, compression ------------------------------------------------------------------------------------------


class TokenReducer(Protocol):
    """Fewer media tokens before (or inside) the language model; neutral settings are an exact no-op."""

    name: str
    text_free: bool
    trained: bool
    changes_positions: bool

    def reduce(self, features: Tensor, context: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(kept features [m, hidden], keep_index [m] into the original grid)."""
        ...


class Compressor(Protocol):
    """A weight transform; `needs` names the calibration statistics it wants (hessian, input_norm, act_hist, gradients)."""

    name: str
    needs: frozenset[str]

    def plan(self, model: Any) -> Mapping[str, Any]:
        """Module name -> what happens to it."""
        ...

    def calibrate(self, model: Any, batches: Sequence[Tensor], plan: Mapping[str, Any]) -> Any:
        """Collected statistics."""
        ...

    def transform(self, model: Any, plan: Mapping[str, Any], state: Any) -> Any:
        """The compressed model."""
        ...
