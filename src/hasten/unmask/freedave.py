"""FreeDave: guess the next states of the sampler from one forward, check all of them in the next, keep what it confirms."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import Advance, CanvasRow, Forward, PartRange, Taken
from hasten.errors import ConfigError, out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

MATCHES = ("exact", "subset")
MOST = 16

card = MethodCard(
    slug="freedave",
    title="Free Draft-and-Verification (FreeDave)",
    paper="2510.00294",
    date="2025-10",
    plugs_into="unmask",
    exactness="exact",
    claim="Maths and code with diffusion models: up to 3.78x the throughput of one token per step, with the same text.",
    no_help="Machines without idle compute: a pass over d states costs up to d times one, so few forwards may take longer.",
    knobs={
        "d": "states checked in one pass at most (1 to 16; 1 is the plain sampler, 0: up to 8, whatever pays here)",
        "match": "exact: the wrapped sampler's steps; subset: also a part of such a step, which may change the text",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of FreeDave; the published d is 4 for LLaDA and 8 for Dream and SDAR."""

    d: int = 4
    match: str = "exact"

    def __post_init__(self) -> None:
        if not 0 <= self.d <= MOST:
            raise out_of_range("freedave.d", self.d, f"0 (what pays) to {MOST}")
        if self.match not in MATCHES:
            raise out_of_range("freedave.match", self.match, ", ".join(MATCHES))
        if self.d == 0 and self.match != "exact":
            raise ConfigError(
                "freedave.d = 0 goes with match exact only; else the text would depend on how fast the machine is",
                hint="give d, or leave out match",
                field="freedave.d",
            )


class Drafts(list[CanvasRow]):
    """The states of one pass, the first of them certain, of `asked` at most.

    `first` is the step to the first, `started` when drafting began.
    """

    def __init__(self, states: Sequence[CanvasRow], first: Taken, asked: int, started: float) -> None:
        super().__init__(states)
        self.first, self.asked, self.started = first, asked, started


class Depth:
    """How many states pay: the most steps per second, out of measured passes and of how far guesses came true.

    It reads the clock, so speed depends on it and, as the match is exact, text does not.
    """

    COUNTS = (1, 2, 4, 8)
    EVERY = 64  # passes until another count is tried again
    TRIALS = 3  # passes per count before it is judged

    def __init__(self) -> None:
        self.seconds = {count: deque[float](maxlen=9) for count in self.COUNTS}
        self.reached = [0.0] * self.COUNTS[-1]  # how often state k + 1 was confirmed where it was asked for
        self.tried = [0.0] * self.COUNTS[-1]
        self.passes = 0

    def choose(self) -> int:
        """States for the next pass."""
        for count in self.COUNTS:
            if len(self.seconds[count]) < self.TRIALS:
                return count
        if self.passes % self.EVERY == 0:
            return self.COUNTS[self.passes // self.EVERY % len(self.COUNTS)]
        return max(self.COUNTS, key=self.rate)

    def rate(self, count: int) -> float:
        """Steps per second with `count` states."""
        steps = sum(self.reached[k] / self.tried[k] if self.tried[k] else 0.0 for k in range(count))
        return steps / statistics.median(self.seconds[count])

    def saw(self, count: int, steps: int, seconds: float) -> None:
        """A pass for which `count` states were asked took `seconds` and led to `steps` of them.

        One whose drafts ended early, as they do where a block does, counts for what was asked all the same.
        """
        self.passes += 1
        if count in self.seconds:
            self.seconds[count].append(seconds)
        for k in range(min(count, len(self.tried))):
            self.tried[k] = 0.98 * self.tried[k] + 1
            self.reached[k] = 0.98 * self.reached[k] + (k < steps)


class FreeDave:
    """A stepper over any sampler whose committed text stays.

    Drafts are the sampler's own next steps, played on with the forward at hand: with one token per step they fill the best
    1, 2, ... positions. What a step does in a confirmed state is worked out from that state's own forward and history, so a
    draft can only save a forward, never decide a token; `subset` alone takes drafted parts of a step.
    """

    name = "freedave"
    range: PartRange = "block"
    memoryless = True
    mutates_committed = False
    verifies = True

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config
        self.lossless = config.match == "exact"
        self.depth = Depth() if config.d == 0 else None
        self.most = config.d or Depth.COUNTS[-1]

    @property
    def policy(self) -> Policy:
        """This stepper."""
        return Policy(stepper=self)

    def branches(self, row: CanvasRow, seen: Forward | None, advance: Advance) -> Sequence[CanvasRow]:
        """The state itself, or what the sampler would do next if the model saw what it has `seen`.

        Drafts end where the window is full or the canvas becomes another: such a state starts its own pass.
        """
        if seen is None:
            return [row]
        started = time.perf_counter()  # drafting costs as much as a pass where the model is small
        first = taken = advance(row, seen)
        count = self.config.d if self.depth is None else self.depth.choose()
        states: list[CanvasRow] = []
        while len(states) < count and taken.row.left and _alike(taken.row, row):
            states.append(taken.row)
            if len(states) < count:
                taken = advance(taken.row, seen)
        return Drafts(states, first, count, started)

    def settle(
        self,
        row: CanvasRow,
        seen: Forward | None,
        branches: Sequence[CanvasRow],
        forwards: Sequence[Forward],
        advance: Advance,
    ) -> tuple[Sequence[Taken], Forward | None]:
        """The steps that the forwards confirm, and the forward of the last state among them."""
        if seen is None:
            return (), forwards[0]
        if not branches:
            return (advance(row, seen),), None
        taken, last = [branches.first if isinstance(branches, Drafts) else advance(row, seen)], 0
        while last + 1 < len(branches):
            step = advance(taken[-1].row, forwards[last])
            found = self._confirmed(step.row, branches, last)
            if found < 0:
                break
            if self.config.match == "subset":
                step = _part(taken[-1].row, step, branches[found])
            taken.append(step)
            last = found
        if self.depth is not None and isinstance(branches, Drafts):
            self.depth.saw(branches.asked, len(taken), time.perf_counter() - branches.started)
        return taken, forwards[last]

    def _confirmed(self, after: CanvasRow, branches: Sequence[CanvasRow], last: int) -> int:
        """The last draft behind `last` that is the state `after`, or in part (subset); -1 if none is."""
        if not _alike(after, branches[last]):
            return -1
        for k in range(len(branches) - 1, last, -1):
            accepted = branches[k].accepted
            if self.config.match == "exact" and not torch.equal(accepted, after.accepted):
                continue
            held = after.accepted & (after.tokens == branches[k].tokens)
            if not bool((accepted & ~held).any()):
                return k
        return -1


def _alike(one: CanvasRow, other: CanvasRow) -> bool:
    """Whether both states are of one canvas and block, so that one pass can compute them."""
    return one.end == other.end and one.window == other.window


def _part(before: CanvasRow, step: Taken, draft: CanvasRow) -> Taken:
    """A step that commits no more than a draft did: the draft's positions with the step's counts and history."""
    writes = tuple(write for write in step.writes if draft.accepted[write[0]] and not before.accepted[write[0]])
    return Taken(replace(step.row, tokens=draft.tokens, accepted=draft.accepted), writes)


method = FreeDave
