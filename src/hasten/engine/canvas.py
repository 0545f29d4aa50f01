"""The canvas loop: plan block -> forward -> one step of the policy -> commit, for rows that fill a window of masks.

Rows advance on their own: in one pass some start a block over the whole canvas while others recompute a window over their
cached keys, or check several drafted states of it at once. What a step decides is the policy's (hasten.policy); this file
owns positions, caches, forwards and the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hasten.engine.contracts import Backbone, Pass, RowInput
from hasten.engine.limits import LIMITS
from hasten.engine.masks import FULL, BlockCausal, Explicit, Visibility
from hasten.engine.parts import CanvasRow, Forward, Taken
from hasten.engine.rows import Choice
from hasten.engine.trace import Trace
from hasten.failure import contained
from hasten.types import Output, Usage

_LARGE = 8192  # vocabulary from which the arg-max of the backbone is worth carrying along
_AHEAD = 512  # query tokens that a canvas may have had more than another that wants to run


@dataclass(slots=True, eq=False, kw_only=True)
class Canvas(Choice):
    """A choice of the canvas loop: its state, and the forward last seen of it."""

    policy: Any  # hasten.policy.Policy: open, begin, advance, cache, stepper, everywhere, ahead, final
    state: CanvasRow
    seen: Forward | None = None
    shown: int = 0  # positions whose text is out
    paid: int = -1  # query tokens it has had, from where it joined the others; -1: has not joined

    def output(self, now_s: float) -> Output:
        """The finished choice; `now_s` is on the trace clock."""
        state = self.state
        end = state.end if self.reason == "length" else self.shown
        usage = Usage(
            prompt_tokens=state.prompt_len,
            completion_tokens=end - state.prompt_len,
            forwards=self.forwards,
            computed_tokens=self.computed,
            decode_s=now_s - self.started_s,
        )
        return Output(
            text=self.text.text,
            tokens=tuple(state.tokens[state.prompt_len : end].tolist()),
            finish_reason=self.reason or "abort",
            usage=usage,
            seed=state.seed,
            choice=self.choice,
            method=self.method,
            stop=self.stop,
        )


@lru_cache(maxsize=64)
def _branch_mask(low: int, high: int, length: int, count: int, block: int | None) -> Tensor:
    """bool [T, length + T]: each of `count` windows [low, high) sees the cached keys outside it, and itself, in blocks."""
    n = high - low
    allowed = torch.zeros(count * n, length + count * n, dtype=torch.bool)
    allowed[:, :low] = True
    allowed[:, high:length] = True
    for i in range(count):
        allowed[i * n : (i + 1) * n, length + i * n : length + (i + 1) * n] = True
    if block is not None:  # a window may begin in the block before, which sees nothing of this one
        queries = torch.arange(low, high).repeat(count) // block
        allowed &= torch.cat((torch.arange(length) // block, queries)) <= queries[:, None]
    return allowed


@dataclass(slots=True)
class _Turn:
    """One canvas's part of a pass: its `branches`, the states computed for them, and over which queries."""

    canvas: Canvas
    branches: Sequence[CanvasRow]
    states: Sequence[CanvasRow]
    refresh: bool
    low: int
    high: int
    positions: Tensor

    @property
    def size(self) -> int:
        """Query tokens it adds to the pass."""
        return (self.high - self.low) * len(self.states)


