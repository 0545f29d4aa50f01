"""Prompts of a search: files are read or refused line by line, and no prompt stands in both parts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten
from hasten.bench import splits, suites
from hasten.bench.splits import from_file, from_suites, known_worlds, read_prompts
from hasten.errors import ConfigError, FormatError, HastenError, UnknownNameError
from hasten.worlds import split_of


@pytest.fixture(scope="module")
def llm():
    return hasten.load("mini-ar", cache_bytes=20_000_000)


def write(path, *entries) -> object:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in entries), encoding="utf-8")
    return path


def many(count: int, **more) -> list[dict]:
    return [{"prompt": f"copy: {'cat ' * (i + 1)}".strip(), **more} for i in range(count)]


def test_a_file_is_split_without_a_shared_prompt_and_alike_for_a_seed(llm, tmp_path):
    path = write(tmp_path / "p.jsonl", *many(12), "", *many(12))  # every prompt twice
    parts = from_file(llm, path, seed=1)
    dev, held = ([task.ids for task in one] for one in (parts.dev, parts.held_out))
    assert (len(dev), len(held)) == (4, 8)
    assert not set(dev) & set(held)
    assert {llm.decode(list(ids)) for ids in (*dev, *held)} == {one["prompt"] + "\n" for one in many(12)}
    assert from_file(llm, path, seed=1) == parts
    assert from_file(llm, path, seed=2) != parts
    assert "agreement with the exact text" in parts.quality
    assert parts.what == "12 prompts of p.jsonl"
    raw = from_file(llm, path, seed=1, raw=True)
    assert [task.ids for task in raw.dev] == [ids[:-1] for ids in dev]


def test_an_answer_is_right_when_it_is_equal_and_counted_as_such(llm, tmp_path):
    whole = from_file(llm, write(tmp_path / "p", *many(9, answer=" right ")))
    assert all(task.verify("right\n") and not task.verify("right!") for task in (*whole.dev, *whole.held_out))
    assert whole.quality == "answers equal to the given ones"
    half = from_file(llm, write(tmp_path / "q", *many(9)[:5], *many(9, answer="x")[5:]))
    assert half.quality.startswith("answers equal to the given ones (4 of 9 prompts), agreement")
    assert sum(task.verify is not None for task in (*half.dev, *half.held_out)) == 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ("[1]", "a JSON object"),
        ('{"prompt": 3}', "prompt = 3"),
        ('{"prompt": ""}', "0 characters"),
        ('{"answer": "x"}', "0 characters"),
        ('{"prompt": "x", "anser": "y"}', "did you mean 'answer'"),
        ('{"prompt": "copy: cat", "answer": "dog"}', "another answer"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ("[" * 5000, "line 2"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path, line, says):
    with pytest.raises(FormatError, match=says) as caught:
        read_prompts(write(tmp_path / "p", {"prompt": "copy: cat", "answer": "cat"}, line))
    assert "line 2" in str(caught.value)
    assert caught.value.field == "prompts"


def test_files_that_are_no_text_or_too_small_or_too_long_are_refused(llm, tmp_path):
    (tmp_path / "bytes").write_bytes(b'{"prompt": "\xff"}')
    for path in (tmp_path / "bytes", tmp_path / "absent", tmp_path):
        with pytest.raises(FormatError):
            read_prompts(path)
    with pytest.raises(ConfigError, match="7 different prompts"):
        from_file(llm, write(tmp_path / "p", *many(7), *many(7)))
    with pytest.raises(ConfigError, match="prompt 9 of") as caught:
        from_file(llm, write(tmp_path / "p", *many(8), {"prompt": "cat " * 300}))
    assert caught.value.field == "prompts"


VALUES = st.one_of(st.none(), st.integers(), st.text(max_size=8), st.lists(st.text(max_size=3), max_size=2))


@settings(max_examples=80)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.dictionaries(st.sampled_from(["prompt", "answer", "x"]), VALUES, max_size=3).map(json.dumps), max_size=6
        ).map(lambda lines: "\n".join(lines).encode()),
    )
)
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data)
    try:
        found = read_prompts(path)
    except FormatError:
        return
    assert len({prompt for prompt, _ in found}) == len(found)
    assert all(prompt and (answer is None or isinstance(answer, str)) for prompt, answer in found)


def test_tasks_of_worlds_are_unseen_disjoint_and_verified(llm):
    parts = from_suites(llm, ("sort", "add"), max_tokens=32)
    texts = [{llm.decode(list(task.ids)) for task in one} for one in (parts.dev, parts.held_out)]
    assert [{split_of(text) for text in one} for one in texts] == [{"dev"}, {"test"}]
    assert [len(one) for one in texts] == [len(parts.dev), len(parts.held_out)]
    assert len(parts.dev) == 64
    assert len(parts.held_out) >= 500
    assert {text.split(":")[0] for text in list(texts[1])[:40]} == {"sort", "add"}
    task = next(task for task in parts.dev if llm.decode(list(task.ids)).startswith("sort"))
    letters = llm.decode(list(task.ids)).split(": ")[1].split()
    assert task.verify(" ".join(sorted(letters)))
    assert not task.verify(" ".join([*letters[::-1], "q"]))
    again = from_suites(llm, ("sort", "add"), max_tokens=32)
    assert [task.ids for task in again.held_out] == [task.ids for task in parts.held_out]


def test_a_model_that_comes_with_hasten_is_asked_what_it_knows(llm):
    assert set(known_worlds("mini-ar", 64)) >= {"copy", "sort", "add", "records"}
    assert "shuffle" not in known_worlds("mini-ar", 64)
    assert "records" not in known_worlds("mini-dlm", 32)
    assert known_worlds("smollm2-135m", 64) == known_worlds("/some/where", 64) == ()
    assert from_suites(llm, max_tokens=32).what.startswith("tasks of ")


def test_prompts_of_suites_are_disjoint(llm):
    assert tuple(splits.GROUPS) == tuple(suites.draws(1, 0))
    parts = from_suites(llm, ("chat", "arithmetic"))
    dev, held = ({task.ids for task in one} for one in (parts.dev, parts.held_out))
    assert (len(dev), len(held), dev & held) == (8, 16, set())
    assert parts.what == "prompts of chat, arithmetic"
    alone = from_suites(llm, ("edit",))  # which has more
    assert len(alone.dev) > 4
    assert not {task.ids for task in alone.dev} & {task.ids for task in alone.held_out}


@pytest.mark.parametrize(("names", "kind"), [(("sorting",), UnknownNameError), (("sort", "chat"), ConfigError)])
def test_wrong_suites_are_refused(llm, names, kind):
    with pytest.raises(kind):
        from_suites(llm, names)
    with pytest.raises(HastenError):
        from_suites(llm, ("records",), max_tokens=8)
