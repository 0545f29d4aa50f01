"""Reverse a list of letters: `reverse: a d k` -> `k d a`."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, letters, share, size_of

SIZES = (3, 8)


def generate(rng: Random, difficulty: float) -> Sample:
    """Different letters to reverse."""
    items = letters(rng, size_of(difficulty, *SIZES))
    return Sample(f"reverse: {' '.join(items)}\n", " ".join(reversed(items)), {"items": items})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of letters in their places, read from the end."""
    found = text.split(" ")
    return share(meta["items"], found[::-1])


WORLD = World("reverse", "reverse a list of letters", SIZES, lambda n: 2 * n - 1, generate, verify)
