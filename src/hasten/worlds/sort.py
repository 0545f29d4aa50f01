"""Sort letters: `sort: k a d` -> `a d k`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, letters, size_of

SIZES = (3, 8)


def generate(rng: Random, difficulty: float) -> Sample:
    """Different letters to put in order."""
    items = letters(rng, size_of(difficulty, *SIZES))
    return Sample(f"sort: {' '.join(items)}\n", " ".join(sorted(items)), {"items": items})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """1 for the same letters in ascending order; else half the share found and half the share of ascending neighbours."""
    items, found = list(meta["items"]), text.split(" ")
    rising = [a < b for a, b in pairwise(found)]
    if all(rising) and set(found) == set(items):
        return 1.0
    kept = len(set(found) & set(items)) / max(len(found), len(items))
    return min(0.99, 0.5 * kept + 0.5 * sum(rising) / max(len(rising), len(items) - 1))


WORLD = World("sort", "sort a list of letters", SIZES, lambda n: 2 * n - 1, generate, verify)
