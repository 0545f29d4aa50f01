"""What parallel decoding must cost, against enumeration; the oracle by simulation and in the engine's own canvas loop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from test_parallelbench import EVERY, items_of

from hasten.bench import parallelbench as bench
from hasten.bench.parallel.decoding import ask_oracle
from hasten.bench.parallel.oracle import Oracle, Orders, simulate
from hasten.bench.parallel.questions import questions
from hasten.bench.parallel.theory import (
    Law,
    quotas,
    replace_random_correlation,
    replace_random_law,
    replace_random_validity,
    shuffle_correlation,
    shuffle_law,
    shuffle_validity,
)
from hasten.combine import combine
from hasten.engine.contracts import MethodContext
from hasten.errors import ConfigError, IncompatibleError

ONE_ANSWER = ("copy", "reverse", "sort", "insert_index", "remove_index", "replace_index", "sudoku")
# n -> tokens per step -> chance of a right answer, as the benchmark's theory states them
SHUFFLE = {
    4: {1: 1, 2: 0.375, 4: 0.0938}, 6: {1: 1, 2: 0.3125, 3: 0.1235, 6: 0.0154}, 8: {2: 0.2734, 3: 0.1575, 8: 0.0024},
}  # fmt: skip
REPLACE = {4: {2: 0.6562, 3: 0.8438, 4: 0.4219}, 6: {2: 0.7335, 3: 0.6044, 6: 0.4019}, 8: {2: 0.7803, 3: 0.7159, 8: 0.3927}}


@pytest.mark.parametrize(("table", "closed"), [(SHUFFLE, shuffle_validity), (REPLACE, replace_random_validity)])
def test_closed_forms_are_the_published_values(table, closed):
    for n, by_step in table.items():
        for k, wanted in by_step.items():
            assert closed(n, quotas(n, k)) == pytest.approx(wanted, abs=6e-5)


def test_total_correlation_is_counted_as_stated():
    for n in range(2, 7):
        assert shuffle_law(n).total_correlation() == pytest.approx(shuffle_correlation(n))
        assert replace_random_law(n).total_correlation() == pytest.approx(replace_random_correlation(n))
        assert math.exp(-shuffle_correlation(n)) == pytest.approx(math.factorial(n) / n**n)
        assert math.exp(-replace_random_correlation(n)) == pytest.approx((1 - 1 / n) ** (n - 1))
        for law in (shuffle_law(n), replace_random_law(n)):  # symmetric: one step is right as often as exp(-C)
            assert law.validity() == pytest.approx(math.exp(-law.total_correlation()))
    assert Law.of([["a", "b", "c"]]).total_correlation() == 0
    assert shuffle_correlation(1) == replace_random_correlation(1) == 0


def random_laws(count: int) -> list[Law]:
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        places, pieces = int(rng.integers(2, 5)), int(rng.integers(2, 4))
        rows = np.unique(rng.integers(0, pieces, (int(rng.integers(2, 12)), places)), axis=0)
        out.append(Law(rows, tuple("abc"[:pieces])))
    return out


def test_validity_and_bounds_agree_with_enumeration():
    """Every outcome of independent draws, listed with its probability, beside what the law computes by counting."""
    for law in random_laws(12):
        right = {tuple(row) for row in law.answers.tolist()}
        for steps in ([[i] for i in range(law.places)], [list(range(law.places))], [[1], [0, *range(2, law.places)]]):
            drawn = {(): 1.0}
            known: list[int] = []
            for step in steps:
                grown = {}
                for values, chance in drawn.items():
                    fitting = [row for row in law.answers.tolist() if all(row[p] == v for p, v in zip(known, values))]
                    for more in itertools.product(range(len(law.pieces)), repeat=len(step)):
                        odds = [sum(row[p] == v for row in fitting) / max(1, len(fitting)) for p, v in zip(step, more)]
                        grown[(*values, *more)] = chance * math.prod(odds)
                drawn, known = grown, known + list(step)
            order = [known.index(p) for p in range(law.places)]
            hit = sum(c for values, c in drawn.items() if tuple(values[i] for i in order) in right)
            assert law.validity(steps) == pytest.approx(hit)
            emitted = {tuple(values[i] for i in order): c for values, c in drawn.items()}
            kl = sum(math.log(1 / len(right) / emitted[row]) / len(right) for row in right)
            assert law.bound(steps) == pytest.approx(kl, abs=1e-9)
            assert hit >= math.exp(-kl) - 1e-12


def test_the_best_bound_falls_with_steps_and_is_nought_for_single_tokens():
    for law in (shuffle_law(4), replace_random_law(4), *random_laws(4)):
        found = [law.best(count) for count in range(1, law.places + 1)]
        values = [value for value, _ in found]
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(law.total_correlation())
        assert values[-1] == pytest.approx(0, abs=1e-9)
        for count, (value, steps) in enumerate(found, 1):
            assert len(steps) == count
            assert law.bound(steps) == pytest.approx(value, abs=1e-9)
        two = [
            law.bound([first, [i for i in range(law.places) if i not in first]])
            for size in range(1, law.places) for first in map(list, itertools.combinations(range(law.places), size))
        ]  # fmt: skip
        assert values[1] == pytest.approx(min(two), abs=1e-9)


def test_wrong_laws_and_steps_are_refused():
    for bad in ([["a"], ["a"]], [["a"], ["a", "b"]], []):
        with pytest.raises(ConfigError):
            Law.of(bad)
    law = shuffle_law(3)
    for steps in ([[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]):
        with pytest.raises(ConfigError, match="division of the places"):
            law.bound(steps)
    for call in (lambda: quotas(4, 5), lambda: shuffle_validity(4, (2, 3)), lambda: law.best(4), lambda: Law.of([["a"] * 9]).best(2),
                 lambda: simulate(law, (2, 2), 10), lambda: simulate(law, (3,), 0), lambda: shuffle_law(9), lambda: Orders(0)):  # fmt: skip
        with pytest.raises(ConfigError):
            call()


# --- oracle ---


@pytest.mark.parametrize("n", [4, 6, 8])
def test_the_oracle_is_right_as_often_as_theory_says(n):
    draws = 20_000
    laws = ((SHUFFLE, Orders(n), shuffle_validity), (REPLACE, replace_random_law(n), replace_random_validity))
    for table, law, closed in laws:
        for k in {1, *table[n]}:
            exact = closed(n, quotas(n, k))
            sigma = math.sqrt(exact * (1 - exact) / draws)
            assert abs(simulate(law, quotas(n, k), draws, seed=n + k) - exact) <= 3 * sigma + 1e-12


def test_listed_and_worked_out_orders_are_the_same_law():
    rng = np.random.default_rng(1)
    committed = rng.integers(-1, 4, (300, 4))
    one, fits_one = Orders(4).conditional(committed)
    law = shuffle_law(4)
    ranks = np.array([int(piece) for piece in law.pieces])  # piece i of the law is the item ranks[i]
    two, fits_two = law.conditional(np.where(committed < 0, -1, np.argsort(ranks)[committed]))
    assert (fits_one == fits_two).all()
    np.testing.assert_allclose(one[:, :, ranks], two, atol=1e-6)
    np.testing.assert_allclose(two.sum(2), 1, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_one_token_per_step_is_always_right(name):
    task = EVERY[name]
    asked = questions(task, 4)
    for methods, temperature in ((("reference:block=64,score=random",), 1.0), (("reference:block=64",), 0.0)):
        for question, (text, made) in zip(asked, ask_oracle(task, asked, methods, temperature=temperature)):
            assert task.score(question, text) == (True, True)
            assert made.output.usage.forwards == len(made.steps) == len(next(task.pieces(question)))


@pytest.mark.parametrize("name", [*ONE_ANSWER, "world copy", "world sums"])
def test_one_right_answer_is_found_in_any_steps(name):
    task = EVERY[name]
    asked = questions(task, 4)
    for steps in (1, 2, 3):
        methods = (f"reference:block=64,steps={steps},score=random",)
        made = ask_oracle(task, asked, methods)
        assert all(task.score(question, text) == (True, True) for question, (text, _) in zip(asked, made))
        assert {one.output.usage.forwards for _, one in made} <= set(range(1, steps + 1))


def test_the_loop_fails_as_often_as_theory_says():
    """The engine's own sampler on the oracle: 300 canvases of four items, two steps and one."""
    task = bench.TASKS["replace_random"]
    asked = questions(task, 300, lengths=(4,))
    for steps, exact in ((2, REPLACE[4][2]), (1, REPLACE[4][4])):
        methods = (f"reference:steps={steps},score=random",)
        right = sum(
            task.score(question, text)[0]
            for seed in (1,)
            for question, (text, _) in zip(asked, ask_oracle(task, asked, methods, seed=seed))
        )
        assert abs(right / 300 - exact) <= 3 * math.sqrt(exact * (1 - exact) / 300)


