"""What a pass costs on this machine: t(T, context, rows), measured once in under a second and kept in a profile.

Node budgets start from it instead of learning it while they decode. A profile belongs to one model, backbone, instruction
set, number of threads and processor; it lies in the cache folder as JSON and may be deleted at any time.
"""

from __future__ import annotations

import json
import platform
import time
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import torch

from hasten.engine.contracts import RowInput
from hasten.engine.masks import CAUSAL
from hasten.kernels import library
from hasten.models.feature import identity
from hasten.models.fetch import cache_dir
from hasten.models.native import NativeStack

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
CONTEXTS = (64, 1024)
_BUDGET_S = 0.9  # for all of it; what is not measured by then is interpolated
_LEAST, _MOST = 2, 5  # passes of one size
_KERNELS = 4  # raised when kernels change what passes cost, so that profiles are measured anew


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds of a pass: `times[context][tokens]`, for one row. R rows of one token each cost what R tokens of one row do:
    every query goes through the keys it sees by itself."""

    times: dict[int, dict[int, float]]

    def __call__(self, tokens: int, context: int) -> float:
        """Estimated seconds of a pass over `tokens` query tokens in all, of any number of rows with `context` tokens each.

        Linear between measured sizes and contexts, and beyond them.
        """
        contexts = sorted(self.times)
        at = [_line(self.times[one], tokens) for one in contexts]
        if len(contexts) == 1:
            return at[0]
        slope = (at[-1] - at[0]) / (contexts[-1] - contexts[0])
        return max(1e-9, at[0] + slope * (context - contexts[0]))

    def table(self, context: int) -> dict[int, float]:
        """Query tokens -> seconds at this context, for every measured size."""
        sizes = sorted(set.intersection(*(set(one) for one in self.times.values())))
        return {tokens: self(tokens, context) for tokens in sizes}


def _line(table: dict[int, float], tokens: int) -> float:
    """Piecewise linear through the measured sizes; the last two give the slope beyond them."""
    sizes = sorted(table)
    if len(sizes) == 1:
        return table[sizes[0]] * max(1.0, tokens / sizes[0])
    i = min(max(1, bisect_left(sizes, tokens)), len(sizes) - 1)
    low, high = sizes[i - 1], sizes[i]
    return table[low] + (table[high] - table[low]) * (tokens - low) / (high - low)


def measure(model: NativeStack, budget_s: float = _BUDGET_S) -> PassTimes:
    """Time passes of every size at every context, the fastest of a few each; stops when `budget_s` is used up."""
    started = time.perf_counter()
    most = max(SIZES)
    contexts = [one for one in CONTEXTS if one + most <= model.capabilities.max_len] or [0]
    layout = model.pool(1 << 40).layout
    row = model.pool(layout.nbytes(max(contexts) + 2 * most)).open(max(contexts) + most)
    ids = torch.arange(most) % model.config.vocab_size
    times: dict[int, dict[int, float]] = {}
    for n, context in enumerate(contexts):
        row.length = context  # what lies there does not matter: zeros take as long as keys
        share = budget_s * (n + 1) / len(contexts)
        table = times.setdefault(context, {})
        for tokens in SIZES:
            given = RowInput(ids[:tokens], torch.arange(context, context + tokens), row, CAUSAL, "all")
            best = float("inf")
            for turn in range(_MOST):
                if turn >= _LEAST and time.perf_counter() - started > share * (SIZES.index(tokens) + 1) / len(SIZES):
                    break
                start = time.perf_counter()
                model.run([given])
                best = min(best, time.perf_counter() - start)
            table[tokens] = best
            if tokens > 1 and time.perf_counter() - started > share:
                break
    return PassTimes(times)


def processor() -> str:
    """The processor's name as the system tells it, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def machine_key(model: NativeStack) -> str:
    """What a measurement holds for, besides the model itself."""
    threads = library.native().hasten_threads()
    layouts = sorted({one.layout for one in model.weights.matrices.values()})
    kernels = f"{library.level()} {_KERNELS}, {threads} threads"
    return f"{processor()}, {kernels}, {model.activations}, cache {model.cache_type}, {layouts}"


def profile(model: NativeStack, name: str) -> PassTimes:
    """The profile of this model on this machine: read, or measured and written. A file that cannot be read is made anew."""
    place = cache_dir() / "profiles" / f"{identity(model, name)}.json"
    key = machine_key(model)
    known: dict[str, object] = {}
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        known = stored if isinstance(stored, dict) else {}
        times = {int(c): {int(t): float(s) for t, s in table.items()} for c, table in known[key].items()}  # type: ignore[attr-defined]
        if times and all(table and min(table.values()) > 0 for table in times.values()):
            return PassTimes(times)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not there, damaged, or of another machine: measured below
    done = measure(model)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(".part")
        part.write_text(json.dumps({**known, key: done.times}, indent=1), encoding="utf-8")
        part.replace(place)
    except OSError:
        pass  # a folder that cannot be written costs a measurement next time
    return done
