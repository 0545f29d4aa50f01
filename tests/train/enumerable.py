"""A toy law of rows of four tokens out of three symbols: everything about it is summed over, nothing is sampled.

Under absorbing noise the symbols are the ids 0, 2 and 3 around the mask 1, which is that of the small models; under uniform
noise 0 to 2. Predictors are tables over all states.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from hasten.train import alphabet, bounds
from hasten.train.mixture import Batch
from hasten.train.noise import Process, Schedule

LENGTH, SYMBOLS = 4, 3
MASK = alphabet.MASK
DIGITS = torch.cartesian_prod(*[torch.arange(SYMBOLS)] * LENGTH)  # all rows, in digits
ROWS = {"absorbing": torch.tensor([0, 2, 3])[DIGITS], "uniform": DIGITS}  # and in ids
LAW = (2 * torch.randn(len(DIGITS), dtype=torch.float64, generator=torch.Generator().manual_seed(7))).softmax(0)
NLL = -LAW.log()
ENTROPY = float((LAW * NLL).sum())
HIDDEN = torch.cartesian_prod(*[torch.tensor([False, True])] * LENGTH)  # all subsets of places
STATES = {noise: torch.cartesian_prod(*[torch.arange(v)] * LENGTH) for noise, v in (("absorbing", 4), ("uniform", 3))}
SAME = (DIGITS[:, None] == DIGITS[None, :]).sum(-1).double()  # places at which two rows agree


def process(noise: str, schedule: str = "linear", **settings) -> Process:
    """Noise over the toy's ids."""
    named = Schedule(schedule, **settings)
    return Process("absorbing", 4, MASK, named) if noise == "absorbing" else Process("uniform", 3, schedule=named)


def number(x: Tensor, vocab: int) -> Tensor:
    """Where states x [B, 4] stand in STATES."""
    return (x * vocab ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)


# --- predictors: tables [states, 4, V] ---


def conditionals(law: Tensor = LAW) -> Tensor:
    """The exact p(x_0,i | what is not masked) for every state [256, 4, 4]."""
    states, rows = STATES["absorbing"], ROWS["absorbing"]
    fits = ((states[:, None] == MASK) | (states[:, None] == rows)).all(-1) * law  # [256, 81]
    table = torch.stack([(fits[:, :, None] * (rows == v)).sum(1) for v in range(4)], -1)
    return table / table.sum(-1, keepdim=True)


