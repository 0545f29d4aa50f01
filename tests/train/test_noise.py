"""Noise: schedules, Bayes' rule over all states, times, and samplers whose law is known exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from enumerable import (
    LAW,
    LENGTH,
    MASK,
    conditionals,
    frequencies,
    guesser,
    law_of,
    oracle,
    process,
    reader,
    variation,
)

from hasten.errors import ConfigError, IncompatibleError, UnknownNameError
from hasten.train.noise import SCHEDULES, Process, Schedule, ancestral, grid, one_by_one, spread_times

DRAWS = 50_000


def schedule(name: str) -> Schedule:
    return Schedule(name, power=2.5) if name == "polynomial" else Schedule(name)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- schedules ---


def plain(name: str, t: float) -> float:
    """alpha as it is written."""
    sigma = 1e-4 ** (1 - t) * 20**t
    first, last = math.exp(-1e-4), math.exp(-20)
    return {
        "linear": 1 - t,
        "cosine": 1 - math.cos(math.pi / 2 * (1 - t)),
        "cos2": math.cos(math.pi / 2 * t) ** 2,
        "polynomial": 1 - t**2.5,
        "geometric": (math.exp(-sigma) - last) / (first - last),
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_from_one_to_zero_with_its_derivative(name):
    one = schedule(name)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    alpha = one.alpha(t)
    assert (float(one.alpha(0)), float(one.alpha(1))) == pytest.approx((1, 0), abs=1e-15)
    assert alpha.tolist() == pytest.approx([plain(name, x) for x in t.tolist()], abs=1e-14)
    assert (alpha.diff() < 0).all()
    assert torch.allclose(one.noised(t), 1 - alpha, atol=1e-14)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    assert torch.allclose(one.slope(t), slope, rtol=1e-10)
    assert torch.allclose(one.weight(t), -slope / (1 - alpha), rtol=1e-9)
    assert torch.allclose(one.rate(t), -slope / alpha, rtol=1e-9)
    assert torch.isfinite(one.weight(1e-12))
    assert float(one.noised(1e-12)) > 0, "digits are kept near 0"


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"name": "cosin"}, "schedule"),
        ({"name": "polynomial", "power": 0.0}, "power"),
        ({"name": "cosine", "power": 2.0}, "power"),
        ({"name": "geometric", "low": 0.0}, "low"),
        ({"name": "geometric", "low": 3.0, "high": 2.0}, "low"),
        ({"name": "linear", "low": 1e-3}, "low"),
    ],
)
def test_a_bad_schedule_is_refused(bad, field):
    with pytest.raises(ConfigError, match=field):
        Schedule(**bad)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"noise": "gaussian", "vocab": 4}, "noise"),
        ({"noise": "absorbing", "vocab": 4}, "mask"),
        ({"noise": "absorbing", "vocab": 4, "mask": 4}, "mask"),
        ({"noise": "uniform", "vocab": 4, "mask": 1}, "mask"),
        ({"noise": "uniform", "vocab": 1}, "vocab"),
    ],
)
def test_a_bad_process_is_refused(bad, field):
    with pytest.raises(ConfigError, match=field):
        Process(**bad)
    if field == "noise":
        with pytest.raises(UnknownNameError):
            Process(**bad)


# --- states ---


def moves(one: Process, s: float, t: float) -> torch.Tensor:
    """q(x_t | x_s) for all pairs [V, V], as a matrix built entry by entry."""
    kept = float(one.schedule.alpha(t) / one.schedule.alpha(s))
    matrix = torch.zeros(one.vocab, one.vocab, dtype=torch.float64)
    for a in range(one.vocab):
        for b in range(one.vocab):
            drawn = 1 / one.vocab if one.noise == "uniform" else float(b == one.mask)
            matrix[a, b] = kept * (a == b) + (1 - kept) * drawn
    return matrix


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_draws_have_the_frequencies_of_the_process(noise, name):
    one = process(noise, name, **({"power": 2.5} if name == "polynomial" else {}))
    t = torch.tensor([0.3, 0.7]).repeat(10_000)
    x_0 = torch.tensor([2, 0, 2, 2]).expand(len(t), 4)
    where = torch.tensor([True, True, True, False]).expand(len(t), 4)
    x_t = one.draw(x_0, t, seeded(), where)
    assert (x_t[:, 3] == 2).all()
    for i, time in enumerate((0.3, 0.7)):
        expected = moves(one, 0.0, time)
        assert torch.allclose(one.likelihoods(torch.tensor([[0, 1, 2]]), time)[0], expected[:, :3].T, atol=1e-12)
        for place in range(3):
            found = torch.bincount(x_t[i::2, place], minlength=one.vocab) / 10_000
            assert (found - expected[int(x_0[0, place])]).abs().max() < 0.02
    pure = one.draw(x_0, 1.0, seeded())
    assert torch.bincount(pure.flatten(), minlength=one.vocab).div(80_000).sub(one.limit).abs().max() < 0.01


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.2, 0.4), (0.5, 1.0), (0.0, 1.0)])
def test_the_posterior_is_bayes_rule(noise, s, t):
    one = process(noise, "cosine")
    whole, first, second = moves(one, 0.0, t), moves(one, 0.0, s), moves(one, s, t)
    clean = [v for v in range(one.vocab) if v != one.mask]
    for x_0 in clean:
        back = torch.zeros(one.vocab, dtype=torch.float64)
        for x_t in range(one.vocab):
            if whole[x_0, x_t] <= 0:
                continue
            found = one.posterior(torch.tensor([[x_t]]), torch.tensor([[x_0]]), s, t)[0, 0]
            assert torch.allclose(found, second[:, x_t] * first[x_0] / whole[x_0, x_t], atol=1e-12)
            back += whole[x_0, x_t] * found
        assert torch.allclose(back, first[x_0], atol=1e-12), "the posteriors average to the state at s"


def test_a_masked_token_opens_with_the_share_of_the_schedule():
    one = process("absorbing", "cos2")
    alpha = one.schedule.alpha(torch.tensor([0.2, 0.6], dtype=torch.float64))
    found = one.posterior(torch.tensor([[MASK, 3]]), torch.tensor([[2, 3]]), 0.2, 0.6)[0]
    opens = float((alpha[0] - alpha[1]) / (1 - alpha[1]))
    assert found[0].tolist() == pytest.approx([0, 1 - opens, opens, 0], abs=1e-12)
    assert found[1].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_the_kernel_of_exact_predictions_leads_from_law_to_law(noise):
    """One token: q_t(x_t) p(x_s | x_t) summed over x_t is q_s, with p(x_0 | x_t) by Bayes' rule; other predictions miss."""
    one, s, t = process(noise), 0.3, 0.8
    law = torch.tensor([0.5, 0.0, 0.2, 0.3] if noise == "absorbing" else [0.5, 0.2, 0.3], dtype=torch.float64)
    at_s, at_t = law @ moves(one, 0.0, s), law @ moves(one, 0.0, t)
    states = torch.arange(one.vocab)[:, None]
    joint = law[:, None] * moves(one, 0.0, t)
    safe = joint / joint.sum(0).clamp(min=1e-300)
    assert torch.allclose(at_t @ one.reverse(states, safe.T[:, None], s, t)[:, 0], at_s, atol=1e-12)
    wrong = safe.T.roll(1, 0)[:, None] + 0.1
    kernel = one.reverse(states, wrong / wrong.sum(-1, keepdim=True), s, t)[:, 0]
    assert torch.allclose(kernel.sum(-1), torch.ones(one.vocab, dtype=torch.float64))
    assert (at_t @ kernel - at_s).abs().max() > 0.01


