"""How much quality a method may have lost, counting chance: an upper bound on a mean from few observations.

The bound holds for any number of observations and any distribution on [-1, 1], and at whatever moment one stops to look: it
bets against every loss that is too large until one of them would have made somebody rich (Waudby-Smith and Ramdas,
2010.09686, theorem 1, with a fixed mixture of bets). Without any observed loss it is near 3.7 / n at 95 percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hasten.errors import out_of_range

# Shares of all one owns that are bet, and how the capital is divided among them. The boldest bet is best while nothing is
# lost, and gone with the first full loss; the others bear losses and gains that cancel.
_BETS = np.array([1.0, 0.5, 0.25, 0.125, 0.0625])
_STAKES = np.array([0.5, 0.125, 0.125, 0.125, 0.125])
_TURNS = 40  # halvings of the interval: to 2e-12


def upper(losses: Sequence[float], alpha: float) -> float:
    """The least m such that, with probability 1 - alpha, the mean of what `losses` in [-1, 1] were drawn from is below m.

    1.0 where nothing can be said. Raises ConfigError for other values.
    """
    values, counts = _counted(losses, alpha)
    low, high = -1.0, 1.0
    for _ in range(_TURNS):
        middle = (low + high) / 2
        if _log_capital(values, counts, middle) >= -math.log(alpha):
            high = middle
        else:
            low = middle
    return high


def below(losses: Sequence[float], mean: float, alpha: float) -> bool:
    """Whether `upper(losses, alpha)` is at most `mean`, in [-1, 1), without working it out."""
    return _log_capital(*_counted(losses, alpha), mean) >= -math.log(alpha)


def lower(losses: Sequence[float], alpha: float) -> float:
    """The greatest m such that, with probability 1 - alpha, that mean is above m; -1.0 where nothing can be said."""
    return -upper([-one for one in losses], alpha)


def above(losses: Sequence[float], mean: float, alpha: float) -> bool:
    """Whether `lower(losses, alpha)` is at least `mean`, in (-1, 1]."""
    return below([-one for one in losses], -mean, alpha)


def _counted(losses: Sequence[float], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Different losses and how often each was seen."""
    if not 0 < alpha < 1:
        raise out_of_range("alpha", alpha, "above 0 and below 1")
    x = np.asarray(losses, dtype=np.float64)
    if x.size and not (np.abs(x) <= 1).all():
        raise out_of_range("losses", float(np.abs(x).max()), "in [-1, 1]")
    return np.unique(x, return_counts=True)


def _log_capital(values: np.ndarray, counts: np.ndarray, mean: float) -> float:
    """Logarithm of what a start of 1 has become by betting that the mean is less than `mean`, below 1."""
    with np.errstate(divide="ignore"):
        steps = np.log1p(_BETS[:, None] * (mean - values[None]) / (1 - mean))
    grown = np.log(_STAKES) + (steps * counts[None]).sum(1)
    most = float(grown.max())
    return most + math.log(float(np.exp(grown - most).sum()))
