"""Bounds on a mean: never below the truth more often than promised, near the exact binomial bound, ordered as they must be."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.bench.bounds import above, below, lower, upper
from hasten.errors import ConfigError

LOSSES = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), max_size=60)


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.0125])
def test_without_a_loss_it_is_near_the_exact_binomial_bound(count, alpha):
    exact = 1 - alpha ** (1 / count)  # Clopper and Pearson, none of n
    assert exact <= upper([0.0] * count, alpha) <= 1 - (alpha / 2) ** (1 / count) + 1e-9


@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.0), (0.1, 0.05), (0.3, 0.3), (0.5, 0.0)])
def test_it_is_below_the_truth_no_more_often_than_alpha(lost, gained):
    r, alpha, runs, missed = random.Random(f"{lost} {gained}"), 0.1, 400, 0
    for _ in range(runs):
        draws = r.choices([1.0, -1.0, 0.0], [lost, gained, 1 - lost - gained], k=80)
        missed += upper(draws, alpha) < lost - gained
    assert missed <= alpha * runs


def test_it_holds_at_whatever_moment_one_stops_to_look():
    r, alpha, runs, missed = random.Random(5), 0.1, 150, 0
    for _ in range(runs):
        draws = r.choices([1.0, 0.0], [0.2, 0.8], k=60)
        missed += any(upper(draws[:n], alpha) < 0.2 for n in range(5, 61, 5))
    assert missed <= alpha * runs


@settings(max_examples=60)
@given(LOSSES, st.floats(0.001, 0.5), st.randoms())
def test_order_of_observations_does_not_matter_and_worse_ones_raise_it(losses, alpha, r):
    bound = upper(losses, alpha)
    mixed = list(losses)
    r.shuffle(mixed)
    assert upper(mixed, alpha) == pytest.approx(bound, abs=1e-9)
    assert -1 <= bound <= 1
    assert upper(losses, alpha / 2) >= bound - 1e-9
    assert upper([*losses[1:], 1.0], alpha) >= upper(losses, alpha) - 1e-9 or not losses
    if losses:
        assert bound >= sum(losses) / len(losses) - 1e-9
        assert lower(losses, alpha) <= sum(losses) / len(losses) + 1e-9
    assert lower(losses, alpha) == pytest.approx(-upper([-one for one in losses], alpha))


@settings(max_examples=60)
@given(LOSSES, st.floats(-0.99, 0.99), st.floats(0.001, 0.5))
def test_asking_whether_it_is_below_a_value_agrees_with_the_bound(losses, mean, alpha):
    if abs(upper(losses, alpha) - mean) > 1e-6:
        assert below(losses, mean, alpha) == (upper(losses, alpha) <= mean)
    if abs(lower(losses, alpha) - mean) > 1e-6:
        assert above(losses, mean, alpha) == (lower(losses, alpha) >= mean)


def test_more_of_the_same_narrows_it():
    some = [1.0] + [0.0] * 19
    bounds = [upper(some * n, 0.05) for n in (1, 3, 10, 40)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < 0.085
    assert upper([], 0.05) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("losses", "alpha", "field"), [([1.5], 0.05, "losses"), ([0.0], 0.0, "alpha"), ([0.0], 1.0, "alpha")]
)
def test_what_has_no_bound_is_refused(losses, alpha, field):
    with pytest.raises(ConfigError) as caught:
        upper(losses, alpha)
    assert caught.value.field == field
