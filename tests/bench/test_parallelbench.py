"""ParallelBench: what it asks, what it makes of a model's answers, the published grid, the reproduction's record.

Metrics are in test_parallel_metrics.py, theory and the oracle in test_parallel_oracle.py.
"""

from __future__ import annotations

import itertools
import json
import math
from random import Random

import numpy as np
import pytest
from chat_model import write_model

import hasten
from hasten.bench import parallelbench as bench
from hasten.bench.parallel import curves, puzzles
from hasten.bench.parallel.answers import answer, layout, room
from hasten.bench.parallel.decoding import Decoded
from hasten.bench.parallel.metrics import parse_list
from hasten.bench.parallel.questions import ITEMS, lines, questions
from hasten.bench.parallel.theory import Law
from hasten.errors import ConfigError, UnknownNameError

EVERY = {**bench.TASKS, **{f"world {name}": task for name, task in bench.WORLDS.items()}}


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def items_of(text: str) -> tuple[str, ...]:
    return tuple(parse_list(text) or ())


# --- questions ---


@pytest.mark.parametrize("name", EVERY)
def test_answers_pass_their_own_metric(name):
    task = EVERY[name]
    for items in ("symbols", "names"):
        for question in questions(task, 6, items=items):
            assert task.score(question, question.example) == (True, True)
            for pieces in itertools.islice(task.pieces(question), 200):
                assert task.score(question, task.render(pieces, question)) == (True, True)
            if task.complete and question.meta["length"] < 8:
                answers = [tuple(pieces) for pieces in task.pieces(question)]
                assert len(set(answers)) == len(answers)
                assert question.example in {task.render(pieces, question) for pieces in answers}


@pytest.mark.parametrize("name", EVERY)
def test_equal_seeds_give_equal_bytes_and_other_seeds_others(name):
    task = EVERY[name]
    made = lines(questions(task, 8, seed=5))
    assert made.encode() == lines(questions(task, 8, seed=5)).encode()
    assert made.startswith(lines(questions(task, 3, seed=5)))
    assert made != lines(questions(task, 8, seed=6))
    assert [json.loads(line)["task"] for line in made.splitlines()] == [task.name] * 8


@pytest.mark.parametrize("name", ["copy", "shuffle", "remove_random", "domino", "latin_square", "words_to_sentence_hard"])
def test_no_question_of_one_split_is_of_another(name):
    task = bench.TASKS[name]
    texts = {
        split: {q.prompt.split("\n\n")[-1] for q in questions(task, 40, split=split)} for split in ("train", "dev", "test")
    }
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & texts["test"]
    assert not texts["train"] & texts["dev"]
    if name == "copy":
        lists = {split: {question.example for question in questions(task, 300, split=split)} for split in ("train", "test")}
        shown = {items_of(q.prompt.split("\n\n")[0]) for q in questions(task, 300, split="test")}
        assert not lists["train"] & lists["test"]
        assert not shown & {items_of(one) for one in lists["test"]}, "solved examples are of the training split"


def test_lists_are_asked_in_words_with_a_solved_example():
    [question] = questions(bench.TASKS["insert_index"], 1, items="names", lengths=(4,))
    example, asked = question.prompt.split("\n\n")
    assert asked.count('"') == 2 * 5
    assert f"index {question.meta['index']}" in asked
    assert items_of(question.answer)[question.meta["index"]] == question.meta["word"]
    assert example.count("\n") == 1
    assert question.output_format == '["<mask><mask>", "<mask><mask>", "<mask><mask>", "<mask><mask>", "<mask><mask>"]'
    assert {len(item) for item in ITEMS["names"]} == {2}
    assert len(ITEMS["symbols"]) == 36


def test_lengths_come_in_turn_and_the_other_order_is_fair():
    asked = questions(bench.TASKS["shuffle"], 240, lengths=(3,))
    seen = [tuple(asked[i].facts["input"].index(item) for item in items_of(asked[i].example)) for i in range(240)]
    counts = [seen.count(order) for order in itertools.permutations(range(3)) if order != (0, 1, 2)]
    assert sum(counts) == 240
    assert min(counts) > 24  # five orders, 48 each
    assert [q.meta["length"] for q in questions(bench.TASKS["sort"], 8)] == [3, 4, 5, 6] * 2


