"""The search on planted methods under a clock of its own: what is wrong, overfitted or slow is never chosen."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Slowed, Trusting, plant

from hasten.bench.candidates import Candidate, Space
from hasten.bench.splits import Splits, Task
from hasten.bench.tune import FASTER, FINALISTS, Answer, search
from hasten.errors import ConfigError, HastenError

BASE = Candidate(("plain",), True)


@dataclass
class Plant:
    """A method as it is planted: seconds of an answer (the baseline's are 1), and how it is wrong on dev and held-out."""

    seconds: float
    dev: float = 0.0
    held: float = 0.0
    exact: bool = False
    fails: bool = False


@dataclass
class Stage:
    """Tasks, a clock that only answers move, and what was asked of whom."""

    plants: dict[str, Plant]
    dev: int = 40
    held: int = 60
    verified: bool = True
    seed: int = 0
    now: float = 0.0
    calls: list[tuple[str, int, float]] = field(default_factory=list)
    base: Plant = field(default_factory=lambda: Plant(1.0, exact=True))

    def run(self, seconds: float = 1e6, max_loss: float = 0.0, **more):
        def task(number: int) -> Task:
            return Task((number,), (lambda text: text == "right") if self.verified else None)

        numbers = range(self.dev + self.held)
        parts = Splits(tuple(task(i) for i in numbers[: self.dev]), tuple(task(i) for i in numbers[self.dev :]), "w", "q")
        tried = tuple(Candidate((name,), plant.exact) for name, plant in self.plants.items())
        return search(
            Space(BASE, tried, {}), parts, self.answer, seconds=seconds, max_loss=max_loss, clock=lambda: self.now, **more
        )

    def answer(self, one: Candidate, task: Task) -> Answer:
        name, number = one.methods[0], task.ids[0]
        self.calls.append((name, number, self.now))
        plant = self.plants.get(name, self.base)
        if plant.fails:
            raise ConfigError("it does not like this prompt")
        self.now += plant.seconds
        share = plant.dev if number < self.dev else plant.held
        wrong = random.Random(f"{self.seed} {name} {number}").random() < share
        return Answer((7, 8, 9) if wrong else (1, 2, 3), "wrong" if wrong else "right", plant.seconds)


def chosen(found) -> str:
    return found.chosen.methods[0]


def test_the_fastest_that_keeps_the_budget_is_chosen_and_the_words_say_so():
    stage = Stage({"a": Plant(0.5), "b": Plant(0.25), "c": Plant(0.4, exact=True), "d": Plant(0.8, exact=True)})
    found = stage.run(max_loss=0.2)
    assert chosen(found) == "b"
    assert found.speedup.median == 4.0
    assert "b answered 16 held-out prompts 4.00 (4.00-4.00) times as fast as plain" in found.why
    assert "within the 20.0% allowed" in found.why
    assert chosen(stage.run()) == "c"
    assert {trial.candidate.methods[0]: trial.fate for trial in found.trials}["c"] == "slower on held-out prompts"


def test_what_is_fast_and_wrong_is_not_chosen():
    stage = Stage({"wrong": Plant(0.01, 1.0, 1.0), "right": Plant(0.5), **{f"x{i}": Plant(0.9) for i in range(6)}})
    found = stage.run(max_loss=0.2)
    assert chosen(found) == "right"
    fate = next(trial.fate for trial in found.trials if trial.candidate.methods == ("wrong",))
    assert fate.startswith("lost at least")


def test_what_is_right_on_dev_prompts_alone_is_not_chosen():
    stage = Stage({"over1": Plant(0.01, 0.0, 0.6), "over2": Plant(0.02, 0.0, 1.0), "right": Plant(0.5),
                   **{f"slow{i}": Plant(0.9) for i in range(8)}})  # fmt: skip
    found = stage.run(max_loss=0.2)
    assert chosen(found) == "right"
    only = Stage({"over": Plant(0.01, 0.0, 1.0), **{f"slow{i}": Plant(1.2, exact=True) for i in range(8)}}).run(
        max_loss=0.2
    )
    assert only.chosen == BASE
    assert "Nothing faster than plain was confirmed" in only.why


def test_an_exact_method_that_differs_once_is_not_chosen_whatever_the_budget():
    liar = {"liar": Plant(0.1, 0.0, 0.05, exact=True), "honest": Plant(0.6, exact=True)}
    for budget in (0.0, 0.9):
        found = Stage(liar).run(max_loss=budget)
        assert chosen(found) == "honest"
        fate = next(trial.fate for trial in found.trials if trial.candidate.methods == ("liar",))
        assert "another text in 1 of" in fate


@pytest.mark.parametrize("seconds", [1.0, 1.01, 1.5, 40.0])
def test_a_slowed_method_never_wins(seconds):
    found = Stage({"slowed": Plant(seconds, exact=True), "slow too": Plant(seconds * 1.1)}).run(max_loss=0.5)
    assert found.chosen == BASE
    assert found.speedup.median == 1.0


def test_without_a_budget_nothing_lossy_is_run():
    stage = Stage({"lossy": Plant(0.1), **{f"e{i}": Plant(0.5 + i / 20, exact=True) for i in range(9)}})
    found = stage.run()
    assert "lossy" not in {name for name, _, _ in stage.calls}
    assert chosen(found) == "e0"
    assert [trial.candidate.exact for trial in found.trials] == [True] * 9


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.05, 3.0), st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.sampled_from([0.0, 0.05, 0.3, 1.0]),
                       st.booleans()), min_size=1, max_size=14),
    st.sampled_from([0.0, 0.1, 0.25]), st.floats(3.0, 400.0), st.integers(0, 5), st.sampled_from([0.0, 0.2, 0.9]),
)  # fmt: skip
def test_whatever_is_planted_the_choice_keeps_its_promise_and_the_time(plants, budget, seconds, seed, baseline):
    made = {str(i): Plant(s, dev, held, exact) for i, (s, dev, held, exact) in enumerate(plants)}
    stage = Stage(made, seed=seed, base=Plant(1.0, baseline, baseline, exact=True))
    found = stage.run(seconds=seconds, max_loss=budget)
    assert all(start < seconds for _, _, start in stage.calls)
    assert stage.now <= seconds + max(1.0, *(plant.seconds for plant in made.values()))
    json.dumps(found.to_dict(), allow_nan=False)
    if found.chosen == BASE:
        return
    name = chosen(found)
    plant = made[name]
    seen = [number for who, number, _ in stage.calls if who == name and number >= stage.dev]
    wrong = [random.Random(f"{seed} {name} {number}").random() < plant.held for number in seen]
    before = [random.Random(f"{seed} plain {number}").random() < baseline for number in seen]
    assert 1 / plant.seconds >= FASTER - 1e-9
    assert len(seen) >= 4
    assert wrong == before if plant.exact else sum(wrong) - sum(before) <= budget * len(seen) + 1e-9
    assert plant.exact or budget > 0


