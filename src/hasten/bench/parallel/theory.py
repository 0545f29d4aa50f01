"""What decoding several tokens at once must cost: total correlation, bounds, chances of a right answer; exact.

Of ParallelBench (2510.04767): a model that emits the tokens Y of one step independently is at least
C(Y|X) = sum_i H(y_i|X) - H(Y|X) away from the truth (KL, nats), and with steps S_1..S_T at least
sum_t E[C(S_t | X, S_<t)]. A `Law` is the uniform distribution over the right answers of one question, so everything here is
counted, not estimated. The closed forms are for exact conditionals, temperature 1 and steps over random positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

from hasten.errors import out_of_range

Steps = Sequence[Sequence[int]]  # which places each step fills
_ANSWERS = 50_000  # of one law at most: 8! orders fit
_PLACES = 8  # of a law whose best steps are searched for: 3^8 pairs of subsets


@dataclass(frozen=True, eq=False)
class Law:
    """The uniform distribution over `answers` int [A, L], different rows of indices into `pieces` (one token each).

    Raises ConfigError for no answers, equal ones, or too many.
    """

    answers: NDArray[np.int64]
    pieces: tuple[str, ...]

    def __post_init__(self) -> None:
        rows = self.answers
        if rows.ndim != 2 or not 1 <= len(rows) <= _ANSWERS or not rows.shape[1]:
            raise out_of_range("answers", rows.shape, f"1 to {_ANSWERS} rows of at least one place")
        if len(np.unique(rows, axis=0)) < len(rows):
            raise out_of_range("answers", rows.shape, "different rows")

    @classmethod
    def of(cls, answers: Sequence[Sequence[str]]) -> Law:
        """The law over answers of equally many pieces; raises ConfigError where their numbers differ."""
        if len({len(answer) for answer in answers}) > 1:
            raise out_of_range("answers", sorted({len(answer) for answer in answers}), "of one length")
        pieces = tuple(dict.fromkeys(piece for answer in answers for piece in answer))
        index = {piece: i for i, piece in enumerate(pieces)}
        return cls(np.array([[index[piece] for piece in answer] for answer in answers]), pieces)

    @property
    def places(self) -> int:
        """L, the number of tokens of an answer."""
        return int(self.answers.shape[1])

    @cached_property
    def hot(self) -> NDArray[np.float32]:
        """The answers as 0 and 1, [A, L * V]."""
        return np.eye(len(self.pieces), dtype=np.float32)[self.answers].reshape(len(self.answers), -1)

    @cached_property
    def marginals(self) -> NDArray[np.float32]:
        """p(y_i) float [L, V]."""
        return self.hot.mean(0).reshape(self.places, -1)

    def conditional(self, committed: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(p(y_i | what is committed) [D, L, V], whether an answer fits [D]) for D states `committed` [D, L], -1 = open.

        Where no answer fits any more the marginals are given: the answer is wrong whatever follows.
        """
        open_ = committed < 0
        fits = np.ones((len(committed), len(self.answers)), dtype=bool)
        for place in range(self.places):
            fits &= open_[:, place, None] | (committed[:, place, None] == self.answers[None, :, place])
        count = fits.sum(1)
        probs = (fits.astype(np.float32) @ self.hot).reshape(len(committed), self.places, -1)
        probs /= np.maximum(count, 1)[:, None, None]
        probs[count == 0] = self.marginals
        return probs, count > 0

    def entropy(self, places: Sequence[int]) -> float:
        """H of these places together, in nats."""
        if not len(places):
            return 0.0
        share = np.unique(self.answers[:, list(places)], axis=0, return_counts=True)[1] / len(self.answers)
        return float(-(share * np.log(share)).sum())

    def total_correlation(self, places: Sequence[int] | None = None, given: Sequence[int] = ()) -> float:
        """E[C(places | given)] in nats; all places without an argument. E over what stands at `given`."""
        chosen, known = list(range(self.places) if places is None else places), list(given)
        base = self.entropy(known)
        alone = sum(self.entropy([*known, place]) - base for place in chosen)
        return max(0.0, alone - (self.entropy([*known, *chosen]) - base))

    def bound(self, steps: Steps) -> float:
        """The least KL in nats of any model that fills these places step by step: sum_t E[C(S_t | S_<t)].

        Raises ConfigError unless every place is in exactly one step.
        """
        self._check(steps)
        total, known = 0.0, list[int]()
        for step in steps:
            total += self.total_correlation(step, known)
            known += step
        return total

    def best(self, count: int) -> tuple[float, tuple[tuple[int, ...], ...]]:
        """(least bound, its steps) over all ways to fill the places in `count` steps; at most 8 places."""
        if self.places > _PLACES:
            raise out_of_range("places", self.places, f"at most {_PLACES}, of which all divisions are tried")
        if not 1 <= count <= self.places:
            raise out_of_range("steps", count, f"in [1, {self.places}]")
        entropy = {chosen: self.entropy(chosen) for chosen in _subsets(range(self.places))}

        def cost(known: tuple[int, ...], step: tuple[int, ...]) -> float:
            both = {one: entropy[tuple(sorted((*known, *one)))] for one in (step, *((i,) for i in step))}
            return max(0.0, sum(both[i,] - entropy[known] for i in step) - both[step] + entropy[known])

        @cache
        def least(known: tuple[int, ...], left: int) -> tuple[float, tuple[tuple[int, ...], ...]]:
            rest = [i for i in range(self.places) if i not in known]
            if left == 1:
                return cost(known, tuple(rest)), (tuple(rest),)
            found: list[tuple[float, tuple[tuple[int, ...], ...]]] = []
            for step in _subsets(rest):
                if step and len(rest) - len(step) >= left - 1:
                    later = least(tuple(sorted((*known, *step))), left - 1)
                    found.append((cost(known, step) + later[0], (step, *later[1])))
            return min(found)

        return least((), count)

    def validity(self, steps: Steps | None = None) -> float:
        """The chance that sampling with exact conditionals in these steps gives a right answer; one step by default.

        sum over right answers y of prod_t prod_(i in S_t) p(y_i | y_S<t). At least exp(-bound), by Jensen; equal to it
        where all right answers are equally likely to be drawn.
        """
        steps = [range(self.places)] if steps is None else steps
        self._check(steps)
        chance, known = np.ones(len(self.answers)), list[int]()
        for step in steps:
            before = self._same(known)
            for place in step:
                chance *= self._same([*known, place]) / before
            known += step
        return float(chance.sum())

    def _same(self, places: Sequence[int]) -> NDArray[np.int64]:
        """How many answers agree with each answer at these places, [A]."""
        if not places:
            return np.full(len(self.answers), len(self.answers))
        _, which, count = np.unique(self.answers[:, places], axis=0, return_inverse=True, return_counts=True)
        return np.asarray(count[which.reshape(-1)])

    def _check(self, steps: Steps) -> None:
        if sorted(place for step in steps for place in step) != list(range(self.places)):
            raise out_of_range("steps", [list(step) for step in steps], f"a division of the places 0 to {self.places - 1}")


