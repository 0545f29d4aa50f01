"""Losses of discrete diffusion on a law that can be enumerated: what each bounds, and when it reaches it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from enumerable import (
    ENTROPY,
    LAW,
    LENGTH,
    MASK,
    NLL,
    ROWS,
    STATES,
    Sighted,
    batch,
    close,
    complementary,
    conditionals,
    d3pm,
    guesser,
    guesses,
    law_of,
    mdlm,
    mean_loss,
    nodes,
    oracle,
    process,
    reader,
    scored,
    sedd,
    smooth,
    timed_at,
)

from hasten.errors import ConfigError, IncompatibleError, UnknownNameError
from hasten.train import bounds


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def wrong():
    """(a random predictor, its exact mask bound)."""
    table = guesses("absorbing", 1)
    return table, mdlm(process("absorbing"), reader(table))


# --- every loss bounds ---


def bounded(noise: str, bound: str, predict, timed: bool) -> torch.Tensor:
    """The exact bound [81] of a loss by name."""
    one = process(noise)
    if bound == "d3pm":
        return d3pm(one, predict, timed, 12)
    if bound == "sedd":
        return sedd(one, scored(one, predict, timed), nodes(LENGTH) if noise == "absorbing" else smooth(48))
    return (mdlm if bound == "mdlm" else complementary)(one, predict, nodes(LENGTH))


KINDS = [("absorbing", "mdlm"), ("absorbing", "complementary"), ("absorbing", "d3pm"), ("absorbing", "sedd"),
         ("uniform", "d3pm"), ("uniform", "sedd")]  # fmt: skip


@pytest.mark.parametrize(("noise", "bound"), KINDS)
def test_a_random_predictor_is_above_the_truth_and_the_oracle_reaches_it(noise, bound):
    one = process(noise)
    wrong = bounded(noise, bound, *guesser(one, 3))
    assert float((LAW * wrong).sum()) > ENTROPY + 1
    right = bounded(noise, bound, *oracle(one))
    if bound == "d3pm":  # tokens of one step are independent: equal in the limit only
        assert ENTROPY < float((LAW * right).sum()) < ENTROPY + 0.2
    else:
        assert close(right, NLL, 1e-4 if noise == "uniform" else 1e-12)


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_d3pm_reaches_the_truth_as_steps_grow(noise):
    one = process(noise)
    predict, timed = oracle(one)
    gaps = [float((LAW * d3pm(one, predict, timed, steps)).sum()) - ENTROPY for steps in (6, 12, 24)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    # the gap is a / T + b / T^2: two differences take both away
    assert abs(gaps[0] - 6 * gaps[1] + 8 * gaps[2]) / 3 < 2e-3


def test_d3pm_approaches_mdlm_as_steps_grow(wrong):
    table, bound = wrong
    one = process("absorbing")
    apart = [(d3pm(one, reader(table), False, steps) - bound).abs().max() for steps in (1, 2, 4, 8, 16, 32, 64)]
    assert all(1.8 < coarse / fine < 2.4 for coarse, fine in pairwise(apart[1:]))
    assert apart[0] > apart[1]
    assert apart[-1] < apart[0] / 50


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_d3pm_bounds_the_law_of_its_own_sampler(noise):
    """Row by row: the bound of any predictor is at least -log of the chance that its sampler writes the row."""
    one = process(noise, "cosine")
    predict, timed = guesser(one, 2)
    bound = d3pm(one, predict, timed, 5)
    own = -law_of(one, predict, 5, timed).log()
    assert (bound >= own - 1e-9).all()
    assert float((bound - own).mean()) > 0.1
    lax = sum(
        mean_loss(
            one,
            k / 5,
            lambda x, y, k=k: bounds.d3pm(one, timed_at(predict, timed, x, k / 5).log(), x, y, (k - 1) / 5, k / 5),
        )
        for k in range(2, 6)
    )
    assert (lax < own).any(), "without its last step it bounds nothing"


def test_any_positive_score_has_a_bound():
    for noise, rule in (("absorbing", nodes(64)), ("uniform", smooth(24))):
        one = process(noise)
        table = torch.randn(len(STATES[noise]), LENGTH, one.vocab, dtype=torch.float64, generator=seeded(6)).exp()
        truth = scored(one, *oracle(one))

        def score(x, t, table=table, truth=truth):
            return truth(x, t) * reader(table)(x)

        found = sedd(one, score, rule)
        assert float((LAW * found).sum()) > ENTROPY + 0.2

        def changed(x, t, score=score):
            return score(x, t).scatter(-1, x[..., None], 7.0)

        assert close(sedd(one, changed, rule), found, 1e-9), "what a score says of the token itself is not read"


def test_the_score_of_a_masked_prediction_has_the_bound_of_mdlm(wrong):
    table, bound = wrong
    one = process("absorbing")
    assert close(sedd(one, scored(one, reader(table), False), nodes(LENGTH)), bound, 1e-12)
    x_t = torch.tensor([[MASK, 2, MASK, MASK]])
    probs = reader(table)(x_t)
    sigma = -math.log(float(one.schedule.alpha(0.3)))
    ratio = math.exp(-sigma) / (1 - math.exp(-sigma))
    found = bounds.to_score(one, probs, x_t, 0.3)[0, 2]
    assert found[[0, 2, 3]].tolist() == pytest.approx((ratio * probs[0, 2, [0, 2, 3]]).tolist())


@pytest.mark.parametrize("t", [1e-3, 0.3, 0.999])
@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_scores_and_predictions_convert_into_each_other(noise, t):
    one = process(noise, "geometric")
    x_t = STATES[noise]
    probs = one.subs(x_t, guesses(noise, 4))
    score = bounds.to_score(one, probs, x_t, t)
    assert close(score.gather(-1, x_t[..., None]), torch.ones(*x_t.shape, 1), 1e-9)
    assert close(bounds.from_score(one, score, x_t, t), probs, 1e-6)
    assert close(bounds.from_score(one, score.scatter(-1, x_t[..., None], 7.0), x_t, t), probs, 1e-6)
    if noise == "uniform":  # the same by hand: the ratios of the three cases
        alpha = float(one.schedule.alpha(t))
        same, other = alpha + (1 - alpha) / 3, (1 - alpha) / 3
        p, y = probs[5, 0], (int(x_t[5, 0]) + 1) % 3
        by_hand = p[x_t[5, 0]] * other / same + p[y] * same / other + (1 - p[x_t[5, 0]] - p[y])
        assert float(score[5, 0, y]) == pytest.approx(float(by_hand))
        scaled = bounds.from_score(one, score * 1.3, x_t, t)
        assert (scaled >= 0).all()
        assert close(scaled.sum(-1), torch.ones(x_t.shape), 1e-9)


# --- MGDM ---


def test_mgdm_is_d3pm_reweighted():
    one, table, levels = process("absorbing"), guesses("absorbing", 1), 20

    def total(**how):
        def level(k: int):
            at = torch.tensor(float(k))
            return mean_loss(
                one, k / levels, lambda x, y: bounds.mgdm(one, reader(table)(x).log(), x, y, at, levels, **how)
            )

        return sum(level(k) for k in range(1, levels + 1))

    assert close(total(scale=1.0, power=0.0, time="original"), d3pm(one, reader(table), False, levels), 1e-9)
    assert (total(time="original") < NLL).any(), "reweighted it bounds nothing"
    x_0 = ROWS["absorbing"][:1]
    x_t = torch.tensor([[MASK, int(x_0[0, 1]), MASK, int(x_0[0, 3])]])
    logits = reader(table)(x_t).log()
    u = [-float(logits[0, i, x_0[0, i]]) for i in (0, 2)]
    by_hand = (20 - 6) * sum(0.25 * (1 - math.exp(-x)) ** 2 * x for x in u)  # level 7 is T - t with t = 6
    assert float(bounds.mgdm(one, logits, x_t, x_0, torch.tensor([7]), power=2.0)) == pytest.approx(by_hand)


# --- estimates, gradients, refusals ---


@pytest.mark.parametrize(("noise", "bound"), KINDS)
def test_the_estimate_is_that_of_the_exact_bound(noise, bound):
    one = process(noise)
    predict, timed = guesser(one, 3)
    which = torch.multinomial(LAW, 240, replacement=True, generator=seeded(1))
    found = bounds.nelbo(one, predict, ROWS[noise][which], 8, seeded(2), bound, steps=12, timed=timed)
    apart = found - bounded(noise, bound, predict, timed)[which]
    assert apart.shape == (240,)
    assert abs(float(apart.mean())) < 3 * float(apart.std()) / 240**0.5 < 0.8


def test_the_times_of_an_estimate_are_spread_evenly():
    one, seen = process("uniform"), []
    predict, _ = guesser(one)

    def noting(x, t):
        seen.append(t)
        return predict(x, torch.full_like(t, 0.5))

    bounds.nelbo(one, noting, ROWS["uniform"][torch.arange(900) % 81], 8, seeded(3), "sedd", timed=True)
    t = torch.stack(seen) * 8
    assert torch.equal(t.floor().long(), torch.arange(8)[:, None].expand(8, 900))
    assert abs(float((t % 1).mean()) - 0.5) < 0.03


def test_losses_have_finite_gradients_where_probabilities_are_zero():
    for noise in ("absorbing", "uniform"):
        one = process(noise)
        x_0 = ROWS[noise]
        x_t = one.draw(x_0, 0.5, seeded())
        logits = torch.zeros(81, LENGTH, one.vocab, requires_grad=True)
        for s in (0.0, 0.3):
            loss = bounds.d3pm(one, logits, x_t, x_0, s, 0.5, extra=0.1)
            score = bounds.to_score(one, logits.softmax(-1), x_t, 0.5)
            (grad,) = torch.autograd.grad((loss + bounds.score_entropy(one, score, x_t, x_0, 0.5)).sum(), logits)
            assert torch.isfinite(grad).all()
            assert grad.abs().max() > 0
    plain = bounds.d3pm(one, logits, x_t, x_0, 0.3, 0.5)
    more = bounds.d3pm(one, logits, x_t, x_0, 0.3, 0.5, extra=0.1) - plain
    assert more.tolist() == pytest.approx([0.1 * LENGTH * math.log(3)] * 81, rel=1e-5), "lambda times the cross-entropy"


def test_what_bounds_nothing_is_refused_by_name():
    masks, free = process("absorbing"), process("uniform")
    x, logits = ROWS["uniform"][:2], torch.zeros(2, LENGTH, 3)
    level = torch.ones(2)
    for name, call in (
        ("mdlm", lambda: bounds.mdlm(free, logits, x, x, 0.5)),
        ("complementary", lambda: bounds.complementary(free, logits, logits, x, x, 0.5)),
        ("complement", lambda: bounds.complement(free, x, x)),
        ("mgdm", lambda: bounds.mgdm(free, logits, x, x, level)),
        ("timed", lambda: bounds.nelbo(masks, reader(conditionals()), x, 1, seeded(), "complementary", timed=True)),
    ):
        with pytest.raises(IncompatibleError, match=name):
            call()
    with pytest.raises(UnknownNameError, match="mdml"):
        bounds.nelbo(masks, reader(conditionals()), x, 1, seeded(), "mdml")  # type: ignore[arg-type]
    y, four = ROWS["absorbing"][:2], torch.zeros(2, LENGTH, 4)
    for name, call in (
        ("t", lambda: bounds.mdlm(masks, four, y, y, 0.0)),
        ("t", lambda: bounds.score_entropy(masks, four, y, y, 1.0)),
        ("level", lambda: bounds.mgdm(masks, four, y, y, torch.tensor([0, 1]))),
        ("time", lambda: bounds.mgdm(masks, four, y, y, level, time="square")),  # type: ignore[arg-type]
        ("draws", lambda: bounds.nelbo(masks, reader(conditionals()), y, 0, seeded())),
        ("steps", lambda: bounds.nelbo(masks, reader(conditionals()), y, 1, seeded(), steps=0)),
        ("draws", lambda: bounds.block_nelbo(Sighted(conditionals()), batch(y), 0, seeded())),
    ):
        with pytest.raises(ConfigError, match=name):
            call()
