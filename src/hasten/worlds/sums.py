"""Add up a list of digits step by step: `sum: 7 5 9` -> `07+5=12;12+9=21`. Three to 24 terms, every sum below 100."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, size_of

SIZES = (3, 24)


def generate(rng: Random, difficulty: float) -> Sample:
    """Digits from 1 up, so small that their sum stays below 100."""
    n = size_of(difficulty, *SIZES)
    terms = [rng.randint(1, min(9, 99 // n)) for _ in range(n)]
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total:02d}+{term}={total + term:02d}")
        total += term
    return Sample(f"sum: {' '.join(map(str, terms))}\n", ";".join(steps), {"terms": terms})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of steps that go on from the right sum with the right term to the right sum."""
    terms, steps, right = meta["terms"], text.split(";"), 0
    for i, step in enumerate(steps[: len(terms) - 1]):
        match = re.fullmatch(r"(\d\d)\+(\d)=(\d\d)", step)
        if match is not None:
            before, term, after = map(int, match.groups())
            right += before == sum(terms[: i + 1]) and term == terms[i + 1] and after == before + term
    return right / max(len(terms) - 1, len(steps))


WORLD = World("sums", "add up digits step by step", SIZES, lambda n: 8 * (n - 1) - 1, generate, verify)
