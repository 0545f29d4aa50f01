"""Prompts of one's own: what a line may be, every wrong line named by its number, and any bytes are lines or an error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hasten
from hasten.bench.cases.prompts import KEYS, cases, holds, parse, read, suite
from hasten.errors import ConfigError, FormatError

GOOD = (
    {"prompt": "Hi"},
    {"prompt": "2 + 2", "answer": "4", "max_tokens": 5, "group": "sums"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "answer": "hello"},
)


def test_a_file_is_read_in_order(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n".join(json.dumps(one) for one in GOOD) + "\n", encoding="utf-8")
    lines = read(path)
    assert [line.prompt for line in lines[:2]] == ["Hi", "2 + 2"]
    assert (lines[1].answer, lines[1].max_tokens, lines[1].group) == ("4", 5, "sums")
    assert [one["role"] for one in lines[2].messages] == ["system", "user"]


BAD = {
    b"{": "not JSON", b"[1]": "not a JSON object", b'"x"': "not a JSON object", b"\xff{}": "not UTF-8", b"{}": "one of",
    b'{"prompt": "a", "messages": []}': "one of", b'{"prompt": ""}': "not empty", b'{"prompt": "  "}': "not empty",
    b'{"prompt": 5}': "prompt", b'{"prompt": null}': "prompt", b'{"prompt": "a", "temperature": 1}': "temperature",
    b'{"prompt": "a", "prompt": "b"}': "twice", b'{"prompt": "a", "max_tokens": 0}': "max_tokens",
    b'{"prompt": "a", "max_tokens": true}': "max_tokens", b'{"prompt": "a", "max_tokens": 1.0}': "max_tokens",
    b'{"prompt": "a", "max_tokens": NaN}': "NaN", b'{"prompt": "a", "max_tokens": 1e999}': "max_tokens",
    b'{"prompt": "a", "answer": 4}': "answer", b'{"prompt": "\\ud800"}': "Unicode", b'{"messages": []}': "messages",
    b'{"messages": [{"role": "user"}]}': "message", b'{"messages": [{"role": "robot", "content": "a"}]}': "message",
    b'{"messages": [{"role": "user", "content": ""}]}': "content", b'{"messages": "Hi"}': "messages",
    b'{"prompt": "a", "group": ""}': "group", b"[" * 100_000: "not JSON", b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}": "",
}  # fmt: skip


@pytest.mark.parametrize("raw", BAD, ids=lambda raw: raw[:40].decode("latin-1"))
def test_a_wrong_line_is_an_error_with_its_number(raw, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + raw + b"\n")
    with pytest.raises(FormatError, match=r"p\.jsonl: line 3: ") as caught:
        read(path)
    assert BAD[raw] in str(caught.value)
    assert len(str(caught.value)) < 600


def test_every_wrong_line_counts_and_the_first_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + b"x\n" * 9)
    with pytest.raises(FormatError, match=r"line 2: .*line 6: .*and 4 more"):
        read(path)
    path.write_bytes(b"\n \n")
    with pytest.raises(FormatError, match="no prompt"):
        read(path)
    with pytest.raises(FormatError, match="cannot be read"):
        read(tmp_path / "none.jsonl")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "role", "content", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_line_or_an_error_of_ours(raw):
    try:
        line = parse(raw)
    except ConfigError as error:
        assert error.message
    else:
        value = json.loads(raw)
        assert set(value) <= set(KEYS)
        assert line.prompt == value.get("prompt", "-")
        assert list(line.messages) == value.get("messages", [])
        assert (line.answer, line.max_tokens) == (value.get("answer"), value.get("max_tokens"))


@given(st.text(max_size=30), st.text(max_size=10), st.text(max_size=10))
def test_an_answer_holds_its_own_words(expected, before, after):
    if expected.split():
        assert holds(expected)(f"{before} {expected} {after}").score == 1


@pytest.mark.parametrize(
    ("expected", "text", "score"),
    [
        ("4", "The answer is 4.", 1), ("4", "It is **4**", 1), ("4", "It is 42.", 0), ("Paris", "paris!", 1),
        ("New  York", "in new york city", 1), ("New York", "York New", 0), ("x", "", 0), ("-", "a - b", 1),
    ],
)  # fmt: skip
def test_a_right_answer_holds_the_expected_words(expected, text, score):
    assert holds(expected)(text).score == score


def test_every_seed_asks_every_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in GOOD), encoding="utf-8")
    llm = hasten.load("mini-ar", cache_bytes=50_000_000)
    made = cases(llm, {**suite.options, "file": str(path)}, (0, 4))
    assert [case.seed for case in made] == [0, 0, 0, 4, 4, 4]
    assert [case.tokens for case in made[:3]] == [128, 5, 128]
    assert [case.group for case in made[:3]] == ["prompts", "sums", "prompts"]
    assert made[0].ids == tuple(llm.chat_ids([{"role": "user", "content": "Hi"}]))
    assert made[0].judge is None
    assert made[1].judge is not None
