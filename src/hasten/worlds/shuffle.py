"""Write letters in another order, any order: `shuffle: a d k` -> `d k a`. Many answers are right, each letter once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, letters, size_of

SIZES = (3, 8)


def generate(rng: Random, difficulty: float) -> Sample:
    """Different letters and one order of them, drawn."""
    items = letters(rng, size_of(difficulty, *SIZES))
    return Sample(f"shuffle: {' '.join(items)}\n", " ".join(rng.sample(items, len(items))), {"items": items})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of letters that are there as often as they should be."""
    wanted, found = Counter(meta["items"]), Counter(text.split(" "))
    return (wanted & found).total() / max(wanted.total(), found.total())


WORLD = World("shuffle", "write letters in any order", SIZES, lambda n: 2 * n - 1, generate, verify)