def guesses(noise: str, seed: int = 0) -> Tensor:
    """Random probabilities for every state [states, 4, V]."""
    vocab = 4 if noise == "absorbing" else 3
    table = torch.randn(vocab**LENGTH, LENGTH, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if noise == "absorbing":
        table[..., MASK] = -torch.inf
    return (1.5 * table).softmax(-1)


def reader(table: Tensor) -> Callable[[Tensor], Tensor]:
    """A predictor out of a table."""
    return lambda x: table[number(x, table.shape[-1])]


def alpha_of(one: Process, t: float) -> float:
    """alpha at t."""
    return float(one.schedule.alpha(t))


def uniform_conditionals(one: Process, t: float, law: Tensor = LAW) -> Tensor:
    """The exact p(x_0,i | x_t) under uniform noise at time t, for every state [81, 4, 3]."""
    other = (1 - alpha_of(one, t)) / SYMBOLS
    joint = law * (1 - (SYMBOLS - 1) * other) ** SAME * other ** (LENGTH - SAME)  # [x_t, x_0]
    posterior = joint / joint.sum(1, keepdim=True)
    return torch.stack([(posterior[:, :, None] * DIGITS.eq(v)).sum(1) for v in range(SYMBOLS)], -1)


def by_time(table: Callable[[float], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A timed predictor out of a table for every time."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        found = torch.empty(*x.shape, SYMBOLS, dtype=torch.float64)
        for one in t.unique():
            at = t == one
            found[at] = table(float(one))[number(x[at], SYMBOLS)]
        return found

    return predict


def oracle(one: Process) -> tuple[Callable[..., Tensor], bool]:
    """(the exact predictor, whether it is timed)."""
    if one.mask is not None:
        return reader(conditionals()), False
    return by_time(lambda t: uniform_conditionals(one, t)), True


def guesser(one: Process, seed: int = 0) -> tuple[Callable[..., Tensor], bool]:
    """(a wrong predictor, whether it is timed); of uniform noise it knows that most tokens are clean early on."""
    wrong = guesses(one.noise, seed)
    if one.mask is not None:
        return reader(wrong), False

    def table(t: float) -> Tensor:
        tilted = wrong * one.likelihoods(STATES["uniform"], t)
        return tilted / tilted.sum(-1, keepdim=True)

    return by_time(table), True


# --- exact expectations ---


def nodes(count: int) -> list[tuple[float, float]]:
    """(t, weight) of Gauss and Legendre's rule on (0, 1), exact for polynomials of degree 2 count - 1."""
    matrix = torch.zeros(count, count, dtype=torch.float64)
    k = torch.arange(1, count, dtype=torch.float64)
    matrix.diagonal(1).copy_(k / (4 * k * k - 1).sqrt())
    values, vectors = torch.linalg.eigh(matrix + matrix.T)
    return [((float(x) + 1) / 2, float(w)) for x, w in zip(values, vectors[0].square())]


def smooth(count: int) -> list[tuple[float, float]]:
    """The rule after t = 3 u^2 - 2 u^3, for what has logarithms at the ends of time."""
    return [(u * u * (3 - 2 * u), w * 6 * u * (1 - u)) for u, w in nodes(count)]


def noisy(one: Process, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x_0, x_t, q(x_t | x_0)) for every row and every state that it can become, row by row [81 n]."""
    rows = ROWS[one.noise]
    if one.mask is not None:
        x_0, hidden = rows.repeat_interleave(16, 0), HIDDEN.repeat(81, 1)
        gone = 1 - alpha_of(one, t)
        k = hidden.sum(1).double()
        return x_0, x_0.masked_fill(hidden, MASK), gone**k * (1 - gone) ** (LENGTH - k)
    other = (1 - alpha_of(one, t)) / SYMBOLS
    chance = (1 - (SYMBOLS - 1) * other) ** SAME * other ** (LENGTH - SAME)
    return rows.repeat_interleave(81, 0), rows.repeat(81, 1), chance.flatten()


def mean_loss(one: Process, t: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of loss(x_t, x_0) [B] over states at time t, for every row [81]."""
    x_0, x_t, chance = noisy(one, t)
    possible = chance > 0
    value = torch.zeros(len(chance), dtype=torch.float64)
    value[possible] = chance[possible] * loss(x_t[possible], x_0[possible]).double()
    return value.view(81, -1).sum(1)


def law_of(one: Process, predict: Callable[..., Tensor], steps: int, timed: bool) -> Tensor:
    """The exact law [81] of what the ancestral sampler writes: its chain of states, multiplied out."""
    states = STATES[one.noise]
    at = torch.zeros(len(states), dtype=torch.float64)
    if one.mask is not None:
        at[number(torch.full((1, LENGTH), MASK), 4)] = 1
    else:
        at[:] = 1 / len(states)
    for k in range(steps, 0, -1):
        t = torch.full((len(states),), k / steps, dtype=torch.float64)
        kernel = one.reverse(states, predict(states, t) if timed else predict(states), (k - 1) / steps, k / steps)
        step = torch.ones(len(states), len(states), dtype=torch.float64)
        for i in range(LENGTH):
            step = step * kernel[:, i][:, states[:, i]]
        at = at @ step
    return at[number(ROWS[one.noise], one.vocab)]


def variation(one: Tensor, other: Tensor) -> float:
    """Total variation between laws."""
    return float((one - other).abs().sum() / 2)


def close(one: Tensor, other: Tensor, within: float) -> bool:
    """Whether no entry differs by more."""
    return float((one - other).abs().max()) < within


def frequencies(x: Tensor, one: Process) -> Tensor:
    """How often each row [81] is among x [B, 4]."""
    place = {int(n): i for i, n in enumerate(number(ROWS[one.noise], one.vocab))}
    counts = torch.zeros(81, dtype=torch.float64)
    for n, count in zip(*number(x, one.vocab).unique(return_counts=True)):
        counts[place[int(n)]] = count
    return counts / len(x)


def timed_at(predict: Callable[..., Tensor], timed: bool, x: Tensor, t: float) -> Tensor:
    """What a predictor says of x at a time."""
    return predict(x, torch.full((len(x),), t, dtype=torch.float64)) if timed else predict(x)


# --- exact bounds of every row [81] ---


def mdlm(one: Process, predict, rule=None, weigh: Process | None = None) -> Tensor:
    """The exact mask bound; `weigh` takes the weights from another process than the states."""
    other = weigh or one
    rule = nodes(LENGTH) if rule is None else rule
    return sum(w * mean_loss(one, t, lambda x, y, t=t: bounds.mdlm(other, predict(x).log(), x, y, t)) for t, w in rule)


def d3pm(one: Process, predict, timed: bool, steps: int) -> Tensor:
    def step(k: int):
        s, t = (k - 1) / steps, k / steps
        return mean_loss(one, t, lambda x, y: bounds.d3pm(one, timed_at(predict, timed, x, t).log(), x, y, s, t))

    return sum(step(k) for k in range(1, steps + 1))


def sedd(one: Process, score, rule) -> Tensor:
    return sum(w * mean_loss(one, t, lambda x, y, t=t: bounds.score_entropy(one, score(x, t), x, y, t)) for t, w in rule)


def scored(one: Process, predict, timed: bool):
    return lambda x, t: bounds.to_score(one, timed_at(predict, timed, x, t), x, t)


def complementary(one: Process, predict, rule) -> Tensor:
    def value(t: float):
        def loss(x, y):
            others = predict(bounds.complement(one, x, y))
            return bounds.complementary(one, predict(x).log(), others.log(), x, y, t)

        return mean_loss(one, t, loss)

    return sum(w * value(t) for t, w in rule)


# --- the toy as a network of `objectives` ---


class Sighted:
    """A table as a network: it predicts every place from what its query sees, whichever keys these are."""

    def __init__(self, table: Tensor, block: int = LENGTH, kind: str = "block") -> None:
        self.table, self.shape = table, SimpleNamespace(block=block, shift=False, kind=kind)

    def __call__(self, ids: Tensor, known=None, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        count, length = ids.shape
        places = torch.arange(length) if positions is None else positions
        mask = torch.ones(length, length, dtype=torch.bool) if mask is None else mask
        states = torch.full((count, length, LENGTH), MASK)
        for query in range(length):
            for key in mask[query].nonzero().flatten():
                token = ids[:, key]
                states[:, query, places[key]] = torch.where(token == MASK, states[:, query, places[key]], token)
        each = self.table[number(states, 4)]  # [B, length, 4 places, V]
        return each[:, torch.arange(length), places].log()

    def logits(self, states: Tensor) -> Tensor:
        return states


def batch(rows: Tensor) -> Batch:
    """Rows [B, 4] whose every token is an answer."""
    every = torch.ones_like(rows, dtype=torch.bool)
    return Batch(rows, every, every, every.float())
