"""Replace one letter of a list: `replace d>x: a d k` -> `a x k`."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, letters, share, size_of

SIZES = (3, 8)


def generate(rng: Random, difficulty: float) -> Sample:
    """Different letters, one of them to replace by a letter that is not there."""
    new, *items = letters(rng, 1 + size_of(difficulty, *SIZES))
    old = rng.choice(items)
    answer = " ".join(new if item == old else item for item in items)
    return Sample(f"replace {old}>{new}: {' '.join(items)}\n", answer, {"items": items, "old": old, "new": new})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of letters in their places; the new one must stand where the old one stood, the old one nowhere."""
    expected = list(meta["items"])
    expected[expected.index(meta["old"])] = meta["new"]
    return share(expected, text.split(" "))


WORLD = World("replace", "replace one letter of a list", SIZES, lambda n: 2 * n - 1, generate, verify)
