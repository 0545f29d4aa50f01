"""Losses that align a draft model's distribution q with its target's p, and what they are for: the expected acceptance.

Speculative sampling accepts a token with chance sum_x min(p, q) = 1 - TVD. The gradient of TVD is a policy gradient,
-E_q[r grad log q], with the reward r(x) = 1 where p(x) > q(x) and 0 elsewhere. TVD++ (2403.00858) standardises it:
A = (r - mean) / deviation. In expectation over the whole vocabulary the mean cancels (E_q[grad log q] = 0), so that TVD++
is TVD with a scale that adapts; only where tokens are sampled does the mean lower the variance.

`p` [..., V] holds the target's probabilities of the V tokens that can be drafted. They may sum to less than 1 (the rest
lies outside a reduced vocabulary, where q is 0), and everything here is then still that of the whole vocabulary, but for
the statistics of r, which are taken over the V tokens. Differences are taken of probabilities; p / q is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from hasten.errors import ConfigError, HastenError, out_of_range

_EPS = 1e-6  # beside the deviation of the reward, which is 0 where p == q


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss by name with its settings; call it with p and the draft's logits.

    `expectation` "full" takes E_q over the vocabulary, "sampled" over `samples` tokens drawn from q per position. `stats`:
    mean and deviation of the reward over the whole "batch" of a step, or of each "position". `kld` mixes that share of the
    KL divergence in, for drafters that as yet hardly overlap with the target (the gradient of TVD then vanishes).
    `baseline` False leaves the mean out, for comparisons.
    """

    name: str = "tvdpp"
    expectation: Literal["full", "sampled"] = "full"
    stats: Literal["batch", "position"] = "batch"
    samples: int = 8
    kld: float = 0.0
    baseline: bool = True

    def __post_init__(self) -> None:
        choices = {"name": tuple(LOSSES), "expectation": ("full", "sampled"), "stats": ("batch", "position")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise out_of_range(f"loss.{field}", getattr(self, field), "one of " + ", ".join(allowed))
        if self.samples < 1:
            raise out_of_range("loss.samples", self.samples, "at least 1")
        if not 0.0 <= self.kld <= 1.0:
            raise out_of_range("loss.kld", self.kld, "in [0, 1]")

    def __call__(
        self, p: Tensor, logits: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss, a scalar, of p and draft logits [..., V] at the positions where `mask` bool [...] is true.

        Raises ConfigError for other vocabularies or an empty mask, HastenError for teachers that are not finite.
        """
        p, log_q = positions(p, logits, mask)
        value = LOSSES[self.name](p, log_q, self, generator)
        return value if not self.kld else self.kld * kld(p, log_q, self) + (1 - self.kld) * value


def positions(p: Tensor, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(p, log q) [N, V] in float32 (or float64, if that is given) at the masked positions; raises as `Objective` does."""
    if p.shape != logits.shape:
        raise ConfigError(
            f"the target's probabilities have shape {tuple(p.shape)} and the draft's logits {tuple(logits.shape)}; both "
            "must cover the same tokens",
            hint="give the drafter the target's vocabulary",
            field="vocab",
        )
    if mask is None:
        p, logits = p.flatten(0, -2).detach(), logits.flatten(0, -2)
    else:
        p, logits = p[mask.bool()].detach(), logits[mask.bool()]
    if not len(p):
        raise ConfigError("no position is left to learn from: the mask of answer tokens is empty", field="mask")
    if not bool(torch.isfinite(p.sum())):
        raise HastenError("the target's probabilities are not finite", hint="check the model file; try dtype='float32'")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return p.to(wide.dtype), wide.log_softmax(-1)


def acceptance(p: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over positions of sum_x min(p, q): the chance that a sampled draft token is accepted."""
    p, log_q = positions(p, logits, mask)
    return torch.minimum(p, log_q.exp()).sum(-1).mean()


def kld(p: Tensor, log_q: Tensor, objective: Objective, generator: torch.Generator | None = None) -> Tensor:
    """sum_x p log(p / q), the mean over positions."""
    return (torch.xlogy(p, p) - p * log_q).sum(-1).mean()


def tvd(p: Tensor, log_q: Tensor, objective: Objective, generator: torch.Generator | None = None) -> Tensor:
    """1 - sum_x min(p, q), the mean over positions; where p == q nothing is rewarded."""
    q = log_q.exp()
    return 1 - torch.where(q < p, q, p).sum(-1).mean()


def tvdpp(p: Tensor, log_q: Tensor, objective: Objective, generator: torch.Generator | None = None) -> Tensor:
    """-E_q[A log q] as something to differentiate: its value says nothing, its gradient is that of TVD, standardised."""
    q = log_q.exp()
    reward = (p > q.detach()).to(q.dtype)
    over = None if objective.stats == "batch" else -1
    deviation = reward.std(over, correction=0, keepdim=over is not None) + _EPS
    mean = reward.mean(over, keepdim=True) if over is not None else reward.mean()
    advantage = (reward - mean if objective.baseline else reward) / deviation
    if objective.expectation == "full":
        return -(q * advantage).sum(-1).mean()
    drawn = torch.multinomial(q.detach(), objective.samples, replacement=True, generator=generator)
    return -(advantage.gather(-1, drawn) * log_q.gather(-1, drawn)).mean()


Loss = Callable[[Tensor, Tensor, "Objective", "torch.Generator | None"], Tensor]
LOSSES: Mapping[str, Loss] = MappingProxyType({"tvdpp": tvdpp, "tvd": tvd, "kld": kld})
