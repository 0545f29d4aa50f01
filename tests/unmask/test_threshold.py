"""Threshold decoding: its two ends, and what lies between."""

from __future__ import annotations

import pytest
from canvases import Masked, policy, prompts, run, view_of

from hasten.errors import ConfigError
from hasten.unmask.threshold import Config


def test_above_one_it_is_the_reference_sampler():
    model, many = Masked(), prompts(6)
    plain, bold = run(model, many, "reference:block=8"), run(model, many, "reference:block=8", "threshold:tau=1.5")
    assert [one.tokens for one in plain] == [one.tokens for one in bold]
    assert all(one.usage.forwards == 24 for one in bold)


def test_at_zero_a_block_takes_one_forward():
    for out in run(Masked(), prompts(4), "reference:block=8", "threshold:tau=0"):
        assert out.usage.forwards == 3


def test_lower_thresholds_never_need_more_forwards_on_average():
    model, many = Masked(seed=2), prompts(12)
    taken = [sum(one.usage.forwards for one in run(model, many, f"threshold:tau={tau}")) for tau in (0.9, 0.5, 0.2, 0.05)]
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] < taken[0]


def test_the_threshold_itself_is_reached_and_others_are_not():
    chosen = policy(Masked(), "threshold:tau=0.5").selectors[0].select(None, *view_of([0.5, 0.49, 0.9], [True] * 3), 1)[1]
    assert chosen.tolist() == [True, False, True]


@pytest.mark.parametrize("tau", [-0.1, 2.5])
def test_a_threshold_outside_its_range_is_named(tau):
    with pytest.raises(ConfigError, match=r"threshold\.tau"):
        Config(tau=tau)
