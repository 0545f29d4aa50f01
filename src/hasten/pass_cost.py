"""What passes of a model cost on this machine, learnt while they run: decoding, by rows and tokens, and reading prompts."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.errors import out_of_range

_WINDOW = 7  # passes of one size that are remembered; their median counts
_STALE = 256  # passes after which an unused size is forgotten, so that one bad moment is not held against it for ever
_SWEEP = 64  # passes between two looks for unused sizes
_FIRST = 0.8  # the first pass of a size pays for what is set up once: so much of it counts, until the second
_DOUBT = 2.0  # and no more than so many times what was foretold
_STEP = 0.01  # share of a plain pass that one more token is thought to cost before it was tried
_SLOWER = 3.0  # rows that decode wait for prompts at most so many times as long as their own pass takes
_LEAST_READ = 32  # prompt tokens of a pass at least: fewer cost nearly as much
_READ = 64  # as long as nothing was measured
_PAST = 0.8  # weight of what was measured before against the newest pass


@dataclass(slots=True)
class _Size:
    """How many times as long as plain ones recent passes of one size took, and the pass it was last used in."""

    times: deque[float]
    used: int
    fresh: bool = False


def _median(times: deque[float]) -> float:
    return sorted(times)[len(times) // 2]  # called after every pass: the library's takes ten times as long


class PassCost:
    """t(n): seconds of a pass over n query tokens of R rows, learnt from the passes that were run.

    Known are the pace, the median of the newest plain passes (one token of each row), and for every other size how many
    times as long its passes took as plain ones did at that time: a machine that is slow for a while is slow for all sizes,
    and a size that is seldom used is not compared with plain passes of another moment.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, dict[int, _Size]] = {}  # rows -> tokens -> times
        self._shape: dict[int, dict[int, float]] = {}  # rows -> tokens -> their median, or what was foretold
        self._foretold: dict[int, dict[int, float]] = {}
        self._pace: dict[int, float] = {}  # rows -> seconds of a plain pass
        self._orders: dict[int, list[int]] = {}  # rows -> the sizes in `_shape`, in order
        self._passes = 0

    def record(self, rows: int, tokens: int, seconds: float) -> None:
        """A decoding pass of `rows` rows over `tokens` query tokens took this long."""
        self._passes += 1
        sizes = self._sizes.setdefault(rows, {})
        plain, size = tokens == rows, sizes.get(tokens)
        time = seconds if plain else seconds / self._pace.get(rows, 1.0)
        if size is None:
            size = sizes[tokens] = _Size(deque(maxlen=_WINDOW), self._passes, fresh=True)
            foretold = 0.0 if plain else self(rows, tokens) / self._pace.get(rows, 1.0)
            size.times.append(min(time * _FIRST, _DOUBT * foretold) if foretold else time * _FIRST)
        else:
            if size.fresh:
                size.times.clear()
            size.fresh, size.used = False, self._passes
            size.times.append(time)
        if plain:
            self._set_pace(rows, _median(size.times))
        else:
            self._shape.setdefault(rows, {})[tokens] = _median(size.times)
        if self._passes % _SWEEP == 0:
            for old in [n for n, one in sizes.items() if n > rows and one.used + _STALE < self._passes]:
                del sizes[old]
                self._shape[rows].pop(old, None)
                self._shape[rows] |= {n: t for n, t in self._foretold.get(rows, {}).items() if n == old}
                self._orders.pop(rows, None)

    def _set_pace(self, rows: int, seconds: float) -> None:
        """Plain passes of `rows` rows take so long; what was measured before the first of them is restated in its terms."""
        shape = self._shape.setdefault(rows, {})
        if rows not in self._pace:
            for tokens, size in self._sizes[rows].items():
                if tokens != rows:
                    size.times = deque((time / seconds for time in size.times), maxlen=_WINDOW)
                    shape[tokens] /= seconds
        self._pace[rows], shape[rows] = seconds, 1.0

    def expect(self, rows: int, times: Mapping[int, float]) -> None:
        """Start from these seconds by query tokens, measured beforehand; the passes themselves then correct them.

        Those of a plain pass (`rows` tokens) must be among them, unless plain passes were run.
        """
        pace = times.get(rows, self._pace.get(rows, 0.0))
        if not pace:
            raise out_of_range("times", sorted(times), f"with the seconds of {rows} tokens, a plain pass")
        sizes, shape = self._sizes.setdefault(rows, {}), self._shape.setdefault(rows, {})
        self._foretold[rows] = {tokens: seconds / pace for tokens, seconds in times.items() if tokens != rows}
        if rows not in self._pace:
            sizes[rows] = _Size(deque([pace], maxlen=_WINDOW), self._passes)
            self._set_pace(rows, pace)
        for tokens, time in self._foretold[rows].items():
            if tokens not in sizes:
                shape[tokens] = time

    def __call__(self, rows: int, tokens: int) -> float:
        """Estimated seconds; 0 when nothing is known of `rows` rows.

        Between known sizes it is interpolated; beyond them passes of several rows grow as those of one row do, others as
        they did so far.
        """
        known, pace = self._shape.get(rows), self._pace.get(rows, 1.0)
        if not known:
            return 0.0
        if tokens in known:
            return known[tokens] * pace
        order = self._orders.get(rows, [])
        if len(order) != len(known):
            order = self._orders[rows] = sorted(known)
        at = bisect_left(order, tokens)
        below, above = order[at - 1] if at else 0, order[at] if at < len(order) else 0
        if not above:
            one = self._shape.get(1, {})
            if rows > 1 and one and min(one) <= below and tokens <= max(one):  # larger passes grow alike for all rows
                return pace * known[below] * self(1, tokens) / self(1, below)
            least = order[0]
            step = (known[below] - known[least]) / (below - least) if below > least else 0.0
            return pace * (known[below] + (tokens - below) * max(step, _STEP * known[least]))
        if not below:
            return pace * known[above]
        share = (tokens - below) / (above - below)
        return pace * ((1 - share) * known[below] + share * known[above])

    def typical(self, rows: int) -> float:
        """Median seconds of the newest passes over one token of each of `rows` rows; 0 when there was none."""
        return self._pace.get(rows, 0.0)

    def table(self, rows: int = 1) -> dict[int, float]:
        """Query tokens -> seconds, as known for passes of `rows` rows."""
        return {n: time * self._pace.get(rows, 1.0) for n, time in self._shape.get(rows, {}).items()}


class ReadingCost:
    """What prompt tokens take beside what else a pass does, as measured, and how many of them a pass may read."""

    def __init__(self) -> None:
        self.token_s = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """`tokens` prompt tokens made a pass so much longer."""
        if tokens >= _LEAST_READ and seconds > 0:
            new = seconds / tokens
            self.token_s = new if not self.token_s else _PAST * self.token_s + (1 - _PAST) * new

    def room(self, decoding_s: float) -> int:
        """Prompt tokens of a pass whose decoding rows alone take `decoding_s` (0 = not known)."""
        if not self.token_s or not decoding_s:
            return _READ
        return max(_LEAST_READ, int(_SLOWER * decoding_s / self.token_s))