def test_puzzles_are_what_they_say():
    assert len(puzzles.latin_squares(4)) == 576
    assert len(puzzles.grids()) == 288
    for question in questions(bench.TASKS["sudoku"], 10):
        shown = question.prompt.split("\n\n")[-1].splitlines()[1:]
        cells = [0 if c == "_" else int(c) for line in shown for c in line]
        assert sum(cell > 0 for cell in cells) == 12
        rows = ["".join(map(str, grid[i : i + 4])) for grid in puzzles.solutions(cells) for i in range(0, 16, 4)]
        assert rows == question.example.splitlines()
    for question in questions(bench.TASKS["arithmetic"], 20, lengths=(5, 50)):
        text = question.prompt.split("\n\n")[-1].split(" = ")[0].replace("×", "*")
        assert str(eval(text)) == question.example
        assert len(question.example) == question.meta["length"]
    [sums] = questions(bench.TASKS["cumulative_sum"], 1, lengths=(12,))
    given = json.loads(sums.prompt.split("\n\n")[-1].split("sums of ")[1].split(".")[0])
    assert json.loads(sums.example) == list(itertools.accumulate(given))


# --- figures ---


def test_rank_correlations_agree_with_plain_counting():
    rng = Random(2)
    for _ in range(60):
        n = rng.randint(2, 9)
        a, b = [rng.randint(0, 5) for _ in range(n)], [rng.randint(0, 5) for _ in range(n)]
        pairs = list(itertools.combinations(range(n), 2))
        agree = sum((a[i] - a[j]) * (b[i] - b[j]) > 0 for i, j in pairs)
        differ = sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in pairs)
        scale = math.sqrt(sum(a[i] != a[j] for i, j in pairs) * sum(b[i] != b[j] for i, j in pairs))
        found = curves.kendall(a, b)
        assert found == (None if scale == 0 else pytest.approx((agree - differ) / scale))
        ranks = [[sorted(v).index(x) + (v.count(x) - 1) / 2 for x in v] for v in (a, b)]
        rho = curves.spearman(a, b)
        assert rho == (None if scale == 0 else pytest.approx(float(np.corrcoef(ranks)[0, 1])))
    assert curves.kendall([0, 1, 2], [5, 6, 9]) == curves.spearman([0, 1, 2], [5, 6, 9]) == 1
    assert curves.kendall([], []) is None
    assert curves.spearman([1], [1]) is None
    with pytest.raises(ConfigError):
        curves.kendall([1, 2], [1])


def test_area_and_adaptivity_of_a_curve():
    points = [(1.0, 100.0), (2.0, 99.5), (4.0, 60.0), (4.0, 70.0)]
    assert curves.frontier(points) == [(1.0, 100.0), (2.0, 99.5), (4.0, 70.0)]
    assert curves.area(points) == pytest.approx((99.75 + 2 * 84.75) / 3)
    assert curves.adaptive(points) == 2.0
    assert curves.adaptive(points, loss=40) == 4.0
    assert curves.area(points[:1]) is None
    assert curves.adaptive([(1.0, 0.0), (8.0, 0.0)]) is None, "nothing to lose"
    assert curves.adaptive([]) is None


def test_steps_of_an_answer_are_its_commits():
    made = Decoded(None, {0: 7, 2: 3, 4: 7})  # type: ignore[arg-type]
    assert made.parallel((0, 2, 4)) == [[1], [0, 2]]
    assert made.parallel((0, 1)) is None


# --- protocol ---


