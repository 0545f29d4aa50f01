"""Losses of discrete diffusion from logits and a noisy state, and the bounds of the likelihood that they are.

Every loss gives nats per row [B] for one state x_t and time t. Its mean over times uniform in (0, 1) (`d3pm`: times T, over
the steps) and over states given x_0 is a negative evidence lower bound, for any logits; with exact conditionals it equals
-log p(x_0), for `d3pm` as T grows. `nelbo` estimates it. `mgdm` alone bounds nothing. The formulas are those of the survey
(2506.13759): D3PM 2107.03006, MDLM 2406.07524, SEDD 2310.16834, BD3-LM 2503.09573, MGDM 2410.14157.

The count form of masked diffusion and its estimate `nelbo`, per answer token, are in `objectives`, as are the forms that
`hasten train` has.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.errors import IncompatibleError, out_of_range, unknown_name
from hasten.train.mixture import Batch
from hasten.train.network import Network
from hasten.train.noise import Predictor, Process, Time, predicted, times
from hasten.train.objectives import LEVELS, block_means, focal, mask_blocks

Bound = Literal["mdlm", "d3pm", "sedd", "complementary"]
_EDGE = 1e-9  # how near to 0 and 1 the times of an estimate come, where weights are infinite


def token_losses(process: Process, logits: Tensor, x_t: Tensor, x_0: Tensor) -> Tensor:
    """-log p(x_0) [B, L] of logits [B, L, V]; 0 for tokens that absorbing noise has left as they were (SUBS)."""
    if process.mask is None:
        return -logits.log_softmax(-1).gather(-1, x_0[..., None])[..., 0]
    ban = torch.arange(process.vocab) == process.mask
    each = -logits.masked_fill(ban, -torch.inf).log_softmax(-1).gather(-1, x_0[..., None])[..., 0]
    return torch.where(x_t == process.mask, each, 0.0)


def mdlm(process: Process, logits: Tensor, x_t: Tensor, x_0: Tensor, t: Time) -> Tensor:
    """MDLM's loss [B] for any schedule: -alpha' / (1 - alpha) times the cross-entropy of the masked tokens.

    With the linear schedule it is LLaDA's, over 1 / t. Raises IncompatibleError for uniform noise, ConfigError at t = 0.
    """
    _absorbing(process, "mdlm")
    return process.schedule.weight(_inner(t, 1.0)) * token_losses(process, logits, x_t, x_0).sum(1)


def complementary(process: Process, logits: Tensor, others: Tensor, x_t: Tensor, x_0: Tensor, t: Time) -> Tensor:
    """The mean [B] of MDLM's losses of x_t and of its complement, in which what x_t shows is masked and the rest shown.

    `logits` [B, L, V] are those of x_t, `others` those of `complement`. A token masked with probability 1 - alpha is masked
    with alpha there, so that each counts -alpha' over its own; together the two cover every token once. Raises
    IncompatibleError for uniform noise.
    """
    _absorbing(process, "complementary")
    t = _inner(t)
    rest = process.schedule.rate(t) * token_losses(process, others, complement(process, x_t, x_0), x_0).sum(1)
    return (mdlm(process, logits, x_t, x_0, t) + rest) / 2


def complement(process: Process, x_t: Tensor, x_0: Tensor) -> Tensor:
    """The state [B, L] in which exactly those tokens of x_0 are masked that are not in x_t.

    Raises IncompatibleError for uniform noise.
    """
    mask = _absorbing(process, "complement")
    return torch.where(x_t == mask, x_0, mask)


def d3pm(process: Process, logits: Tensor, x_t: Tensor, x_0: Tensor, s: Time, t: Time, extra: float = 0.0) -> Tensor:
    """D3PM's loss [B] of the step from t to s: KL(q(x_s | x_t, x_0) || p(x_s | x_t)) + `extra` times the cross-entropy.

    p sums the posterior over the predicted tokens. At s = 0 it is -log p(x_0 | x_1), so that the sum over all steps is the
    whole bound; it is one only with `extra` 0. Raises ConfigError unless 0 <= s < t <= 1.
    """
    q = process.posterior(x_t, x_0, s, t)
    p = process.reverse(x_t, logits.double().softmax(-1), s, t)
    here = q > 0
    apart = torch.xlogy(q, q) - torch.xlogy(q, torch.where(here, p, 1.0))  # where q is 0, no gradient of log p either
    loss = apart.sum((1, 2))
    return loss + extra * token_losses(process, logits, x_t, x_0).sum(1) if extra else loss


def score_entropy(process: Process, score: Tensor, x_t: Tensor, x_0: Tensor, t: Time) -> Tensor:
    """SEDD's loss [B]: sum over y != x_t of Q_t(x_t, y) (s(y) - r log s(y) + r (log r - 1)), r = q(y | x_0) / q(x_t | x_0).

    `score` s [B, L, V] is positive, and any such s has a bound; what it says of x_t itself is not read. Q_t(x_t, y) is the
    rate from y to x_t. Raises ConfigError unless 0 < t < 1.
    """
    t = _inner(t)
    rate = process.schedule.rate(t).view(-1, 1, 1) * process.limit[x_t][..., None]
    symbols = torch.arange(process.vocab)
    kept, gone = (one.view(-1, 1, 1) for one in (process.schedule.alpha(t), process.schedule.noised(t)))
    from_x_0 = kept * (symbols == x_0[..., None]) + gone * process.limit  # q(y | x_0)
    ratio = from_x_0 / from_x_0.gather(-1, x_t[..., None])
    each = rate * (score - torch.xlogy(ratio, score) + torch.xlogy(ratio, ratio) - ratio)
    return torch.where((symbols != x_t[..., None]) & (rate > 0), each, 0.0).sum((1, 2))


def to_score(process: Process, probs: Tensor, x_t: Tensor, t: Time) -> Tensor:
    """The score [B, L, V] of predicted clean tokens [B, L, V], sum_v p(v) q(y | v) / q(x_t | v); 1 at y = x_t.

    For a masked token e^-sigma / (1 - e^-sigma) p(y), with e^-sigma = alpha. Raises ConfigError unless 0 < t < 1.
    """
    t = _inner(t)
    probs = process.subs(x_t, probs)
    share = torch.where(probs > 0, probs / process.likelihoods(x_t, t), 0.0)
    kept, gone = (one.view(-1, 1, 1) for one in (process.schedule.alpha(t), process.schedule.noised(t)))
    return kept * share + gone * process.limit * share.sum(-1, keepdim=True)


def from_score(process: Process, score: Tensor, x_t: Tensor, t: Time) -> Tensor:
    """The predicted clean tokens [B, L, V] that have this score [B, L, V]; the inverse of `to_score`.

    A score that belongs to no distribution gives one too: what is negative is cut off, the rest divided by its sum.
    Raises ConfigError unless 0 < t < 1.
    """
    t = _inner(t)
    score = torch.where(torch.arange(process.vocab) == x_t[..., None], 1.0, score)
    kept, gone = (one.view(-1, 1, 1) for one in (process.schedule.alpha(t), process.schedule.noised(t)))
    share = (score - gone * process.limit * score.sum(-1, keepdim=True)) / kept
    probs = (share * process.likelihoods(x_t, t)).clamp(min=0)
    return process.subs(x_t, probs / probs.sum(-1, keepdim=True))


def mgdm(
    process: Process,
    logits: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    level: Tensor,
    levels: int = LEVELS,
    *,
    scale: float = 0.25,
    power: float = 1.0,
    time: Literal["linear", "original"] = "linear",
) -> Tensor:
    """MGDM's loss [B]: `objectives.focal` token losses of states masked with probability `level` / `levels`, level in 1...

    A level k counts levels + 1 - k (`linear`), or 1 / k (`original`): then, with scale 1 and power 0, it is D3PM's and
    bounds; otherwise it does not. Raises IncompatibleError for uniform noise, ConfigError for other levels or times.
    """
    _absorbing(process, "mgdm")
    if time not in ("linear", "original"):
        raise unknown_name("time", time, ("linear", "original"))
    if bool(((level < 1) | (level > levels)).any()):
        raise out_of_range("level", level.tolist(), f"1 to {levels}")
    weight = levels + 1 - level.double() if time == "linear" else 1 / level.double()
    return weight * focal(token_losses(process, logits, x_t, x_0), scale, power).sum(1)


@torch.no_grad()
def nelbo(
    process: Process,
    predict: Predictor,
    x_0: Tensor,
    draws: int,
    generator: torch.Generator,
    bound: Bound = "mdlm",
    *,
    steps: int = 128,
    timed: bool = False,
) -> Tensor:
    """An estimate [B] of the bound of rows x_0 [B, L] in nats per row, from `draws` states of each, times spread evenly.

    Noise falls on every token: rows have no prompt. `steps` is the T of d3pm. Raises UnknownNameError for another bound,
    IncompatibleError where noise has none such.
    """
    if bound not in get_args(Bound):
        raise unknown_name("bound", bound, get_args(Bound))
    for name, value in (("draws", draws), ("steps", steps)):
        if value < 1:
            raise out_of_range(name, value, "at least 1")
    if bound == "complementary" and timed:
        raise IncompatibleError(
            "a complementary bound and a timed predictor: the complement has no time of its own",
            hint="use mdlm",
            field="bound",
        )
    first = torch.rand(len(x_0), generator=generator, dtype=torch.float64)
    total = torch.zeros(len(x_0), dtype=torch.float64)
    for j in range(draws):
        t = ((first + j) / draws).clamp(_EDGE, 1 - _EDGE)
        if bound == "d3pm":
            k = (t * steps).ceil()
            s, t = (k - 1) / steps, k / steps
        x_t = process.draw(x_0, t, generator)
        probs = predicted(predict, x_t, t, timed)
        if bound == "mdlm":
            total += mdlm(process, probs.log(), x_t, x_0, t)
        elif bound == "d3pm":
            total += steps * d3pm(process, probs.log(), x_t, x_0, s, t)
        elif bound == "sedd":
            total += score_entropy(process, to_score(process, probs, x_t, t), x_t, x_0, t)
        else:
            others = predict(complement(process, x_t, x_0))
            total += complementary(process, probs.log(), others.log(), x_t, x_0, t)
    return total / draws


@torch.no_grad()
def block_nelbo(network: Network, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
    """An estimate [B] of BD3-LM's bound in nats per row: the count form of every block, times its answer tokens, summed."""
    if draws < 1:
        raise out_of_range("draws", draws, "at least 1")
    block, length = network.shape.block, batch.ids.shape[1]
    even = Batch(batch.ids, batch.answer, batch.known, batch.answer.float())
    of = torch.arange(length).div(block, rounding_mode="floor").expand(batch.ids.shape)
    tokens = torch.zeros(len(batch.ids), -(-length // block)).scatter_add(1, of, even.weights)
    total = torch.zeros(len(batch.ids))
    for _ in range(draws):
        mean, _ = block_means(network, even, mask_blocks(even, block, generator))
        total += (mean * tokens).sum(1)
    return total / draws


def _absorbing(process: Process, what: str) -> int:
    """The mask id; raises IncompatibleError where there is none."""
    if process.mask is None:
        raise IncompatibleError(
            f"{what} and uniform noise: it masks nothing", hint="use d3pm or score_entropy (sedd)", field="process"
        )
    return process.mask


def _inner(t: Time, last: float = 1 - _EDGE / 2) -> Tensor:
    """t in float64, above 0 and at most `last`, where weights are finite."""
    t = times(t)
    if not bool(((t > 0) & (t <= last)).all()):
        raise out_of_range("t", t.tolist(), "above 0" + (" and below 1" if last < 1 else ""), "d3pm takes the ends too")
    return t
