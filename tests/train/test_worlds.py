"""Worlds: answers their verifiers accept, broken ones they refuse, sizes that fit canvases, and splits that never meet."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.train import alphabet
from hasten.worlds import SPLITS, WORLDS, split_of

SOME = [pytest.param(world, id=name) for name, world in WORLDS.items()]
SEEDS = st.integers(0, 2**32)
HARD = st.floats(0, 1)
EXAMPLES = {
    "copy": ("copy: cat sun pen\n", "cat sun pen"),
    "reverse": ("reverse: a d k\n", "k d a"),
    "sort": ("sort: k a d\n", "a d k"),
    "replace": ("replace d>x: a d k\n", "a x k"),
    "remove": ("remove d: a d k\n", "a k"),
    "close": ("close: ([{\n", "}])"),
    "add": ("add: 47+85\n", "7+5+0=12;4+8+1=13;132"),
    "subtract": ("subtract: 85-47\n", "5-7-0=18;8-4-1=03;38"),
    "sums": ("sum: 7 5 9\n", "07+5=12;12+9=21"),
    "records": ("records: 21 bob 31;22 eve 25\n", '[{"id":21,"who":"bob","age":31},{"id":22,"who":"eve","age":25}]'),
}
METAS = {
    "copy": {"items": ["cat", "sun", "pen"]},
    "reverse": {"items": ["a", "d", "k"]},
    "sort": {"items": ["k", "a", "d"]},
    "shuffle": {"items": ["a", "d", "k"]},
    "replace": {"items": ["a", "d", "k"], "old": "d", "new": "x"},
    "remove": {"items": ["a", "d", "k"], "gone": "d"},
    "close": {"opened": ["(", "[", "{"]},
    "add": {"a": 47, "b": 85},
    "subtract": {"a": 85, "b": 47},
    "sums": {"terms": [7, 5, 9]},
    "records": {"rows": [(21, "bob", 31), (22, "eve", 25)]},
}
WRONG = {
    "copy": ("cat sun", "cat sun pen fig", "sun cat pen", "cat  sun pen"),
    "reverse": ("a d k", "k d", "k d a a"),
    "sort": ("a k d", "a d", "a d d k", "a b d k", "a d k k"),
    "shuffle": ("a d", "a d d", "a d k k", "a d x"),
    "replace": ("a d k", "a x", "x x k", "a x k x"),
    "remove": ("a d k", "k a", "a", "a k k"),
    "close": ("])}", "}]", "}])]", ""),
    "add": ("132", "7+5+0=12;4+8+0=12;132", "7+5+0=12;4+8+1=13;131", "7+5+0=12;132", "7+5+0=12;4+8+1=13;0132"),
    "subtract": ("38", "5-7-0=18;8-4-0=04;38", "5-7-0=18;8-4-1=03;48", "5-7-0=08;8-4-1=03;38", "5-7-0=18;8-4-1=13;38"),
    "sums": ("07+5=12", "07+5=12;12+9=22", "07+5=13;13+9=22", "07+9=16;16+5=21", "07+5=12;12+9=21;21+0=21", "7+5=12;12+9=21"),
    "records": (
        '[{"id":21,"who":"bob","age":31}]',
        '[{"id":21,"who":"bob","age":31},{"id":22,"who":"eve","age":26}]',
        '[{"id":21,"who":"bob","age":31},{"id":22,"who":"eve","age":25}',
        '[{"id":"21","who":"bob","age":31},{"id":22,"who":"eve","age":25}]',
        '[{"who":"bob","id":21,"age":31},{"who":"eve","id":22,"age":25}]',
        "[" * 100_000,
        "null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("world", SOME)
@given(seed=SEEDS, difficulty=HARD)
def test_generated_answers_are_right_plain_and_fit(world, seed, difficulty):
    sample = world.generate(Random(seed), difficulty)
    assert world.verify(sample.meta, sample.answer) == 1
    assert sample.prompt.endswith("\n")
    assert sample.prompt.count("\n") == 1
    assert "\n" not in sample.answer
    assert alphabet.decode(alphabet.encode(sample.prompt + sample.answer)) == sample.prompt + sample.answer
    least, most = world.sizes
    size = least + round(difficulty * (most - least))
    assert len(sample.answer) <= world.length(size)
    assert len(sample.prompt) + world.length(most) + 1 < 1024


@pytest.mark.parametrize("world", SOME)
@given(seed=SEEDS, difficulty=HARD, data=st.data())
def test_a_broken_answer_is_refused(world, seed, difficulty, data):
    """Any one character changed, dropped or doubled; what is still right (another order of `shuffle`) is right by its rule."""
    sample = world.generate(Random(seed), difficulty)
    at = data.draw(st.integers(0, len(sample.answer) - 1))
    kind = data.draw(st.sampled_from(["drop", "double", "change"]))
    old = sample.answer[at]
    new = {"drop": "", "double": old * 2, "change": "~"}[kind]
    broken = sample.answer[:at] + new + sample.answer[at + 1 :]
    score = world.verify(sample.meta, broken)
    assert 0 <= score < 1


@pytest.mark.parametrize("world", SOME)
@given(seed=SEEDS, text=st.text(max_size=60))
def test_any_text_has_a_score(world, seed, text):
    sample = world.generate(Random(seed), 0.0)
    assert 0 <= world.verify(sample.meta, text) <= 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_documented_example(name):
    prompt, answer = EXAMPLES[name]
    assert WORLDS[name].verify(METAS[name], answer) == 1
    assert prompt in {f"{line}\n" for line in _documented(name)}


def _documented(name: str) -> list[str]:
    """Prompts that stand in the description of a world's module."""
    import importlib
    import re

    text = importlib.import_module(f"hasten.worlds.{name}").__doc__ or ""
    return re.findall(r"`([^`]+)` -> ", text)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_a_wrong_answer_is_refused(name, text):
    assert WORLDS[name].verify(METAS[name], text) < 1


