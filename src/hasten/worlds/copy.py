"""Copy a list of words, three to 124 of them, each at most once: `copy: cat sun pen` -> `cat sun pen`."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import WORDS, Sample, World, share, size_of

SIZES = (3, 124)


def generate(rng: Random, difficulty: float) -> Sample:
    """Different words to copy."""
    items = rng.sample(WORDS, size_of(difficulty, *SIZES))
    text = " ".join(items)
    return Sample(f"copy: {text}\n", text, {"items": items})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of words in their places."""
    return share(meta["items"], text.split(" "))


WORLD = World("copy", "copy a list of words", SIZES, lambda n: 4 * n - 1, generate, verify)