def test_a_loss_above_the_budget_is_accepted_no_more_often_than_promised():
    accepted = sum(
        chosen(Stage({f"n{i}": Plant(0.2, 0.15, 0.15) for i in range(3)}, held=150, seed=seed).run(max_loss=0.1)) != "plain"
        for seed in range(20)
    )
    assert accepted <= 1


def test_the_baseline_is_asked_where_it_is_needed_and_no_gain_or_loss_is_made_up():
    stage = Stage({"a": Plant(0.1, 0.0, 0.1), "b": Plant(0.2)}, held=80, base=Plant(1.0, 0.0, 0.5, exact=True))
    found = stage.run(max_loss=0.12)
    asked = {
        who: {number for name, number, _ in stage.calls if name == who and number >= 40} for who in ("plain", "a", "b")
    }
    wrong = {number for number in asked["a"] if random.Random(f"0 a {number}").random() < 0.1}
    turns = set(range(40, 56))
    assert asked["a"] == asked["b"] >= turns
    assert asked["plain"] == turns | wrong
    assert wrong - turns
    worse = {number for number in range(40, 120) if random.Random(f"0 plain {number}").random() < 0.5}
    for one, bad in zip(found.to_dict()["tried"], (wrong, set()), strict=True):
        most = sum((number in bad) - (number in worse and number in asked["plain"]) for number in asked["a"])
        assert one["held_out"]["loss"] == pytest.approx(most / len(asked["a"]), abs=1e-4)
        assert one["held_out"]["timed"] == 16


def test_without_a_verifier_the_baseline_answers_every_prompt():
    stage = Stage({"a": Plant(0.1), "b": Plant(0.2, exact=True)}, verified=False)
    stage.run(max_loss=0.2)
    held = [{number for name, number, _ in stage.calls if name == who and number >= 40} for who in ("plain", "a", "b")]
    assert held[0] == held[1] == set(range(40, 88))
    assert held[2] == set(range(40, 56)), "an exact one leaves the time to those that need it"


def test_few_prompts_cannot_show_a_small_loss_and_the_words_say_what_would():
    found = Stage({"lossy": Plant(0.1), "exact": Plant(0.7, exact=True)}, held=30).run(max_loss=0.01)
    assert chosen(found) == "exact"
    assert "30 held-out prompts cannot show a loss below" in found.why
    many = Stage({"lossy": Plant(0.1), "exact": Plant(0.7, exact=True)}, held=700).run(max_loss=0.01)
    assert chosen(many) == "lossy"