def test_greedy_in_one_step_keeps_everything_and_one_by_one_replaces():
    task = bench.TASKS["replace_random"]
    asked = questions(task, 8)
    for (text, _), question in zip(ask_oracle(task, asked, ("reference:steps=1",), temperature=0.0), asked):
        assert items_of(text) == tuple(question.facts["input"])
    made = ask_oracle(task, asked, ("reference",), temperature=0.0)
    assert all(task.score(question, text)[0] for question, (text, _) in zip(asked, made))


def test_a_threshold_on_the_oracle_is_as_fast_as_the_task_allows():
    fast = ask_oracle(bench.TASKS["copy"], questions(bench.TASKS["copy"], 4), ("threshold",))
    slow = ask_oracle(bench.TASKS["shuffle"], questions(bench.TASKS["shuffle"], 4), ("threshold",))
    assert {one.output.usage.forwards for _, one in fast} == {1}
    assert [one.output.usage.forwards for _, one in slow] == [3, 4, 5, 6]


def test_every_setting_of_the_published_grid_is_legal_and_ends():
    oracle = Oracle([Law.of([["a", "b"], ["b", "a"]])])
    settings = [one for length in (32, 64) for family in bench.protocol(length).values() for one in family]
    assert len(settings) == 4 * 49 + 78 + 65 + 78
    for setting in settings:
        assert combine(setting, MethodContext("oracle", oracle), lambda: pytest.fail("no drafts here")).canvas is not None
    task = bench.TASKS["latin_square"]
    asked = questions(task, 1)
    for family in bench.protocol(32).values():
        [(text, made)] = ask_oracle(task, asked, [family[0][0].replace("block=1,", "block=16,"), *family[0][1:]])
        assert len(made.steps) == 16
        assert text.count(",") == 12


def test_the_oracle_refuses_what_it_cannot_do():
    oracle = Oracle([Law.of([["a", "b"], ["b", "a"]])])
    with pytest.raises(ConfigError):
        oracle.prompt(1)
    with pytest.raises(ConfigError):
        Oracle([])
    with pytest.raises(IncompatibleError, match="keys"):
        ask_oracle(bench.TASKS["copy"], questions(bench.TASKS["copy"], 2), ("canvas-cache",))
    logits = oracle._logits(torch.tensor([*oracle.prompt(0), 1, 1]))  # no answer fits: marginals
    assert logits.exp()[1:, 1:3].tolist() == [[0.5, 0.5], [0.5, 0.5]]
