"""Answers in pairs: what quality, loss and speed are worked out from, and that nothing unknown counts as kept."""

from __future__ import annotations

import json

import pytest

from hasten.bench.candidates import Candidate
from hasten.bench.report import Spread
from hasten.bench.splits import Task
from hasten.bench.trials import Answer, Pair, Trial, figures, pair, speedup
from hasten.errors import ConfigError

VERIFIED, OPEN = Task((1,), lambda text: text == "right"), Task((1,))
RIGHT, WRONG = Answer((1, 2, 3, 4), "right", 0.5), Answer((1, 2, 9, 9), "wrong", 0.25)


def test_with_a_verifier_right_and_wrong_count_and_gains_too():
    assert pair(VERIFIED, WRONG, RIGHT, exact=False) == Pair(0.25, 0.0, 1.0, 0.5, 1.0)
    assert pair(VERIFIED, RIGHT, WRONG, exact=False) == Pair(0.5, 1.0, -1.0, 0.25, 0.0)
    assert pair(VERIFIED, WRONG, WRONG, exact=False).loss == 0.0


def test_an_answer_the_baseline_did_not_give_too_lost_all_it_lacks():
    assert pair(VERIFIED, WRONG, None, exact=False) == Pair(0.25, 0.0, 1.0)
    assert pair(VERIFIED, RIGHT, None, exact=False) == Pair(0.5, 1.0, 0.0)
    assert pair(OPEN, RIGHT, None, exact=False) is None
    assert pair(VERIFIED, RIGHT, None, exact=True) is None


def test_an_exact_candidate_is_judged_by_its_tokens_whatever_the_verifier_says():
    other = Answer((1, 2, 3, 5), "right", 0.1)
    assert pair(VERIFIED, other, RIGHT, exact=True).loss == 1.0
    assert pair(VERIFIED, WRONG, WRONG, exact=True).loss == 0.0


def test_without_a_verifier_the_tokens_in_common_count_in_order():
    assert pair(OPEN, WRONG, RIGHT, exact=False).quality == 0.5
    assert pair(OPEN, RIGHT, RIGHT, exact=False).loss == 0.0
    shifted = Answer((7, 1, 2, 3, 4), "", 0.1)
    assert pair(OPEN, shifted, RIGHT, exact=False).quality == pytest.approx(8 / 9)
    assert pair(OPEN, Answer((4, 3, 2, 1), "", 0.1), RIGHT, exact=False).quality == 0.25
    assert pair(OPEN, Answer((), "", 0.1), Answer((), "", 0.1), exact=False).quality == 1.0


def test_speed_is_that_of_prompts_with_turns_alone():
    turns = [Pair(1.0, 1.0, 0.0, float(i), 1.0) for i in (2, 2, 4, 4, 6, 6, 8, 8, 10, 10)]
    alone = [pair(VERIFIED, WRONG, RIGHT, exact=False, timed=False)] * 30
    assert alone[0] == Pair(0.25, 0.0, 1.0)
    assert speedup(turns + alone) == Spread(6.0, 2.0, 10.0)
    assert figures(turns + alone) == {
        "prompts": 40, "timed": 10, "speedup": {"median": 6.0, "min": 2.0, "max": 10.0}, "quality": 0.25,
        "baseline_quality": 1.0, "loss": 0.75,
    }  # fmt: skip
    assert speedup(turns[:3]) == Spread(2.0, 2.0, 4.0)
    assert figures([]) is figures(alone) is None
    with pytest.raises(ConfigError):
        speedup(alone)


def test_a_trial_is_json_ready():
    trial = Trial(Candidate(("a", "b:x=1"), False), dev=[Pair(1.0, 1.0, 0.0, 2.0, 1.0)])
    assert trial.best is trial.dev
    found = json.loads(json.dumps(trial.to_dict()))
    assert (found["method"], found["exact"], found["fate"]) == (["a", "b:x=1"], False, "not tried: time was up")
    assert found["held_out"] is None
    trial.fate = ""
    assert trial.to_dict()["fate"] == "chosen"