def test_the_grid_is_the_published_one():
    for score in bench.SCORES:
        assert sum(len(bench.protocol(length)[score]) for length in (32, 64)) == 49
    assert len(bench.protocol(32)["threshold"]) == 6 * 6
    assert len(bench.protocol(64)["factor"]) == 7 * 5
    assert bench.fixed("margin", 32, 8, 16) == ("reference:block=8,steps=16,score=margin",)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("prob", 32, 8, 6), "a multiple of 4, the number of blocks, up to 32: 4, 8, 12"),
        (("prob", 32, 8, 64), "up to 32"),
        (("prob", 32, 5, 8), "a divisor of 32: 1, 2, 4, 8, 16, 32"),
        (("best", 32, 8, 8), "unknown score"),
        (("prob", 0, 1, 1), "at least 1"),
    ],
)
def test_settings_that_do_not_divide_are_refused_with_those_that_do(arguments, says):
    with pytest.raises(ConfigError, match=says):
        bench.fixed(*arguments)


def test_counts_lengths_and_items_are_checked():
    copy = bench.TASKS["copy"]
    for arguments in (
        {"count": 0},
        {"count": 2, "lengths": (0,)},
        {"count": 2, "lengths": (36,)},
        {"count": 2, "items": "words"},
    ):
        with pytest.raises(ConfigError):
            questions(copy, **arguments)
    with pytest.raises(ConfigError, match="run out"):
        questions(bench.TASKS["copy"], 200, lengths=(2,))


# --- models ---


@pytest.fixture(scope="module")
def mini():
    """The diffusion model that comes with the package."""
    return hasten.load("mini-dlm", cache_bytes=100_000_000)


def test_a_model_is_measured_task_by_task(mini):
    seen: list[tuple[int, int]] = []
    result = bench.measure(
        mini, [["reference:block=64,steps=1"], ["threshold"]], seed=1, per_task=4, tasks=["reverse", "shuffle"],
        progress=lambda what, done, total: seen.append((done, total)), infill=True,
    )  # fmt: skip
    assert json.loads(json.dumps(result, allow_nan=False))["tasks"] == result["tasks"]
    facts = dict(result["facts"])
    assert facts["reverse, threshold"].startswith("100.0 percent right at ")
    assert facts["reverse"].startswith("total correlation 0.00 to 0.00 nats; within a point of the slowest: ")
    assert len(result["facts"]) == 2 * 3
    assert seen == [(i, 4) for i in range(5)]
    assert (result["suite"], result["words"], result["seed"]) == ("parallelbench", "worlds", 1)
    reverse, shuffle = result["tasks"]["reverse"], result["tasks"]["shuffle"]
    one = reverse["methods"]["reference:block=64,steps=1"]
    assert one["nfe"] == 1
    assert one["tokens_per_step"] == 4.5
    assert one["score"] == one["score_strict"] == 100
    assert one["kendall"] is None, "one step has no order"
    assert reverse["total_correlation"] == {"3": 0, "4": 0, "5": 0, "6": 0}
    assert reverse["adaptivity"] >= 4.5
    free = shuffle["methods"]["reference:block=64,steps=1"]
    law = [Law.of(list(bench.WORLDS["shuffle"].pieces(q))) for q in questions(bench.WORLDS["shuffle"], 4, seed=43)]
    assert free["oracle"] == pytest.approx(25 * sum(one.validity() for one in law), abs=1e-3)
    assert free["validity_gap"] == pytest.approx(free["oracle"] - free["score"], abs=1e-3)
    assert shuffle["total_correlation"]["6"] == pytest.approx(law[3].total_correlation(), abs=1e-4)


def test_unknown_tasks_methods_and_canvases_too_short_are_refused_before_anything_runs(mini):
    def run(**more: object) -> None:
        asked = {"methods": [["reference"]], "tasks": ["reverse"], "seed": 0, "per_task": 2, **more}
        bench.measure(mini, progress=quiet, **asked)  # type: ignore[arg-type]

    with pytest.raises(UnknownNameError, match="known: copy, reverse"):
        run(tasks=["latin_square"])  # not in the words it knows
    with pytest.raises(ConfigError, match="at least 5, the shortest answer of task 'reverse'"):
        run(canvas=4)
    for more in (
        {"methods": []},
        {"methods": [[]]},
        {"seed": -1},
        {"per_task": 0},
        {"methods": [["nothing"]]},
        {"canvas": 0},
    ):
        with pytest.raises(ConfigError):
            run(**more)


