"""The factor rule against its definition."""

from __future__ import annotations

import pytest
from canvases import Masked, policy, prompts, run, view_of
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.unmask.factor import Config, Factor

MODEL = Masked()


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=20), st.floats(0.01, 5))
def test_it_takes_the_largest_n_whose_joint_doubt_fits(pairs, f):
    view, row = view_of([a for a, _ in pairs], [b for _, b in pairs])
    ranked = sorted((i for i, (_, flag) in enumerate(pairs) if flag), key=lambda i: (-float(view.score[i]), i))
    fitting = [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - view.score[ranked[n - 1]]) < f]
    chosen = Factor(Config(f=f), None).select(None, view, row, 1)[1]
    assert chosen.nonzero()[:, 0].tolist() == sorted(ranked[: max(fitting, default=0)])


def test_a_tiny_factor_is_one_token_per_forward():
    many = prompts(4)
    one, two = run(MODEL, many, "reference"), run(MODEL, many, "factor:f=1e-9")
    assert [a.tokens for a in one] == [b.tokens for b in two]
    assert all(out.usage.forwards == 24 for out in two)
    assert policy(MODEL, "factor").selectors[0].name == "factor"


@pytest.mark.parametrize("f", [0.0, -1.0, 2000.0])
def test_a_factor_outside_its_range_is_named(f):
    with pytest.raises(ConfigError, match=r"factor\.f"):
        Config(f=f)
