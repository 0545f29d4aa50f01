"""Subtract in writing, from the last digit on: `subtract: 85-47` -> `5-7-0=18;8-4-1=03;38`.

A step takes the lower digit and what was borrowed off the upper digit; its result has two digits, 1 where a ten was
borrowed for it (15 - 7 - 0 = 8, written 18) and the digit of the difference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, size_of

SIZES = (2, 3)


def generate(rng: Random, difficulty: float) -> Sample:
    """Two numbers of as many digits as the size, the greater one first."""
    n = size_of(difficulty, *SIZES)
    b, a = sorted(rng.randrange(10 ** (n - 1), 10**n) for _ in range(2))
    steps, borrow = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        rest = int(x) - int(y) - borrow
        steps.append(f"{x}-{y}-{borrow}={int(rest < 0)}{rest % 10}")
        borrow = int(rest < 0)
    return Sample(f"subtract: {a}-{b}\n", ";".join([*steps, str(a - b)]), {"a": a, "b": b})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of steps that are right, and of the difference."""
    a, b = meta["a"], meta["b"]
    *steps, result = text.split(";")
    count, right = len(str(a)), 0
    for place, step in enumerate(steps[:count]):
        unit = 10**place
        match = re.fullmatch(r"(\d)-(\d)-([01])=([01])(\d)", step)
        if match is None:
            continue
        x, y, borrowed, borrows, digit = map(int, match.groups())
        places = (x, y) == (a // unit % 10, b // unit % 10) and borrowed == (a % unit < b % unit)
        right += places and 10 * borrows + x - y - borrowed == digit
    right += result == str(a - b)
    return right / (max(count, len(steps)) + 1)


WORLD = World("subtract", "subtract in writing", SIZES, lambda n: 9 * n + n, generate, verify)