def test_a_left_to_right_model_is_measured_in_the_same_way():
    llm = hasten.load("mini-ar", cache_bytes=100_000_000)
    result = bench.measure(llm, [["plain"]], seed=0, per_task=2, progress=quiet, tasks=["copy"])
    row = result["tasks"]["copy"]["methods"]["plain"]
    assert row["score"] == 100
    assert row["tokens_per_step"] == 1
    assert row["kendall"] == row["oracle"] / 100 == 1
    with pytest.raises(ConfigError, match="fills canvases"):
        answer(llm, bench.WORLDS["copy"], questions(bench.WORLDS["copy"], 1), ["plain"], infill=True)


def test_any_chat_model_is_asked_in_plain_words(tmp_path):
    llm = hasten.load(write_model(tmp_path, window=1024), dtype="float32", cache_bytes=20_000_000)
    result = bench.measure(
        llm, [["plain"], ["prompt-lookup"]], seed=3, per_task=2, tasks=["copy", "latin_square"], items="names",
        lengths=(4,), progress=quiet,
    )  # fmt: skip
    assert (result["words"], result["items"]) == ("plain", "names")
    copy = result["tasks"]["copy"]["methods"]
    assert copy["plain"]["nfe"] == 32, "random weights, no end token"
    assert copy["prompt-lookup"]["nfe"] <= 32
    assert copy["plain"]["score"] == copy["prompt-lookup"]["score"] == 0
    assert copy["plain"]["too_long"] == sum(
        len(llm.tokenizer.encode(q.example, bos=False)) > 32
        for q in questions(bench.TASKS["copy"], 2, items="names", seed=45, lengths=(4,))
    )
    assert result["tasks"]["copy"]["adaptivity"] is None
    assert [task["canvas"] for task in result["tasks"].values()] == [32, 64]
    [sentence] = questions(bench.TASKS["words_to_sentence_hard"], 1, lengths=(7,))
    needed = len(llm.tokenizer.encode(sentence.example, bos=False))
    assert 64 < needed <= room(llm, bench.TASKS["words_to_sentence_hard"], [sentence]) < 2 * needed
    with pytest.raises(UnknownNameError, match=r"known: copy, reverse, .*latin_square"):
        bench.measure(llm, [["plain"]], seed=0, per_task=1, tasks=["records"], progress=quiet)


def test_a_layout_finds_the_tokens_of_items(mini):
    task = bench.WORLDS["reverse"]
    [question] = questions(task, 1, lengths=(3,))
    found = layout(mini, task, question)
    assert found.places == (0, 2, 4)
    assert mini.decode([found.ids[at] for at in found.places]) == question.example.replace(" ", "")
    assert (
        layout(mini, bench.TASKS["cumulative_sum"], questions(bench.TASKS["cumulative_sum"], 1, lengths=(9,))[0]).places
        is None
    )


def test_the_record_of_the_reproduction(monkeypatch):
    from hasten.bench.reproduce import parallelbench as reproduction

    monkeypatch.setattr(reproduction, "QUESTIONS", {True: (2, 1), False: (2, 1)})
    monkeypatch.setattr(reproduction, "DRAWS", 200)
    monkeypatch.setattr(reproduction, "LENGTHS", (3,))
    result = reproduction.reproduce(True, quiet)
    assert result.speedup is None
    assert result.seeds == (0, 1, 2)
    assert [bar["label"] for bar in result.extra["bars"]][:2] == ["shuffle, one token per step", "shuffle, two steps"]
    assert set(result.extra["tasks"]) == {"shuffle", "copy", "reverse", "sort"}
    assert set(result.extra["threshold_tokens_per_step"]) == set(result.extra["tasks"])
    assert "tokens per step on shuffle" in result.extra["note"]
    assert "seconds_per_answer" not in json.dumps(result.to_dict())
    score = {arm: [row["score"] for row in rows] for arm, rows in result.extra["tasks"]["shuffle"].items()}
    lost = [1 - b / a if a else 0.0 for a, b in zip(score["one token per step"], score["one step"])]
    assert result.extra["share_lost"]["shuffle"]["max"] == pytest.approx(max(lost), abs=1e-3)
