"""Close brackets in the right order: `close: ([{` -> `}])`."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, size_of

SIZES = (3, 12)
PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def generate(rng: Random, difficulty: float) -> Sample:
    """Open brackets to close."""
    opened = [rng.choice("([{<") for _ in range(size_of(difficulty, *SIZES))]
    return Sample(f"close: {''.join(opened)}\n", "".join(PAIRS[b] for b in reversed(opened)), {"opened": opened})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of closing brackets that meet their partner on a stack."""
    stack, right = list(meta["opened"]), 0
    for bracket in text:
        right += bool(stack) and PAIRS[stack.pop()] == bracket
    return right / max(len(meta["opened"]), len(text))


WORLD = World("close", "close brackets", SIZES, lambda n: n, generate, verify)