def test_predictions_never_name_the_mask_and_copy_what_is_known():
    one = process("absorbing")
    probs = torch.full((1, 3, 4), 0.25)
    x = torch.tensor([[MASK, 0, 3]])
    assert one.subs(x, probs)[0].tolist() == [pytest.approx([1 / 3, 0, 1 / 3, 1 / 3]), [1, 0, 0, 0], [0, 0, 0, 1]]
    assert one.reverse(x, probs, 0.5, 1.0)[0, 1:].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]], "a prompt before pure noise"
    free = process("uniform")
    assert free.subs(x, probs) is probs


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_steps_go_backwards_within_the_unit_interval(s, t):
    with pytest.raises(ConfigError, match=r"s|t"):
        process("uniform").reverse(torch.tensor([[0]]), torch.full((1, 1, 3), 1 / 3), s, t)


# --- times ---


def test_times_of_low_discrepancy_have_one_in_every_share():
    t = spread_times(64, seeded(3))
    u = (t - 1e-3) / (1 - 1e-3)
    assert (u * 64).floor().long().tolist() == list(range(64))
    assert (u * 64 % 1).std() < 1e-6, "one draw moves them all"
    assert float(t.min()) >= 1e-3
    assert float(t.max()) < 1
    assert not torch.equal(t, spread_times(64, seeded(4)))
    assert float(spread_times(1, seeded(), floor=0.5)) > 0.5
    assert grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    for bad in (lambda: grid(0), lambda: spread_times(0, seeded()), lambda: spread_times(2, seeded(), 1.0)):
        with pytest.raises(ConfigError, match=r"steps|count|floor"):
            bad()


