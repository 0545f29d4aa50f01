"""The reference sampler's schedule and scores; the sampler itself against a plain loop is in tests/engine/test_canvas.py."""

from __future__ import annotations

import pytest
import torch
from canvases import Masked, prompts, run, view_of
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.unmask.reference import Config, even, score_of, top


@given(st.integers(1, 300), st.integers(1, 300))
def test_even_quotas_sum_to_the_masks(masks, steps):
    quotas = even(masks, steps)
    assert (len(quotas), sum(quotas)) == (steps, masks)
    assert max(quotas) - min(quotas) <= 1
    assert list(quotas) == sorted(quotas, reverse=True)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=24), st.integers(1, 24))
def test_the_quota_takes_the_best_open_positions_lowest_first(pairs, count):
    scores, open_ = [a / 10 for a, _ in pairs], [b for _, b in pairs]
    view, _ = view_of(scores, open_)
    ranked = sorted((i for i, flag in enumerate(open_) if flag), key=lambda i: (-scores[i], i))
    assert top(view, count).nonzero()[:, 0].tolist() == sorted(ranked[:count])


def test_scores_are_what_their_names_say():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.5, 0.4]])
    _, row = view_of([0.5, 0.5], [True, True])
    probs = logits.double().softmax(-1)
    ordered = probs.sort(-1).values
    at = torch.tensor([10, 11])
    torch.testing.assert_close(score_of("margin", logits, row, at).double(), ordered[:, 2] - ordered[:, 1])
    torch.testing.assert_close(score_of("entropy", logits, row, at).double(), (probs * probs.log()).sum(-1))
    one, two = score_of("random", logits, row, at), score_of("random", logits, row, at)
    assert torch.equal(one, two)
    assert len(set(one.tolist())) == 2


@pytest.mark.parametrize("score", ["prob", "margin", "entropy", "random"])
def test_every_score_fills_the_canvas_one_token_per_forward(score):
    for out in run(Masked(seed=1), prompts(3), f"reference:score={score}", max_tokens=12):
        assert (len(out.tokens), out.usage.forwards) == (12, 12)


@pytest.mark.parametrize(("field", "value"), [("block", 0), ("steps", -1), ("score", "luck")])
def test_settings_outside_their_range_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})
    assert caught.value.field == f"reference.{field}"
