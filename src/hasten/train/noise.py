"""Forward processes of discrete diffusion, their reverse kernels, and samplers that run them backwards.

A token keeps its value with probability alpha(t), which falls from 1 at t = 0 to 0 at t = 1, and is otherwise drawn from
pi: q(x_t | x_0) = alpha_t delta(x_0) + (1 - alpha_t) pi, with pi all on the mask (absorbing noise) or even (uniform noise).
Every formula is written with pi and holds for both (D3PM, 2107.03006; MDLM, 2406.07524; the survey, 2506.13759).

A predictor maps ids [B, L] to probabilities of the clean tokens [B, L, V], given the whole noisy row; one that is `timed`
takes the times [B] too. Probabilities of states are float64: near both ends of time they are ratios of small numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import ConfigError, IncompatibleError, out_of_range, unknown_name

Noise = Literal["absorbing", "uniform"]
Predictor = Callable[..., Tensor]
Time = Tensor | float
SCHEDULES = ("linear", "cosine", "cos2", "polynomial", "geometric")
_LOW, _HIGH = 1e-4, 20.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """The share alpha(t) of tokens kept at time t in [0, 1], by name; every method takes a number or a tensor of times.

    linear 1 - t, cosine 1 - cos(pi/2 (1 - t)), cos2 cos(pi/2 t)^2, polynomial 1 - t^power, geometric exp(-sigma) with
    sigma = low^(1 - t) high^t (SEDD, 2310.16834), stretched so that it runs from 1 to 0 exactly. Raises UnknownNameError
    for another name, ConfigError for a setting out of range, or one that the schedule does not have.
    """

    name: str = "linear"
    power: float = 1.0
    low: float = _LOW
    high: float = _HIGH

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise unknown_name("schedule", self.name, SCHEDULES)
        if not 0 < self.power < math.inf:
            raise out_of_range("power", self.power, "positive")
        if not 0 < self.low < self.high <= 100:
            raise out_of_range("low, high", (self.low, self.high), "0 < low < high <= 100")
        if self.power != 1 and self.name != "polynomial":
            raise out_of_range("power", self.power, f"1 for the {self.name} schedule", "name 'polynomial' has a power")
        if (self.low, self.high) != (_LOW, _HIGH) and self.name != "geometric":
            raise out_of_range("low, high", (self.low, self.high), f"left out for the {self.name} schedule")

    def alpha(self, t: Time) -> Tensor:
        """The share of tokens that are kept."""
        t = times(t)
        if self.name == "cosine":
            return 2 * torch.sin(math.pi / 4 * (1 - t)).square()
        if self.name == "cos2":
            return torch.sin(math.pi / 2 * (1 - t)).square()
        if self.name == "geometric":
            return (torch.exp(-self._sigma(t)) - math.exp(-self.high)) / self._span
        return 1 - t**self.power

    def noised(self, t: Time) -> Tensor:
        """1 - alpha, without the loss of digits near t = 0."""
        t = times(t)
        if self.name == "cosine":
            return torch.sin(math.pi / 2 * t)
        if self.name == "cos2":
            return torch.sin(math.pi / 2 * t).square()
        if self.name == "geometric":
            return -torch.expm1(self.low - self._sigma(t)) * (math.exp(-self.low) / self._span)
        return t**self.power

    def slope(self, t: Time) -> Tensor:
        """The derivative of alpha, at most 0."""
        t = times(t)
        if self.name == "cosine":
            return -math.pi / 2 * torch.cos(math.pi / 2 * t)
        if self.name == "cos2":
            return -math.pi / 2 * torch.sin(math.pi * t)
        if self.name == "geometric":
            sigma = self._sigma(t)
            return -math.log(self.high / self.low) * sigma * torch.exp(-sigma) / self._span
        return -self.power * t ** (self.power - 1)

    def weight(self, t: Time) -> Tensor:
        """-alpha' / (1 - alpha): what the cross-entropy of masked tokens counts in the bound; infinite at t = 0."""
        return -self.slope(t) / self.noised(t)

    def rate(self, t: Time) -> Tensor:
        """-alpha' / alpha: how often a token is drawn anew per unit of time (SEDD's sigma'); infinite at t = 1."""
        return -self.slope(t) / self.alpha(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.low ** (1 - t) * self.high**t

    @property
    def _span(self) -> float:
        return math.exp(-self.low) - math.exp(-self.high)


LINEAR = Schedule()


@dataclass(frozen=True, slots=True)
class Process:
    """Noise over `vocab` ids: absorbing into the id `mask`, or uniform. Times are one number, or one per row [B].

    Raises UnknownNameError for other noise, ConfigError for absorbing noise without a mask id or uniform noise with one.
    """

    noise: Noise
    vocab: int
    mask: int | None = None
    schedule: Schedule = LINEAR

    def __post_init__(self) -> None:
        if self.noise not in get_args(Noise):
            raise unknown_name("noise", self.noise, get_args(Noise))
        if self.vocab < 2:
            raise out_of_range("vocab", self.vocab, "at least 2")
        if self.noise == "uniform" and self.mask is not None:
            raise out_of_range("mask", self.mask, "none for uniform noise", "leave it out, or ask for absorbing noise")
        if self.noise == "absorbing" and self.mask is None:
            raise ConfigError("absorbing noise needs a mask id", hint=f"give mask, 0 to {self.vocab - 1}", field="mask")
        if self.mask is not None and not 0 <= self.mask < self.vocab:
            raise out_of_range("mask", self.mask, f"0 to {self.vocab - 1}")

    @property
    def limit(self) -> Tensor:
        """pi [V]: what tokens are drawn from when they are not kept."""
        if self.mask is None:
            return torch.full((self.vocab,), 1 / self.vocab, dtype=torch.float64)
        return F.one_hot(torch.tensor(self.mask), self.vocab).double()

    def start(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """Pure noise [B, L]: x at t = 1."""
        if self.mask is not None:
            return torch.full((rows, length), self.mask)
        return torch.randint(self.vocab, (rows, length), generator=generator)

    def draw(self, x_0: Tensor, t: Time, generator: torch.Generator, where: Tensor | None = None) -> Tensor:
        """x_t [B, L] given x_0; noise falls only on the places `where` [B, L] is true (a prompt's is not)."""
        gone = torch.rand(x_0.shape, generator=generator, dtype=torch.float64) < _column(self.schedule.noised(t), 2)
        if where is not None:
            gone = gone & where
        rows, length = x_0.shape
        return torch.where(gone, self.start(rows, length, generator), x_0)

    def likelihoods(self, x_t: Tensor, t: Time) -> Tensor:
        """q(x_t | x_0 = v) [B, L, V] for every v."""
        kept, gone = _column(self.schedule.alpha(t), 3), _column(self.schedule.noised(t), 3)
        return kept * F.one_hot(x_t, self.vocab) + gone * self.limit[x_t][..., None]

    def subs(self, x_t: Tensor, probs: Tensor) -> Tensor:
        """Predicted probabilities [B, L, V] as the noise allows: a mask is never predicted and what is known is copied.

        MDLM's SUBS; uniform noise allows everything.
        """
        if self.mask is None:
            return probs
        ban = torch.arange(self.vocab) == self.mask
        allowed = probs.masked_fill(ban, 0.0)
        allowed = allowed / allowed.sum(-1, keepdim=True)
        return torch.where((x_t == self.mask)[..., None], allowed, F.one_hot(x_t, self.vocab).to(probs.dtype))

    def reverse(self, x_t: Tensor, probs: Tensor, s: Time, t: Time) -> Tensor:
        """p(x_s | x_t) [B, L, V] for s < t: the posterior summed over predicted clean tokens `probs` [B, L, V].

        sum_v p(v) q(x_s | x_t, v), with q(x_s | x_t, v) = q(x_t | x_s) q(x_s | v) / q(x_t | v). `probs` are to be those of
        the clean token given all of x_t, also given the token at its own place. Raises ConfigError unless 0 <= s < t <= 1.
        """
        s, t = times(s), times(t)
        if not bool((s < t).all()):
            raise out_of_range("s", s.tolist(), f"below t = {t.tolist()}")
        probs = self.subs(x_t, probs)
        share = torch.where(probs > 0, probs / self.likelihoods(x_t, t), 0.0)
        kept = _column(self.schedule.alpha(t) / self.schedule.alpha(s), 3)
        now = F.one_hot(x_t, self.vocab)
        from_s = kept * now + (1 - kept) * self.limit[x_t][..., None]  # q(x_t | x_s)
        to_s = _column(self.schedule.alpha(s), 3) * share
        to_s = to_s + _column(self.schedule.noised(s), 3) * self.limit * share.sum(-1, keepdim=True)
        if self.mask is None:
            return from_s * to_s
        return torch.where((x_t == self.mask)[..., None], from_s * to_s, now.double())  # known even where alpha_t is 0

    def posterior(self, x_t: Tensor, x_0: Tensor, s: Time, t: Time) -> Tensor:
        """q(x_s | x_t, x_0) [B, L, V] for s < t; x_t must be one that x_0 can become."""
        return self.reverse(x_t, F.one_hot(x_0, self.vocab).double(), s, t)


def times(t: Time) -> Tensor:
    """t in float64; raises ConfigError outside [0, 1]."""
    t = torch.as_tensor(t, dtype=torch.float64)
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise out_of_range("t", t.tolist(), "in [0, 1]")
    return t


def _column(value: Tensor, ndim: int) -> Tensor:
    """A number, or one per row [B], shaped to multiply [B, L] or [B, L, V]."""
    return value.reshape(-1, *[1] * (ndim - 1))


def grid(steps: int) -> Tensor:
    """The times of a process of T = `steps` steps, [T + 1]: 0, 1/T, ..., 1."""
    if steps < 1:
        raise out_of_range("steps", steps, "at least 1")
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def spread_times(count: int, generator: torch.Generator, floor: float = 1e-3) -> Tensor:
    """Times [count] of low discrepancy: t_j = (u / n + j / n) mod 1, then (1 - floor) t + floor (MDLM)."""
    if count < 1:
        raise out_of_range("count", count, "at least 1")
    if not 0 <= floor < 1:
        raise out_of_range("floor", floor, "in [0, 1)")
    u = torch.rand(1, generator=generator, dtype=torch.float64)
    t = (u / count + torch.arange(count, dtype=torch.float64) / count) % 1
    return (1 - floor) * t + floor


def predicted(predict: Predictor, x_t: Tensor, t: Time, timed: bool) -> Tensor:
    """Probabilities [B, L, V] of a predictor; only a timed one hears of the times."""
    return predict(x_t, times(t).expand(len(x_t))) if timed else predict(x_t)


@torch.no_grad()
def ancestral(
    process: Process,
    predict: Predictor,
    x_1: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    timed: bool = False,
    fixed: Tensor | None = None,
) -> Tensor:
    """Clean rows [B, L] out of noise x_1 [B, L] in `steps` reverse steps on the even grid.

    Tokens of one step are drawn independently of each other, so that even exact predictions leave a bias, which falls as
    1 / steps. `fixed` [B, L] are places that stay as they are; under absorbing noise whatever is not masked does anyway.
    """
    x = x_1.clone()
    for t, s in pairwise(grid(steps).flip(0)):
        drawn = _pick(process.reverse(x, predicted(predict, x, t, timed), s, t), generator)
        x = drawn if fixed is None else torch.where(fixed, x, drawn)
    return x


@torch.no_grad()
def one_by_one(process: Process, predict: Predictor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Clean rows [B, L]: the masked tokens of x [B, L] are filled one per step, in random order; no bias at all.

    For predictors that are not timed. Raises IncompatibleError for uniform noise, which shows no token to be final.
    """
    if process.mask is None:
        raise IncompatibleError(
            "one_by_one and uniform noise: nothing tells which tokens are still to be drawn",
            hint="use ancestral with a fine grid",
            field="process",
        )
    x, rows = x.clone(), torch.arange(len(x))
    order = torch.rand(x.shape, generator=generator, dtype=torch.float64).masked_fill(x != process.mask, 2.0)
    for _ in range(int((x == process.mask).sum(1).max())):
        place = order.argmin(1)
        drawn = _pick(process.subs(x, predict(x))[rows, place][:, None], generator)[:, 0]
        x[rows, place] = drawn  # rows that are complete draw what stands there already
        order[rows, place] = 2.0
    return x


def _pick(probs: Tensor, generator: torch.Generator) -> Tensor:
    """A draw [B, L] from probs [B, L, V], by inverting their sums: several times as fast as torch.multinomial."""
    sums = probs.double().cumsum(-1)
    at = torch.rand(*probs.shape[:2], 1, generator=generator, dtype=torch.float64) * sums[..., -1:]
    return (sums <= at).sum(-1).clamp(max=probs.shape[-1] - 1)
