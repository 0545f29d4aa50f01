"""Remasking: doubted tokens come back, and blocks still end."""

from __future__ import annotations

import pytest
import torch
from canvases import MASK, Masked, policy, prompts, run

from hasten.engine.parts import Forward
from hasten.errors import ConfigError
from hasten.types import Event, Request, SamplingParams
from hasten.unmask.remask import Config


def test_nothing_is_doubted_below_zero():
    model, many = Masked(), prompts(5)
    plain, same = run(model, many, "threshold:tau=0.2"), run(model, many, "threshold:tau=0.2", "remask:low=0")
    assert [a.tokens for a in plain] == [b.tokens for b in same]


def test_even_when_everything_is_doubted_a_canvas_is_filled():
    events: list[Event] = []
    for out in run(Masked(), prompts(4), "reference:steps=6", "remask:low=1", events=events):
        assert len(out.tokens) == 24
        assert MASK not in out.tokens
        assert out.usage.forwards <= 24
    assert any(event.kind == "commit" and event.token == -1 for event in events), "something was opened again"
    written = {(event.request, event.position): event.token for event in events if event.kind == "commit"}
    assert -1 not in written.values(), "the last word on every position is a token"


def test_a_step_opens_fewer_than_it_commits():
    model = Masked()
    made = policy(model, "reference:steps=4", "remask:low=1")
    row = made.begin(made.open(Request((5, 6), SamplingParams(max_tokens=16)), model.capabilities), None)
    while row.left:
        before = row.left
        row = made.advance(row, Forward(model.logits(row.tokens), torch.arange(len(row.tokens)))).row
        assert row.left < before


@pytest.mark.parametrize("low", [-0.1, 1.1])
def test_a_bar_outside_its_range_is_named(low):
    with pytest.raises(ConfigError, match=r"remask\.low"):
        Config(low=low)
