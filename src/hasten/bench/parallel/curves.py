"""Figures of the suite: how left-to-right a decoding order is, and curves of quality over tokens per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hasten.errors import out_of_range

Point = tuple[float, float]  # tokens per step, score in percent


def kendall(places: Sequence[float], steps: Sequence[float]) -> float | None:
    """Kendall's tau-b of places and the steps that filled them: 1 left to right, -1 right to left, 0 no order.

    None where it is not defined: fewer than two places, or all in one step.
    """
    a, b = (_signs(values) for values in _pair(places, steps))
    scale = math.sqrt(float(np.abs(a).sum()) * float(np.abs(b).sum()))
    return float((a * b).sum()) / scale if scale else None


def _signs(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(values[:, None] - values[None, :])


def spearman(places: Sequence[float], steps: Sequence[float]) -> float | None:
    """Spearman's rho of the same: the correlation of ranks, equal values sharing theirs. None where it is not defined."""
    a, b = (_ranks(values) for values in _pair(places, steps))
    scale = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / scale if scale else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean ranks, centred."""
    ranks = (values[:, None] > values[None, :]).sum(1) + ((values[:, None] == values[None, :]).sum(1) - 1) / 2
    return np.asarray(ranks - ranks.mean()) if len(ranks) else ranks


def _pair(places: Sequence[float], steps: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(places) != len(steps):
        raise out_of_range("steps", f"{len(steps)} values", f"as many as places, {len(places)}")
    return np.array(places, dtype=np.float64), np.array(steps, dtype=np.float64)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The best score at each number of tokens per step, in ascending order of these."""
    best: dict[float, float] = {}
    for tokens, score in points:
        best[tokens] = max(score, best.get(tokens, -math.inf))
    return sorted(best.items())


def area(points: Sequence[Point]) -> float | None:
    """The mean score over the range of tokens per step: the area under the curve by its width; None below two places."""
    curve = frontier(points)
    width = curve[-1][0] - curve[0][0] if curve else 0.0
    if not width:
        return None
    total = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(curve))
    return total / width


def adaptive(points: Sequence[Point], loss: float = 1.0) -> float | None:
    """The most tokens per step whose score is at most `loss` points below that of the fewest.

    None where there is nothing to lose: without a point, or with a score of at most `loss` at the fewest.
    """
    curve = frontier(points)
    if not curve or curve[0][1] <= loss:
        return None
    return max(tokens for tokens, score in curve if score >= curve[0][1] - loss)
