"""LocalLeap against a double loop over its definition, and against the thresholds it lies between."""

from __future__ import annotations

import pytest
import torch
from canvases import EOS, Masked, prompts, run, view_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engine.contracts import MethodContext
from hasten.errors import ConfigError
from hasten.unmask.localleap import Config, LocalLeap, widen

MODEL = Masked()
CONTEXT = MethodContext("tiny", MODEL)


def chosen(config: Config, view, row) -> list[int]:
    return LocalLeap(config, CONTEXT).select(None, view, row, 1)[1].nonzero()[:, 0].tolist()


def definition(score: list[float], open_: list[bool], config: Config, known: list[bool] | None = None) -> list[int]:
    """The rule as published, position by position; `known` are committed positions that count as sure."""
    size = len(score)
    sure = [i for i in range(size) if open_[i] and score[i] >= config.kappa]
    anchors = sure + [i for i in range(size) if known and known[i]]
    out = []
    for j in range(size):
        near = any(abs(i - j) <= config.radius for i in anchors)
        if open_[j] and (score[j] >= config.kappa or (sure and near and score[j] >= config.tau)):
            out.append(j)
    return out


GRID = st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.8, 0.9, 1.0])  # values that are thresholds too
PAIRS = st.lists(st.tuples(GRID | st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=24)


@given(PAIRS, GRID, GRID, st.integers(0, 30), st.booleans())
@settings(max_examples=300, deadline=None)
def test_it_is_a_double_loop(pairs, one, other, radius, committed):
    config = Config(kappa=max(one, other), tau=min(one, other), radius=radius, anchors="committed" if committed else "step")
    view, row = view_of([a for a, _ in pairs], [b for _, b in pairs])
    known = [not flag for _, flag in pairs] if committed else None
    score = [float(value) for value in view.score]
    kappa, tau = float(torch.tensor(config.kappa)), float(torch.tensor(config.tau))
    expected = definition(score, [b for _, b in pairs], Config(kappa, tau, radius, config.anchors), known)
    assert chosen(config, view, row) == expected


def test_ten_thousand_rows_are_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(10_000, 12, generator=generator) * 20).round() / 20
    opens = torch.rand(10_000, 12, generator=generator) < 0.7
    config = Config(kappa=0.9, tau=0.75, radius=2)
    kappa, tau = (float(torch.tensor(value)) for value in (0.9, 0.75))
    sure = opens & (scores >= config.kappa)
    near = torch.stack([widen(one, 2) for one in sure])
    vectorised = sure | (opens & near & (scores >= config.tau))
    plain = Config(kappa=kappa, tau=tau, radius=2)
    for score, flags, mine in zip(scores.tolist(), opens.tolist(), vectorised):
        assert mine.nonzero()[:, 0].tolist() == definition(score, flags, plain)


@given(PAIRS, st.integers(0, 8))
def test_it_lies_between_the_two_thresholds(pairs, radius):
    view, row = view_of([a for a, _ in pairs], [b for _, b in pairs])
    mine = set(chosen(Config(radius=radius), view, row))
    above = {i for t, i in ((0.9, i) for i in range(len(pairs))) if view.masked[i] and view.score[i] >= t}
    below = {i for i in range(len(pairs)) if view.masked[i] and view.score[i] >= 0.75}
    assert above <= mine <= below


def test_one_hop_only():
    view, row = view_of([0.95, 0.8, 0.8, 0.8], [True] * 4)
    assert chosen(Config(radius=1), view, row) == [0, 1]
    assert chosen(Config(radius=2), view, row) == [0, 1, 2]


def test_what_is_committed_is_an_anchor_on_request_only():
    view, row = view_of([0.1, 0.8, 0.1, 0.1, 0.1, 0.95], [False, True, True, True, True, True])
    assert chosen(Config(radius=1), view, row) == [5]
    assert chosen(Config(radius=1, anchors="committed"), view, row) == [1, 5]


def test_an_end_of_text_need_not_spread():
    view, row = view_of([0.95, 0.8, 0.1, 0.1, 0.1, 0.8, 0.95], [True] * 7)
    view.x0 = torch.tensor([EOS, 5, 5, 5, 5, 5, 5])
    assert chosen(Config(radius=1), view, row) == [0, 1, 5, 6]
    assert chosen(Config(radius=1, eos=False), view, row) == [0, 5, 6]


def test_lifted_scores_make_anchors_and_no_neighbours():
    """Where a logit stage added credit, neighbours are judged by what the model itself says."""
    view, row = view_of([0.95, 0.8, 0.6], [True] * 3)
    view.logits = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.6, 0.4]]).log()  # what the scores were before the credit
    view.changed = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.85, 0.15]]).log()
    view.score = view.prob = torch.tensor([0.95, 0.85, 0.85])
    assert chosen(Config(), view, row) == [0, 1]
    view.score = view.prob * torch.tensor([1.0, 0.5, 1.0])  # a score stage held one back: it counts here too
    assert chosen(Config(), view, row) == [0]


def test_equal_thresholds_and_no_radius_are_the_threshold():
    many = prompts(4, seed=6)
    base = run(MODEL, many, "threshold:tau=0.4", max_tokens=16)
    for settings_ in ("kappa=0.4,tau=0.4", "kappa=0.4,tau=0.1,radius=0"):
        same = run(MODEL, many, f"localleap:{settings_}", max_tokens=16)
        assert [(one.tokens, one.usage.forwards) for one in same] == [(one.tokens, one.usage.forwards) for one in base]
    one_by_one = run(MODEL, many, "localleap:kappa=2", max_tokens=16)
    assert [one.tokens for one in one_by_one] == [one.tokens for one in run(MODEL, many, max_tokens=16)]
    fast = run(MODEL, many, "localleap:kappa=0.4,tau=0.2", max_tokens=16)
    assert sum(one.usage.forwards for one in fast) < sum(one.usage.forwards for one in base)


def test_a_wide_radius_and_a_low_bar_commit_the_block_once_something_is_sure():
    view, row = view_of([0.1, 0.95, 0.2, 0.01], [True] * 4)
    assert chosen(Config(tau=0.0, radius=4), view, row) == [0, 1, 2, 3]
    view, row = view_of([0.1, 0.85, 0.2, 0.01], [True] * 4)
    assert chosen(Config(tau=0.0, radius=4), view, row) == []


def test_rows_are_their_own():
    many = prompts(5, seed=7)
    together = run(MODEL, many, "localleap:kappa=0.3,tau=0.2", max_tokens=16)
    for prompt, out in zip(many, together):
        assert run(MODEL, [prompt], "localleap:kappa=0.3,tau=0.2", max_tokens=16)[0].tokens == out.tokens


@pytest.mark.parametrize(
    ("settings_", "field"),
    [
        ({"kappa": -0.1}, "kappa"), ({"kappa": 2.1}, "kappa"), ({"tau": 0.95}, "tau"), ({"tau": -0.1}, "tau"),
        ({"kappa": 1.5, "tau": 1.2}, "tau"), ({"radius": -1}, "radius"), ({"anchors": "all"}, "anchors"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(settings_, field):
    with pytest.raises(ConfigError) as caught:
        Config(**settings_)
    assert caught.value.field == f"localleap.{field}"
