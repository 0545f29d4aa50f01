"""Editing: only surer other tokens replace committed slots, never the prompt or fixed text."""

from __future__ import annotations

import pytest
import torch
from canvases import MASK, Masked, prompts, run, view_of

from hasten.errors import ConfigError
from hasten.unmask.edit import Config, Edit


def test_what_nobody_is_surer_of_stays():
    model, many = Masked(), prompts(5)
    plain, same = run(model, many, "threshold:tau=0.1"), run(model, many, "threshold:tau=0.1", "edit:tau=1")
    assert [a.tokens for a in plain] == [b.tokens for b in same]


def test_a_surer_other_token_replaces_and_the_same_one_does_not():
    view, row = view_of([0.95, 0.95, 0.2, 0.95, 0.95], [False, False, False, True, False])
    row.tokens[10:] = torch.tensor([1, 0, 1, MASK, 1])
    row.provenance[14] = 1  # fixed text
    assert Edit(Config(tau=0.9), None).revise(None, view, row)[1] == {10: 0}


def test_edits_happen_and_canvases_end():
    for out in run(Masked(), prompts(4), "threshold:tau=0.05", "edit:tau=0.1"):
        assert len(out.tokens) == 24


@pytest.mark.parametrize("tau", [-0.1, 1.1])
def test_a_bar_outside_its_range_is_named(tau):
    with pytest.raises(ConfigError, match=r"edit\.tau"):
        Config(tau=tau)
