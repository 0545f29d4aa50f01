"""The hierarchical rule against a walk over the runs of masks."""

from __future__ import annotations

import pytest
from canvases import Masked, run, view_of
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.unmask.hierarchy import Config, Hierarchy


@given(st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=24))
def test_it_takes_what_is_sure_and_the_best_of_every_run(pairs):
    view, row = view_of([a / 10 for a, _ in pairs], [b for _, b in pairs])
    scores, config = view.score.tolist(), Config(tau=0.85, low=0.45)
    expected, run_ = set(), []
    for i, (_, flag) in enumerate([*pairs, (0, False)]):
        if flag:
            run_.append(i)
            continue
        if run_:
            best = max(run_, key=lambda j: (scores[j], -j))
            expected |= {j for j in run_ if scores[j] > config.tau} | ({best} if scores[best] > config.low else set())
        run_ = []
    chosen = Hierarchy(config, None).select(None, view, row, 1)[1]
    assert set(chosen.nonzero()[:, 0].tolist()) == expected


def test_a_canvas_is_filled_in_fewer_forwards_than_tokens():
    out = run(Masked(), [[5, 6]], "hierarchy:tau=0.9,low=0.05")[0]
    assert len(out.tokens) == 24
    assert out.usage.forwards < 24


@pytest.mark.parametrize(("tau", "low", "field"), [(0.5, 0.6, "low"), (3, 0.1, "tau"), (0.9, -0.1, "low")])
def test_settings_outside_their_range_are_named(tau, low, field):
    with pytest.raises(ConfigError, match=rf"hierarchy\.{field}"):
        Config(tau=tau, low=low)
