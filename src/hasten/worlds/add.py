"""Add two numbers in writing, from the last digit on: `add: 47+85` -> `7+5+0=12;4+8+1=13;132`.

A step adds two digits and the carry; its result has two digits, the new carry and the digit of the sum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, size_of

SIZES = (2, 3)


def generate(rng: Random, difficulty: float) -> Sample:
    """Two numbers of as many digits as the size."""
    n = size_of(difficulty, *SIZES)
    a, b = (rng.randrange(10 ** (n - 1), 10**n) for _ in range(2))
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return Sample(f"add: {a}+{b}\n", ";".join([*steps, str(a + b)]), {"a": a, "b": b})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of steps that are right, and of the sum."""
    a, b = meta["a"], meta["b"]
    *steps, result = text.split(";")
    count, right = len(str(a)), 0
    for place, step in enumerate(steps[:count]):
        unit = 10**place
        match = re.fullmatch(r"(\d)\+(\d)\+([01])=([01])(\d)", step)
        if match is None:
            continue
        x, y, carry, over, digit = map(int, match.groups())
        places = (x, y) == (a // unit % 10, b // unit % 10) and carry == (a % unit + b % unit) // unit
        right += places and 10 * over + digit == x + y + carry
    right += result == str(a + b)
    return right / (max(count, len(steps)) + 1)


WORLD = World("add", "add two numbers in writing", SIZES, lambda n: 9 * n + 1 + n, generate, verify)
