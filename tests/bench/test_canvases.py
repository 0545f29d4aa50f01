"""The shared experiment of canvas reproductions: unseen tasks, figures worked out as stated, a slow arm seen as slow."""

from __future__ import annotations

import json
import time

import pytest

from hasten.bench.canvases import SEEDS, Answer, Row, Task, Trial, conclude, open_mini, tasks, trial
from hasten.errors import ConfigError, UnknownNameError
from hasten.worlds import WORLDS, Sample, split_of


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def test_tasks_are_unseen_different_and_fill_the_canvas():
    drawn = tasks(("records", "sort"), 128, 3)
    assert [(task.seed, task.world) for task in drawn[:6]] == [(0, "records")] * 3 + [(0, "sort")] * 3
    assert len({task.sample.prompt for task in drawn}) == len(drawn) == 2 * 3 * len(SEEDS)
    assert {split_of(task.sample.prompt) for task in drawn} == {"test"}
    assert all(64 < len(task.sample.answer) + 1 <= 128 for task in drawn if task.world == "records")
    assert [task.sample for task in tasks(("sort",), 64, 2)] == [task.sample for task in tasks(("sort",), 64, 2)]


def test_unknown_worlds_and_canvases_too_short_are_refused():
    with pytest.raises(UnknownNameError):
        tasks(("sorting",), 64, 1)
    with pytest.raises(ConfigError) as caught:
        tasks(("records",), 8, 1)
    assert caught.value.field == "canvas"


def made(times: dict[str, float], right: dict[str, list[bool]]) -> Trial:
    sample = Sample("p\n", "a", {})
    rows = []
    for i in range(4):
        answers = {arm: Answer("a" if ok[i] else "b", ok[i], times[arm], 4, 40) for arm, ok in right.items()}
        rows.append(Row(Task(i // 2, "sort" if i % 2 else "copy", sample), answers))
    return Trial(tuple(rows), 64)


def test_figures_are_medians_over_seeds_of_what_is_stated():
    one = made({"plain": 2.0, "fast": 0.5}, {"plain": [True] * 4, "fast": [True, False, True, True]})
    assert one.accuracy("fast").to_dict() == {"median": 75.0, "min": 50.0, "max": 100.0}
    assert one.speedup("fast").median == 4.0
    assert one.nfe("fast").median == 4.0
    assert one.same_text("fast") == (3, 4)
    assert one.by_world("fast")["sort"]["accuracy"] == 50.0
    with pytest.raises(UnknownNameError):
        one.accuracy("faster")


def test_a_record_says_where_the_quality_went():
    one = made({"plain": 2.0, "threshold": 0.5}, {"plain": [True] * 4, "threshold": [True, False, True, True]})
    record = conclude("threshold", one, "threshold", True, time.perf_counter(), quick=True)
    assert record.quality == {"baseline": 100.0, "method": 75.0}
    assert record.speedup.median == 4.0
    assert record.seeds == (0, 1)
    json.dumps(record.to_dict())


def test_a_slowed_arm_is_slower_and_the_same_arm_is_not_another(monkeypatch):
    llm = open_mini(quiet)
    real = type(llm).generate

    def generate(self, prompt, *, method, **options):
        if "threshold:tau=0.5" in method:
            time.sleep(0.2)
        return real(self, prompt, method=method, **options)

    monkeypatch.setattr(type(llm), "generate", generate)
    arms = {"one": ("threshold",), "same": ("threshold",), "slowed": ("threshold:tau=0.5",)}
    done = trial(llm, arms, quick=True, progress=quiet, worlds=("reverse",), canvas=32, per_world=2)
    assert len(done.rows) == 2 * len(SEEDS)
    assert done.same_text("same") == (6, 6)
    assert done.nfe("same") == done.nfe("one")
    assert done.speedup("slowed").max < 1.0


def test_every_default_world_is_known():
    from hasten.bench import canvases

    assert set(canvases.WORLDS) <= set(WORLDS)
    with pytest.raises(ConfigError, match="at least two"):
        trial(None, {"one": ()}, quick=True, progress=quiet)
