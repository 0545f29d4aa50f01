"""`hasten run` with the form of the answer: --schema, --regex, --choice, --grammar."""

from __future__ import annotations

import json
import re

import pytest

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
RUN = ("run", "mini-ar", "copy: ab", "--raw", "--max-tokens", "80")


def test_a_schema_is_text_or_a_file(hasten, tmp_path):
    given = hasten(*RUN, "--schema", json.dumps(SCHEMA))
    assert given.code == 0
    value = json.loads(given.out)
    assert list(value) == ["ok", "n"]
    assert 0 <= value["n"] < 100
    path = tmp_path / "test.json"  # a name that begins like true
    path.write_text(json.dumps(SCHEMA))
    assert hasten(*RUN, "--schema", str(path)).out == given.out
    assert json.loads(json.loads(hasten(*RUN, "--schema", str(path), "--json").out)["text"]) == value


def test_a_regex_choices_and_a_lark_grammar(hasten, tmp_path):
    assert re.fullmatch("[0-9]{3}-[a-c]\n", hasten(*RUN, "--regex", "[0-9]{3}-[a-c]").out)
    assert hasten(*RUN, "--choice", "left", "--choice", "right").out in ("left\n", "right\n")
    path = tmp_path / "list.lark"
    path.write_text('start: item ("," item){2}\nitem: /[a-c]{2}/\n')
    assert re.fullmatch("[a-c]{2}(,[a-c]{2}){2}\n", hasten(*RUN, "--grammar", str(path)).out)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--schema", "{"], "schema is not JSON", ""),
        (
            ["--schema", '{"properties": {"a": {"not": {}}}}'],
            "schema.properties.a.not is not supported",
            "say what is allowed",
        ),
        (["--schema", "none.json"], "none.json cannot be read", "begins with {"),
        (["--schema", ""], " cannot be read", "begins with {"),
        (["--regex", "(?=a)b"], "the regex has lookahead at character 1", "linear time"),
        (["--regex", ""], "grammar.source = ''", ""),
        (["--choice", ""], "choice must be a list of strings, none of them empty", ""),
        (["--regex", "a", "--choice", "a"], "--regex and --choice both say", ""),
        (["--grammar", "none.lark"], "none.lark cannot be read", ""),
    ],
)
def test_a_wrong_form_is_refused_in_one_line(hasten, arguments, message, hint):
    result = hasten(*RUN, *arguments)
    assert (result.code, result.out) == (2, "")
    first, *rest = result.err.splitlines()
    assert message in first
    assert hint in "".join(rest)
    assert len(rest) <= 1


def test_a_model_that_fills_canvases_is_refused_by_name(hasten):
    result = hasten("run", "mini-dlm", "copy: ab", "--regex", "[0-9]+")
    assert result.code == 2
    assert "left to right" in result.err