def test_every_order_of_a_shuffle_is_right():
    assert WORLDS["shuffle"].verify(METAS["shuffle"], "k a d") == 1
    assert WORLDS["shuffle"].verify(METAS["shuffle"], "a d k") == 1


def test_a_score_grows_with_what_is_right():
    world, meta = WORLDS["sums"], METAS["sums"]
    assert world.verify(meta, "xx") < world.verify(meta, "07+5=12;12+9=22") < 1


@pytest.mark.parametrize("world", SOME)
def test_the_same_seed_gives_the_same_sample_and_difficulty_is_checked(world):
    assert world.generate(Random(7), 0.5) == world.generate(Random(7), 0.5)
    assert world.generate(Random(7), world.difficulty(world.sizes[1])).prompt
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="difficulty"):
            world.generate(Random(0), bad)
    with pytest.raises(ConfigError, match="size"):
        world.difficulty(world.sizes[1] + 1)


def test_canvases_hold_what_is_said_to_fit():
    world = WORLDS["records"]
    assert world.fitting(32) == []
    assert world.fitting(64) == [1, 2]
    assert world.fitting(512, 256)[-1] == 16
    assert {canvas for canvas in (32, 64, 128, 256, 512) if WORLDS["copy"].fitting(canvas, canvas // 2)} == {
        32, 64, 128, 256, 512,
    }  # fmt: skip


def test_splits_are_disjoint_and_as_large_as_said():
    found = {split: set() for split in SPLITS}
    rng = Random(0)
    for i in range(6000):
        world = list(WORLDS.values())[i % len(WORLDS)]
        prompt = world.generate(rng, rng.random()).prompt
        found[split_of(prompt)].add(prompt)
        assert split_of(prompt) == split_of(prompt.strip()) == split_of(f" {prompt}")
    total = sum(map(len, found.values()))
    assert not found["train"] & (found["dev"] | found["test"])
    assert not found["dev"] & found["test"]
    for split, share in (("train", 0.9), ("dev", 0.05), ("test", 0.05)):
        assert abs(len(found[split]) / total - share) < 0.015


def test_the_alphabet_is_what_people_can_type():
    assert alphabet.SIZE == 100
    with pytest.raises(ConfigError, match="ASCII"):
        alphabet.encode("caf\u00e9")
    assert alphabet.decode([alphabet.BOS, *alphabet.encode("a b"), alphabet.EOS, *alphabet.encode("c")]) == "a b"
