"""Grammars from random sources: regexes agree with `re`, random schemas with jsonschema, damaged sources are refused."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logits import words

from hasten.errors import ConfigError
from hasten.llm import LLM
from hasten.logits import _lark, _regex, _schema
from hasten.types import Grammar

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "abc01-. \n\u00e9"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return words.load(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    """bench/structure.py, whose schemas these are."""
    spec = importlib.util.spec_from_file_location("structure", ROOT / "bench" / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- regexes ---

ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "c",
        "0",
        "1",
        "-",
        r"\.",
        ".",
        r"\d",
        r"\w",
        r"[ab]",
        r"[^a]",
        r"[a-c]",
        r"[^0-9.]",
        r"\n",
        "\u00e9",
        r"[\w.-]",
        r"\x61",
    ]
)
COUNTS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,3}", "{2,}", "*?", "+?"])
PATTERNS = st.recursive(
    st.tuples(ATOMS, COUNTS).map("".join),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(st.sampled_from(["(", "(?:", "(?P<n>"]), inner, st.just(")"), COUNTS).map("".join),
        st.tuples(inner, inner).map("|".join),
    ),
    max_leaves=5,
)
TEXTS = st.text(LETTERS, max_size=6)


def similar(pattern: str, seed: int) -> list[str]:
    """Texts that are likely to be near a pattern: its own letters, shuffled and cut."""
    r = random.Random(seed)
    letters = [c for c in pattern if c in LETTERS] or ["a"]
    return ["".join(r.choice(letters) for _ in range(r.randint(0, 5))) for _ in range(6)]


@given(PATTERNS, TEXTS, st.integers(0, 999))
@settings(max_examples=250)
def test_regexes_agree_with_re(llm: LLM, pattern: str, text: str, seed: int) -> None:
    try:
        own = re.compile(pattern, re.ASCII if r"\d" in pattern else 0)
    except re.error:
        return  # a name twice
    grammar = Grammar.regex(pattern)
    for one in {text, *similar(pattern, seed)}:
        if r"\w" in pattern and not one.isascii():
            continue
        assert words.accepts(llm, grammar, one) == (own.fullmatch(one) is not None), (pattern, one)


@given(PATTERNS, TEXTS, st.booleans(), st.booleans(), st.integers(0, 999))
@settings(max_examples=250)
def test_patterns_of_schemas_agree_with_re(llm: LLM, pattern: str, text: str, head: bool, tail: bool, seed: int) -> None:
    pattern = "^" * head + (f"({pattern})" if head or tail else pattern) + "$" * tail
    try:
        own = re.compile(pattern.replace("$", r"\Z"), re.ASCII)  # Python's $ also stands before a last line end
    except re.error:
        return
    grammar = Grammar.json_schema({"type": "string", "pattern": pattern})
    for one in {text, *similar(pattern, seed)}:
        found = words.accepts(llm, grammar, json.dumps(one, ensure_ascii=False))
        assert found == (own.search(one) is not None), (pattern, one)


FAMILIES = {
    "(a+)+$": lambda n: ("(a+)+b", "a" * n),
    "(a|a)*b": lambda n: ("(a|a)*b", "a" * n),
    "(a|aa)+b": lambda n: ("(a|aa)+b", "a" * n),
    "(.*)*x": lambda n: ("(.*)*x", "a" * n),
    "(a?){n}a{n}": lambda n: ("(a?){30}a{30}", "a" * min(n, 59)),
    "([a-z]+)*1": lambda n: ("([a-z]+)*1", "ab" * (n // 2)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_catastrophic_regexes_take_linear_time(llm: LLM, family: str) -> None:
    """Eight times the text takes some eight times as long; backtracking would take 2**n."""

    def seconds(n: int) -> float:
        pattern, text = FAMILIES[family](n)
        rule = llm.compile(Grammar.regex(pattern))
        state = rule.open((), 99)
        begun = time.thread_time()
        for token in llm.encode(text):
            assert rule.allows(state, token)
            state = rule.advance(state, token)
        return time.thread_time() - begun

    seconds(50)
    short, long = min(seconds(200) for _ in range(3)), min(seconds(1600) for _ in range(3))
    assert long < 20 * short + 0.05, (short, long)


# --- schemas ---


def test_random_schemas_of_people(llm: LLM, structure: ModuleType) -> None:
    """60 of the bench's schemas on a random model: every finished answer is valid, and the model does finish."""
    r, finished = random.Random(11), 0
    for seed in range(60):
        schema = structure.random_schema(r)
        for text in words.answers(llm, Grammar.json_schema(schema), 2, seed=seed, max_tokens=220):
            finished += 1
            assert structure.judge(schema, text), (schema, text)
    assert finished > 60


SCALARS = st.sampled_from(
    [
        {"type": "integer"}, {"type": "number", "minimum": -1, "maximum": 1}, {"type": "string", "maxLength": 3}, {"type": "boolean"},
        {"type": "null"}, {"enum": [1, "a", None]}, {"const": [1]}, {"type": ["string", "integer"], "minLength": 1, "maxLength": 2},
        {"type": "string", "pattern": "^a*b"}, True, {"minimum": 3, "maximum": 5}, {"format": "date", "type": "string"},
    ]
)  # fmt: skip
NAMES = st.sampled_from(["a", "b", "c", "x-y", "\u00e9"])