# --- samplers ---


def test_one_token_per_step_with_the_oracle_reproduces_the_law():
    one = process("absorbing")
    x = one_by_one(one, reader(conditionals()), one.start(DRAWS, LENGTH, seeded()), seeded(1))
    assert variation(frequencies(x, one), LAW) < 0.02
    sharper = conditionals() ** 1.2
    x = one_by_one(one, reader(sharper / sharper.sum(-1, keepdim=True)), one.start(DRAWS, LENGTH, seeded()), seeded(1))
    assert variation(frequencies(x, one), LAW) > 0.04, "a sampler at another temperature is caught"


def test_one_token_per_step_keeps_what_is_given():
    one = process("absorbing")
    given = torch.tensor([[MASK, 2, MASK, MASK], [3, 0, 2, 0], [MASK, 0, 3, 2]]).repeat(20_000, 1)
    x = one_by_one(one, reader(conditionals()), given, seeded(2))
    assert torch.equal(x[given != MASK], given[given != MASK])
    assert (x != MASK).all()
    expected = conditionals()[int(MASK * 64 + 2 * 16 + MASK * 4 + MASK), 2]
    assert (torch.bincount(x[::3, 2], minlength=4) / 20_000 - expected).abs().max() < 0.01
    with pytest.raises(IncompatibleError, match="ancestral"):
        one_by_one(process("uniform"), reader(conditionals()), given, seeded())


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_the_bias_of_the_grid_falls_as_one_over_its_steps(noise):
    """Tokens of one step do not know of each other: the exact law of the sampler with the oracle, state by state."""
    one = process(noise)
    predict, timed = oracle(one)
    bias = [variation(law_of(one, predict, steps, timed), LAW) for steps in (16, 32, 64)]
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in pairwise(bias))
    assert bias == pytest.approx([0.0469, 0.0224, 0.0115] if noise == "uniform" else [0.0384, 0.0193, 0.0097], abs=1e-4)


def test_ancestral_steps_with_the_oracle_reproduce_the_law_under_uniform_noise():
    """64 steps have a bias of 0.0115 (the grid's, worked out exactly), 4 steps one of over 0.15, which is caught."""
    one = process("uniform")
    predict, timed = oracle(one)
    for steps, least, most in ((64, 0.0, 0.02), (4, 0.15, 0.3)):
        x = ancestral(one, predict, one.start(DRAWS, LENGTH, seeded()), steps, seeded(1), timed=timed)
        assert least <= variation(frequencies(x, one), LAW) < most


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_ancestral_steps_have_the_law_of_their_kernels(noise):
    """Whatever the predictor: 3 steps of the sampler against its chain of states, multiplied out."""
    one = process(noise, "cosine")
    predict, timed = guesser(one)
    x = ancestral(one, predict, one.start(DRAWS, LENGTH, seeded()), 3, seeded(1), timed=timed)
    found = frequencies(x, one)
    assert variation(found, law_of(one, predict, 3, timed)) < 0.02
    assert variation(found, law_of(one, predict, 2, timed)) > 0.025


def test_fixed_places_stay_under_uniform_noise():
    one = process("uniform")
    predict, timed = oracle(one)
    fixed = torch.tensor([[True, False, False, True]]).expand(50, 4)
    x_1 = one.start(50, LENGTH, seeded(4))
    x = ancestral(one, predict, x_1, 8, seeded(5), timed=timed, fixed=fixed)
    assert torch.equal(x[fixed], x_1[fixed])
    assert not torch.equal(x, x_1)