def _subsets(places: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for size in range(len(places) + 1):
        yield from combinations(places, size)


def shuffle_law(n: int) -> Law:
    """All orders of n different items (1 to 8), the given one included."""
    if not 1 <= n <= 8:
        raise out_of_range("n", n, "in [1, 8]")
    return Law.of([[str(i) for i in order] for order in permutations(range(n))])


def replace_random_law(n: int) -> Law:
    """n items, one of which, any one, is replaced by a new one."""
    if not 1 <= n <= 64:
        raise out_of_range("n", n, "in [1, 64]")
    return Law.of([["new" if i == at else str(i) for i in range(n)] for at in range(n)])


def quotas(n: int, per_step: int) -> tuple[int, ...]:
    """Steps of `per_step` tokens for n of them, the last step what is left; raises ConfigError below one token."""
    if not 1 <= per_step <= n:
        raise out_of_range("per_step", per_step, f"in [1, {n}]")
    return tuple(min(per_step, n - done) for done in range(0, n, per_step))


def _checked(n: int, steps: Sequence[int]) -> Sequence[int]:
    if sum(steps) != n or min(steps, default=0) < 1:
        raise out_of_range("steps", list(steps), f"positive numbers that sum to {n}")
    return steps


def shuffle_correlation(n: int) -> float:
    """C of writing n different items in any order: n ln n - ln n! nats."""
    return n * math.log(n) - math.lgamma(n + 1)


def replace_random_correlation(n: int) -> float:
    """C of replacing any one of n items by a new one: (n - 1) ln(n / (n - 1)) nats."""
    return (n - 1) * math.log(n / (n - 1)) if n > 1 else 0.0


def shuffle_validity(n: int, steps: Sequence[int]) -> float:
    """The chance that n items in any order come out right with these numbers of tokens per step.

    The product over steps of m! / ((m - k)! m^k) with m items left and k tokens in the step.
    """
    chance, left = 1.0, n
    for k in _checked(n, steps):
        chance *= math.perm(left, k) / left**k
        left -= k
    return chance


def replace_random_validity(n: int, steps: Sequence[int]) -> float:
    """The chance that exactly one of n items comes out replaced, with these numbers of tokens per step, random positions.

    g(m) = k q (1 - q)^(k - 1) + (1 - q)^k g(m - k) with q = 1/m and m items left, g(0) = 0.
    """
    chance, kept, left = 0.0, 1.0, n
    for k in _checked(n, steps):
        q = 1 / left
        chance += kept * k * q * (1 - q) ** (k - 1)
        kept *= (1 - q) ** k
        left -= k
    return chance
