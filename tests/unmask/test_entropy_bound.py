"""The entropy bound against its definition."""

from __future__ import annotations

import math

import pytest
from canvases import Masked, prompts, run, view_of
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.unmask.entropy_bound import Config, EntropyBound


@given(st.lists(st.tuples(st.floats(0.5, 0.99), st.booleans()), min_size=1, max_size=20), st.floats(0, 4))
def test_it_takes_the_least_entropies_whose_sum_without_the_largest_fits(pairs, bound):
    view, row = view_of([a for a, _ in pairs], [b for _, b in pairs])
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in view.score.double().tolist()]
    taken = EntropyBound(Config(bound=bound), None).select(None, view, row, 1)[1].nonzero()[:, 0].tolist()
    left = [i for i, (_, flag) in enumerate(pairs) if flag and i not in taken]
    assert taken or not left
    if taken:
        values = sorted(entropy[i] for i in taken)
        assert sum(values[:-1]) <= bound + 1e-4
        if left:
            assert min(entropy[i] for i in left) >= values[-1] - 1e-5
            assert sum(values) > bound - 1e-4


def test_no_bound_to_speak_of_is_one_token_per_forward():
    for out in run(Masked(), prompts(3), "entropy-bound:bound=0"):
        assert out.usage.forwards == 24


def test_a_negative_bound_is_refused():
    with pytest.raises(ConfigError, match=r"entropy-bound\.bound"):
        Config(bound=-1.0)