class CanvasLoop:
    """Advances canvases of one backbone by one pass per step; `provisional` candidates are told to the trace on request."""

    def __init__(self, backbone: Backbone, trace: Trace) -> None:
        self.backbone, self.trace = backbone, trace
        self.provisional = False
        block = None if backbone.capabilities.self_conditioning else backbone.capabilities.block
        self._visibility: Visibility = FULL if block is None else BlockCausal(block)

    @torch.inference_mode()
    def step(self, canvases: Sequence[Canvas]) -> None:
        """One pass over those of `canvases` whose turn it is; finished ones have `reason` set.

        If it raises, none has changed; what fails after the pass fails one canvas, which ends with reason "error".
        """
        turns = self._turns(canvases)
        inputs: list[RowInput] = []
        starts: list[int] = []
        for turn in turns:
            turn.canvas.size = turn.size
            starts.append(len(inputs))
            inputs += self._inputs(turn)
        if not inputs:
            return
        done = self.backbone.run(inputs)
        finite = torch.isfinite(done.logits).all(-1)
        if self.backbone.capabilities.mask_id is not None:
            done.logits[:, self.backbone.capabilities.mask_id] = -torch.inf
        for turn, at in zip(turns, starts, strict=True):
            with contained() as caught:
                self._take(turn, done, at, finite)
            if caught.error is not None:
                turn.canvas.fail(caught.error)

    def _turns(self, canvases: Sequence[Canvas]) -> list[_Turn]:
        """Whose turn it is: those that had the fewest query tokens so far, as many as a pass takes, and at least one.

        A long canvas that is far ahead waits, so that short ones get as much of the machine as it had.
        """
        joined = min((canvas.paid for canvas in canvases if canvas.paid >= 0), default=0)
        for canvas in canvases:
            canvas.paid = max(canvas.paid, joined)
        turns: list[_Turn] = []
        room = LIMITS.step_tokens
        for canvas in sorted(canvases, key=lambda canvas: (canvas.paid, canvas.id)):
            if turns and canvas.paid > turns[0].canvas.paid + _AHEAD:
                break
            turn = self._turn(canvas)
            if turn is None:
                continue
            if turns and turn.size > room:
                break
            turns.append(turn)
            room -= turn.size
        return turns

    def _take(self, turn: _Turn, done: Pass, at: int, finite: Tensor) -> None:
        """What the pass, whose inputs from `at` on are this turn's, means for one canvas."""
        canvas = turn.canvas
        canvas.computed += turn.size
        canvas.paid += turn.size
        for _ in range(sides := canvas.policy.sides):
            canvas.forwards += 1
            self._emit(canvas, "forward", total=turn.size // sides, backbone=self.backbone.name)
        forwards, rows = self._forwards(turn, done, at)
        self._kept(turn)
        if bool(finite[rows].all()):
            self._settle(canvas, turn.branches, canvas.policy.joined(forwards))
            fresh = 0 if turn.refresh else canvas.state.fresh + 1
            canvas.state = replace(canvas.state, fresh=fresh, stored=canvas.cache.length)
        else:
            canvas.end("error", "the model's logits are not finite")

    def _turn(self, canvas: Canvas) -> _Turn | None:
        """What this canvas computes next, after all steps that need no forward; None when it is finished."""
        caps, policy = self.backbone.capabilities, canvas.policy
        while canvas.reason is None:
            if not canvas.state.left and not self._next_block(canvas):
                return None
            state = canvas.state
            low, high = state.window
            branches: Sequence[CanvasRow] = [state]
            if low < high:
                branches = policy.stepper.branches(state, canvas.seen, policy.advance)
            if not branches:
                self._settle(canvas, (), ())
                continue
            refresh = policy.cache.refresh(state)
            queries = policy.cache.span(state, refresh, caps.logit_shift)
            wanted = torch.zeros_like(state.accepted)
            wanted[low:high] = True
            if low == high:
                wanted[low : state.end] = True
            elif policy.everywhere:
                wanted |= state.masked
            wanted[: queries[0] + (caps.logit_shift if queries[0] else 0)] = False
            wanted[queries[1] :] = False
            states = policy.states(branches)
            return _Turn(canvas, branches, states, refresh, queries[0], queries[1], wanted.nonzero()[:, 0])
        return None

    def _next_block(self, canvas: Canvas) -> bool:
        """Go to the next block with open positions; False (and `reason` set) when the canvas is full."""
        while not canvas.state.left:
            canvas.seen = None
            canvas.state = replace(canvas.state, window=(canvas.state.window[1],) * 2, fresh=-1, step_in_block=0)
            if canvas.state.window[1] >= canvas.state.end:
                canvas.reason = "length"
                self._show(canvas, Taken(canvas.state))
                return False
            if canvas.policy.ahead and bool(canvas.state.masked.any()):
                return True
            self._begin(canvas, None)
        return True

    def _begin(self, canvas: Canvas, seen: Forward | None) -> None:
        canvas.state = canvas.policy.begin(canvas.state, seen)
        low, high = canvas.state.window
        self._emit(canvas, "block", position=low, total=high)

    def _inputs(self, turn: _Turn) -> list[RowInput]:
        """Rows of the pass: one with the states side by side over a cache that is kept, else one per state."""
        canvas, low, high = turn.canvas, turn.low, turn.high
        shift = self.backbone.capabilities.logit_shift
        index = ((turn.positions - shift).clamp(min=low) - low).tolist()
        span, count = torch.arange(low, high), len(turn.states)
        canvas.cache.truncate(min(canvas.cache.length, canvas.state.end))  # nothing sees what a cut took away
        if not canvas.policy.cache.stores:
            return [RowInput(one.tokens[low:high], span, None, self._visibility, tuple(index)) for one in turn.states]
        if count == 1:
            one, cache = turn.states[0], canvas.cache
            tokens = one.tokens[low:high]
            return [RowInput(tokens, span, cache, self._visibility, tuple(index), low, before=one.before)]
        tokens = torch.cat([one.tokens[low:high] for one in turn.states])
        wanted = tuple(i + k * (high - low) for k in range(count) for i in index)
        length = canvas.cache.length
        seen = Explicit(_branch_mask(low, high, length, count, self.backbone.capabilities.block))
        return [RowInput(tokens, span.repeat(count), canvas.cache, seen, wanted, length)]

    def _forwards(self, turn: _Turn, done: Pass, at: int) -> tuple[list[Forward], slice]:
        """What the pass computed for each state of a turn whose rows start at `at`, and its logit rows."""
        count, size = len(turn.states), len(turn.positions)
        first, large = done.logit_starts[at], self.backbone.capabilities.vocab_size >= _LARGE
        out = []
        for i in range(count):
            rows = slice(first + i * size, first + (i + 1) * size)
            best = torch.tensor(done.best[rows]) if large and done.best is not None else None
            if best is not None and self.backbone.capabilities.mask_id in best.tolist():
                best = None
            out.append(Forward(done.logits[rows], turn.positions, best))
        return out, slice(first, first + count * size)

    @staticmethod
    def _kept(turn: _Turn) -> None:
        """Commit the keys that stay valid after the pass."""
        cache, policy = turn.canvas.cache, turn.canvas.policy.cache
        if policy.stores:
            length = policy.length(turn.canvas.state, turn.refresh, turn.high)
            cache.truncate(min(length, cache.length))
            cache.advance(length - cache.length)

    def _settle(self, canvas: Canvas, branches: Sequence[CanvasRow], forwards: Sequence[Forward]) -> None:
        """Take the steps that this pass allows."""
        policy = canvas.policy
        if canvas.state.window[0] == canvas.state.window[1]:
            self._begin(canvas, forwards[0])
            if not canvas.state.left:
                return
            branches = [canvas.state]
        taken, canvas.seen = policy.stepper.settle(canvas.state, canvas.seen, branches, forwards, policy.advance)
        for one in taken:
            canvas.state = one.row
            if self._show(canvas, one):
                return
        if self.provisional and forwards and canvas.state.left:
            self._guess(canvas, canvas.seen or forwards[0])

    def _show(self, canvas: Canvas, taken: Taken) -> bool:
        """Tell the trace of a step's commits and release the text that is final now; True when the canvas has ended."""
        state, new = canvas.state, ""
        end = state.end if canvas.policy.final or not state.left else state.window[0]
        ready = [*state.accepted[canvas.shown : end].tolist(), False].index(False)
        for token in state.tokens[canvas.shown : canvas.shown + ready].tolist():
            canvas.shown += 1
            if token in canvas.eos_ids or token in state.sampling.stop_ids:
                canvas.reason, canvas.stop = "stop", token
            else:
                new += canvas.text.push(token)
                if canvas.text.found is not None:
                    canvas.reason, canvas.stop = "stop", canvas.text.found
            if canvas.reason == "stop":
                break
        if canvas.reason is not None:
            new += canvas.text.finish()
        writes = taken.writes
        if new and not writes:
            writes = ((canvas.shown - 1, int(state.tokens[canvas.shown - 1]), 1.0),)
        for i, (at, token, score) in enumerate(writes, 1):
            self._emit(canvas, "commit", position=at, token=token, confidence=score, text=new if i == len(writes) else "")
        return canvas.reason is not None

    def _guess(self, canvas: Canvas, forward: Forward) -> None:
        """Tell the trace what the model now thinks of the open positions it has just seen."""
        masked = canvas.state.masked[forward.positions]
        best = forward.logits[masked].softmax(-1).max(-1)
        for at, token, prob in zip(
            forward.positions[masked].tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            self._emit(canvas, "propose", position=at, token=token, confidence=prob)

    def _emit(self, canvas: Canvas, kind: str, **fields: object) -> None:
        self.trace.emit(kind, canvas.request_id, canvas.choice, canvas.added_s, **fields)  # type: ignore[arg-type]