def test_without_verifiers_quality_is_agreement_with_the_exact_text():
    found = Stage({"other words": Plant(0.1, 0.4, 0.4), "same": Plant(0.5)}, verified=False).run(max_loss=0.2)
    assert chosen(found) == "same"
    table = {tuple(one["method"]): one for one in found.to_dict()["tried"]}
    assert table["same",]["held_out"]["quality"] == 1.0
    assert table["other words",]["held_out"]["quality"] < 0.75


def test_a_method_that_fails_is_left_out_and_a_failing_baseline_is_told():
    found = Stage({"broken": Plant(0.1, exact=True, fails=True), "fine": Plant(0.5, exact=True)}).run()
    assert chosen(found) == "fine"
    assert found.trials[0].fate == "failed: it does not like this prompt"
    with pytest.raises(HastenError, match="does not like"):
        Stage({"plain": Plant(1.0, fails=True)}).run()


def test_time_is_shared_and_the_rest_is_said_not_to_be_tried():
    stage = Stage({f"e{i}": Plant(1.0 - i / 50, exact=True) for i in range(20)})
    found = stage.run(seconds=10.0)
    assert found.chosen == BASE
    assert stage.now <= 11.0
    assert sum(trial.fate == "not tried: time was up" for trial in found.trials) >= 12
    assert found.seconds == stage.now


@pytest.mark.parametrize(("seconds", "confirmed"), [(3.0, False), (4.2, False), (6.0, True)])
def test_too_few_held_out_prompts_confirm_nothing(seconds, confirmed):
    found = Stage({"quick": Plant(0.1, exact=True)}).run(seconds=seconds)
    assert (chosen(found) == "quick") is confirmed
    assert found.trials[0].fate == ("" if confirmed else "not confirmed: time was up")


def test_finalists_are_asked_in_turning_order_and_start_fresh():
    marks: list[int] = []
    stage = Stage({f"e{i}": Plant(0.5 + i / 40, exact=True) for i in range(12)})
    found = stage.run(fresh=lambda: marks.append(len(stage.calls)))
    assert len(marks) == 2
    held = [name for name, number, _ in stage.calls[marks[1] + 1 :] if number >= stage.dev]
    firsts = {held[i] for i in range(0, len(held), FINALISTS + 1)}
    assert firsts == {"plain", "e0", "e1", "e2", "e3"}
    asked = [number for name, number, _ in stage.calls if name == "e0"]
    assert len(asked) == len(set(asked)), "no prompt is asked twice"
    assert chosen(found) == "e0"


def test_on_a_real_engine_wrong_and_slowed_methods_lose_and_nothing_lossy_runs_unasked(monkeypatch):
    import hasten
    from hasten.bench import splits, tune

    plant(monkeypatch, sly=(Trusting, "exact"), slow=(Slowed, "exact"))
    llm = hasten.load("mini-ar", cache_bytes=50_000_000)
    parts = splits.from_suites(llm, ("copy",), max_tokens=32)
    few = Splits(parts.dev[:2], parts.held_out[:6], parts.what, parts.quality)
    ran: list[tuple[str, ...]] = []

    def answer(one: Candidate, task: Task) -> Answer:
        ran.append(one.methods)
        return tune.runner(llm, 16)(one, task)

    names = (("sly",), ("slow",), ("sly", "prompt-lookup"))
    claimed = Space(BASE, tuple(Candidate(one, True) for one in names), {})
    found = search(claimed, few, answer, seconds=60)
    assert found.chosen == BASE
    fates = {trial.candidate.methods: trial.fate for trial in found.trials}
    assert "another text in" in fates["sly",]
    assert fates["sly", "prompt-lookup"].startswith("failed: ")
    assert fates["slow",].startswith("no faster")
    ran.clear()
    search(Space(BASE, (Candidate(("sly",), False), Candidate(("slow",), True)), {}), few, answer, seconds=60)
    assert set(ran) == {("plain",), ("slow",)}
    lossy = search(Space(BASE, (Candidate(("sly",), False),), {}), few, answer, seconds=60, max_loss=0.5)
    assert lossy.chosen == BASE
    assert lossy.trials[0].held_out


@pytest.mark.parametrize(("seconds", "budget", "field"), [(0.0, 0.0, "seconds"), (9.0, 1.0, "max_quality_loss"),
                                                         (9.0, -0.1, "max_quality_loss"), (float("nan"), 0.0, "seconds")])  # fmt: skip
def test_wrong_bounds_are_refused(seconds, budget, field):
    with pytest.raises(ConfigError) as caught:
        Stage({}).run(seconds=seconds, max_loss=budget)
    assert caught.value.field == field
