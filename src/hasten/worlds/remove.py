"""Remove one letter of a list: `remove d: a d k` -> `a k`."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, letters, share, size_of

SIZES = (3, 8)


def generate(rng: Random, difficulty: float) -> Sample:
    """Different letters, one of them to leave out."""
    items = letters(rng, size_of(difficulty, *SIZES))
    gone = rng.choice(items)
    answer = " ".join(item for item in items if item != gone)
    return Sample(f"remove {gone}: {' '.join(items)}\n", answer, {"items": items, "gone": gone})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of letters in their places once the removed one is put back; 0 when it is still there."""
    found, at = text.split(" "), list(meta["items"]).index(meta["gone"])
    if meta["gone"] in found:
        return 0.0
    return share(meta["items"], [*found[:at], meta["gone"], *found[at:]])


WORLD = World("remove", "leave out one letter of a list", SIZES, lambda n: 2 * n - 3, generate, verify)