def objects(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(NAMES, inner, max_size=3)},
        optional={
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": st.one_of(st.booleans(), inner),
            "minProperties": st.integers(0, 2),
            "maxProperties": st.integers(1, 4),
            "patternProperties": st.dictionaries(st.sampled_from(["^x", "y$", "^q[0-9]"]), inner, max_size=1),
        },
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        objects(inner),
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner},
            optional={"minItems": st.integers(0, 2), "maxItems": st.integers(0, 3), "prefixItems": st.lists(inner, min_size=1, max_size=2)},
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda many: {"anyOf": many}),
        st.lists(inner, min_size=1, max_size=2).map(lambda many: {"allOf": many}),
        st.lists(inner, min_size=1, max_size=2).map(lambda many: {"oneOf": many}),
        st.tuples(objects(inner), st.lists(objects(inner), min_size=1, max_size=2)).map(lambda p: {**p[0], "allOf": p[1]}),
        st.tuples(st.lists(objects(inner), min_size=1, max_size=2), objects(inner)).map(lambda p: {"anyOf": p[0], **p[1]}),
    ),
    max_leaves=6,
)  # fmt: skip


def check_schema(llm: LLM, schema: object, seed: int) -> int:
    """Answers of the random model that ended; all of them must be valid. Refused schemas are fine."""
    grammar = Grammar.json_schema(schema)  # type: ignore[arg-type]
    try:
        llm.compile(grammar)
    except ConfigError as error:
        assert error.field == "grammar"
        return 0
    count = 0
    for text in words.answers(llm, grammar, 3, seed=seed, max_tokens=100):
        count += 1
        assert words.valid(schema, json.loads(text)), (schema, text)
    return count


@given(SCHEMAS, st.integers(0, 999))
@settings(max_examples=60)
def test_random_schemas_of_every_keyword(llm: LLM, schema: object, seed: int) -> None:
    check_schema(llm, schema, seed)


@pytest.mark.slow
@given(SCHEMAS, st.integers(0, 9999))
@settings(max_examples=3000)
def test_many_random_schemas_of_every_keyword(llm: LLM, schema: object, seed: int) -> None:
    check_schema(llm, schema, seed)


# --- damaged sources ---

SOURCES = {
    "json_schema": [
        json.dumps({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"enum": [1, "x"]}}}),
        json.dumps({"anyOf": [{"type": "string", "pattern": "^(a|b)+$"}, {"type": "array", "items": {"minimum": 1}}]}),
    ],
    "regex": ["(ab|cd){2,5}-[0-9]{1,3}", r"^[\w.-]+@(?:[a-z]+\.)+[a-z]{2,}$"],
    "lark": ['start: item ("," item)*\nitem: "x" NUMBER | %json {"type": "integer"}\nNUMBER: /[0-9]{1,2}/i\n%ignore / /'],
    "choice": ['["yes", "no \\u00e9"]'],
}
PIECES = [*"()[]{}|*+?\\/\"'<>@:%~&^$,.#\n\x00", "(?", "{9999}", "%json", "::", "null", "\\u0000", "$ref", "\ud800"]


@pytest.mark.parametrize("kind", SOURCES)
@given(data=st.data())
@settings(max_examples=120)
def test_a_damaged_source_is_compiled_or_refused(llm: LLM, kind: str, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(SOURCES[kind]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 4))
        text = text[:at] + data.draw(st.sampled_from(["", *PIECES])) + text[at + cut :]
    try:
        rule = llm.compile(Grammar(kind, text))  # type: ignore[arg-type]
    except ConfigError as error:
        assert len(str(error)) < 1000
        assert "<non-verbose/>" not in str(error)
        return
    rule.forced(rule.open((), 9))


HOSTILE = {
    "groups": lambda n: _regex.check("(" * n + "a" + ")" * n, "r"),
    "classes": lambda n: _regex.check("[" * n, "r"),
    "stars": lambda n: _regex.check("a*" * n, "r"),
    "escapes": lambda n: _regex.check("\\" * (2 * n + 1), "r"),
    "schema": lambda n: _schema.prepare('{"items":' * n + "true" + "}" * n),
    "arrays": lambda n: _schema.prepare("[" * n + "]" * n),
    "quotes": lambda n: _schema.prepare('{"a": ' + '\\"' * n),
    "chain": lambda n: _schema.prepare(
        json.dumps({"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(n)} | {f"d{n}": True}, "$ref": "#/$defs/d0"})
    ),
    "nested lark": lambda n: _lark.check("start: " + "(" * n + '"a"' + ")" * n),
    "open strings": lambda n: _lark.check("start: " + '"a' * (2 * n + 1)),
    "open regexes": lambda n: _lark.check("start: " + "/a\\" * n),
    "rules": lambda n: _lark.check("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(n)) + f'r{n}: "a"'),
    "cycle": lambda n: _lark.check("start: r0\n" + "".join(f"r{i}: r{(i + 1) % n} | \"a\"\n" for i in range(n))),
    "json in lark": lambda n: _lark.check("start: " + "%json " * n),
    "jsons in lark": lambda n: _lark.check("start: " + '%json {"type": "null"} ' * n + "%json {"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_sources_are_refused_in_time_that_grows_with_their_length(what: str) -> None:
    def seconds(n: int) -> float:
        begun = time.thread_time()
        with pytest.raises(ConfigError):
            HOSTILE[what](n)
        return time.thread_time() - begun

    short, long = min(seconds(6_000) for _ in range(2)), min(seconds(48_000) for _ in range(2))
    assert long < 24 * short + 0.1, (short, long)
    assert long < 4
