"""Every keyword of the table: enforced ones hold, annotations change nothing, refused ones are refused by their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import words

from hasten.errors import ConfigError
from hasten.llm import LLM
from hasten.logits import _keywords
from hasten.types import Grammar

STRING = {"type": "string", "maxLength": 4}
CLOSED = {"additionalProperties": False}
# keyword -> (schema, values it lets pass, values it stops); the values that pass are valid, the others are not
ENFORCED = {
    "type": [
        ({"type": "integer"}, [0, -3, 12345], [1.5, "a", None, True, [], {}]),
        ({"type": ["string", "null"], "maxLength": 3}, ["abc", None], [1, False]),
        ({"type": "number"}, [1, -0.25, 1e30], ["1", None]),
        ({"type": "boolean"}, [True, False], [0, "true"]),
    ],
    "enum": [
        ({"enum": ["a", 1, None, {"b": [True]}, 2.5]}, ["a", 1, None, {"b": [True]}, 2.5], ["b", 2, {"b": []}, False, "a "]),
        ({"type": "string", "enum": ["x", 'q"\n\\']}, ["x", 'q"\n\\'], ["q"]),
    ],
    "const": [
        ({"const": {"k": [1, "two"]}}, [{"k": [1, "two"]}], [{"k": [1]}, {}]),
        ({"const": -2.5}, [-2.5], [2.5, -2]),
    ],
    "anyOf": [({"anyOf": [STRING, {"type": "integer", "minimum": 5}]}, ["a", 5, 77], [4, None, "abcde"])],
    "oneOf": [
        ({"oneOf": [STRING, {"type": "boolean"}]}, ["a", True], [1, None]),
        (
            {
                "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
                "discriminator": {"propertyName": "kind"},
                "$defs": {
                    "cat": {
                        "type": "object",
                        "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "maximum": 9, "minimum": 0}},
                        "required": ["kind", "lives"],
                        **CLOSED,
                    },
                    "dog": {
                        "type": "object",
                        "properties": {"kind": {"const": "dog"}},
                        "required": ["kind"],
                        **CLOSED,
                    },
                },
            },
            [{"kind": "cat", "lives": 7}, {"kind": "dog"}],
            [{"kind": "dog", "lives": 7}, {"kind": "cat"}, {"kind": "cow"}],
        ),
    ],
    "allOf": [
        (
            {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}, {"pattern": "^a"}]},
            ["ab", "abc"],
            ["a", "abcd", "bc", 2],
        )
    ],
    "$ref": [
        (
            {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
                "required": ["v", "next"],
                **CLOSED,
            },
            [{"v": 1, "next": {"v": 2, "next": None}}],
            [{"v": 1, "next": {"v": 2}}, {"v": 1, "next": 3}],
        ),
        (
            {"type": "array", "items": {"$ref": "#/$defs/a~1b%20c"}, "$defs": {"a/b c": {"type": "integer"}}},
            [[1, 2]],
            [["1"]],
        ),
        (
            {"type": "object", "properties": {"a": STRING, "b": {"$ref": "#/properties/a"}}, "required": ["b"], **CLOSED},
            [{"b": "abcd"}, {"a": "a", "b": "b"}],
            [{"b": 1}, {"b": "abcde"}],
        ),
    ],
    "$defs": [({"$ref": "#/$defs/n", "$defs": {"n": {"enum": [1, 2]}}}, [1, 2], [3])],
    "definitions": [({"$ref": "#/definitions/n", "definitions": {"n": {"enum": [1, 2]}}}, [1, 2], [3])],
    "properties": [
        (
            {"type": "object", "properties": {"a": {"type": "integer"}, "b": STRING}, **CLOSED},
            [{}, {"a": 1}, {"b": "x"}, {"a": 1, "b": "x"}],
            [{"a": "x"}, {"b": 1}],
        )
    ],
    "required": [
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "z"], "additionalProperties": STRING},
            [{"a": 1, "z": "q"}],
            [{"a": 1}, {"z": "q"}, {}],
        )
    ],
    "additionalProperties": [
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
            [{"a": 1, "x": True}, {"x": True}],
            [{"a": 1, "x": 1}, {"a": True}, '\0{"\\u0061": true}', '\0{"a": 1, "\\u0061": true}', '\0{"a": 1, "a": true}'],
        ),
        ({"type": "object", **CLOSED}, [{}], [{"a": 1}]),
    ],
    "patternProperties": [
        (
            {"type": "object", "patternProperties": {"^n[0-9]$": {"enum": [1, 2]}, "^s$": STRING}, **CLOSED},
            [{"n1": 1, "s": "x"}, {}],
            [{"n1": "x"}, {"s": 1}, {"x": 1}],
        )
    ],
    "minProperties": [
        ({"type": "object", "minProperties": 1, "additionalProperties": {"type": "integer"}}, [{"a": 1}], [{}]),
        (
            {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [2]}}, "minProperties": 1, **CLOSED},
            [{"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
            [{}],
        ),
    ],
    "maxProperties": [
        (
            {"type": "object", "maxProperties": 2, "additionalProperties": {"type": "integer"}},
            [{}, {"a": 1, "b": 2}],
            [{"a": 1, "b": 2, "c": 3}],
        )
    ],
    "items": [
        ({"type": "array", "items": {"type": "integer"}}, [[], [1, 2, 3]], [["a"], [1, None]]),
        ({"type": "array", "items": False}, [[]], [[1]]),
    ],
    "prefixItems": [
        (
            {"type": "array", "prefixItems": [{"type": "integer"}, STRING], "items": False, "minItems": 2},
            [[1, "a"]],
            [["a", 1], [1], [1, "a", 2]],
        )
    ],
    "minItems": [({"type": "array", "items": {"enum": [1]}, "minItems": 3}, [[1] * 3, [1] * 5], [[], [1] * 2])],
    "maxItems": [({"type": "array", "items": {"enum": [1]}, "maxItems": 3}, [[], [1] * 3], [[1] * 4])],
    "minLength": [({"type": "string", "minLength": 3, "maxLength": 9}, ["abc", "äöü", "a\nb"], ["ab", "", "\U0001f600\n"])],
    "maxLength": [({"type": "string", "maxLength": 3}, ["", "äöü", "\U0001f600a\n", '"""'], ["abcd", "äöüß"])],
    "pattern": [
        ({"type": "string", "pattern": "b+c", "maxLength": 9}, ["abbcd", "bc"], ["ac", "b"]),
        ({"type": "string", "pattern": "^[a-f]{2}(-[0-9]){1,2}$"}, ["ab-1", "ff-1-2"], ["ab", "xab-1", "ab-1-2-3"]),
        ({"type": "string", "pattern": "^(a|b\\.)$|^[x\\[&&]+$"}, ["a", "b.", "[&x"], ["b", "ab", "[y"]),
    ],
    "format": [
        ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-13-01", "0000-01-01", "x"]),
        ({"type": "string", "format": "time"}, ["23:59:59Z", "00:00:00.5+02:00"], ["24:00:00Z", "12:00:00", "1:00:00Z"]),
        ({"type": "string", "format": "date-time"}, ["2024-02-29T10:00:00Z"], ["2024-02-30T10:00:00Z", "2024-02-29"]),
        ({"type": "string", "format": "email"}, ["a.b@example.org"], ["a@", "@b.org", "ab"]),
        ({"type": "string", "format": "hostname"}, ["a-b.example.org", "x"], ["-a", "a..b", "a" * 64]),
        ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["256.0.0.1", "1.2.3"]),
        ({"type": "string", "format": "ipv6"}, ["::1", "fe80::1:2", "1:2:3:4:5:6:7:8"], [":::", "1:2:3", "g::"]),
        ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"]),
        ({"type": "string", "format": "uri"}, ["http://a.b/c?d#e", "urn:x:y"], ["a b", "//x"]),
        ({"type": "string", "format": "duration"}, ["P1Y2M", "PT5M", "P3W"], ["P", "1Y", "P1S"]),
        ({"type": "string", "format": "date", "pattern": "^20"}, ["2024-02-29"], ["1999-12-31", "20"]),
    ],
    "minimum": [
        ({"type": "integer", "minimum": -12, "maximum": 1000}, [-12, 0, 999], [-13, 1001]),
        ({"type": "number", "minimum": 0.5, "maximum": 3}, [0.5, 2.75, 3], [0.49, 3.01]),
    ],
    "maximum": [({"type": "integer", "maximum": 9, "minimum": 0}, [9, 0], [10, 99])],
    "exclusiveMinimum": [({"type": "number", "exclusiveMinimum": 0, "maximum": 9}, [0.1, 9], [0, -1])],
    "exclusiveMaximum": [({"type": "integer", "exclusiveMaximum": 10, "minimum": 1}, [9], [10, 11])],
    "multipleOf": [
        ({"type": "integer", "multipleOf": 7}, [0, 14, -21], [15, 1]),
        ({"type": "number", "multipleOf": 0.25}, [0.25, 0.75, 3], [0.3, 1.1]),
    ],
}  # fmt: skip
ENDLESS = {"type": "object"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return words.load(tmp_path_factory.mktemp("words"))


def test_the_table_is_complete() -> None:
    assert set(ENFORCED) == set(_keywords.ENFORCED)
    assert not set(_keywords.ENFORCED) & set(_keywords.ANNOTATIONS) | set(_keywords.ANNOTATIONS) & set(_keywords.REFUSED)
    assert {schema["format"] for schema, _, _ in ENFORCED["format"]} == set(_keywords.FORMATS)


@pytest.mark.parametrize("keyword", list(ENFORCED))
def test_an_enforced_keyword_holds(llm: LLM, keyword: str) -> None:
    for schema, good, bad in ENFORCED[keyword]:
        for value in good:
            assert words.valid(schema, value), (schema, value)
            assert words.schema_accepts(llm, schema, value), (schema, value)
        for value in bad:
            raw = isinstance(value, str) and value[:1] == "\0"
            assert raw or "format" in schema or not words.valid(schema, value), (schema, value)
            assert not words.schema_accepts(llm, schema, value), (schema, value)


@pytest.mark.parametrize("keyword", list(ENFORCED))
def test_what_a_random_model_writes_is_valid(llm: LLM, keyword: str) -> None:
    finished = 0
    for schema, _, _ in ENFORCED[keyword]:
        for text in words.answers(llm, Grammar.json_schema(schema), 6):
            finished += 1
            assert words.valid(schema, json.loads(text)), (schema, text)
    assert finished, "nothing was finished, so nothing was shown"


def test_the_check_finds_a_schema_that_is_not_enforced(llm: LLM) -> None:
    """Negative control: answers of a schema without the keyword break the schema with it."""
    for keyword in ("minItems", "maxLength", "pattern"):
        schema = ENFORCED[keyword][0][0]
        loose = {key: value for key, value in schema.items() if key != keyword}
        texts = list(words.answers(llm, Grammar.json_schema(loose), 24))
        assert any(not words.valid(schema, json.loads(text)) for text in texts), keyword


@pytest.mark.parametrize("keyword", list(_keywords.ANNOTATIONS))
def test_an_annotation_changes_nothing(keyword: str) -> None:
    from hasten.logits import _schema

    value = "https://json-schema.org/draft/2020-12/schema" if keyword == "$schema" else "x"
    assert _schema.prepare(json.dumps({"type": "integer", keyword: value})) == _schema.prepare('{"type": "integer"}')


@pytest.mark.parametrize("keyword", [*_keywords.REFUSED, "maxLenght", "x-guidance", "lenient", "readonly"])
def test_any_other_keyword_is_refused_by_its_place(llm: LLM, keyword: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {keyword: True}}}}
    with pytest.raises(ConfigError) as caught:
        llm.compile(Grammar.json_schema(schema))
    assert caught.value.field == "grammar"
    assert f"schema.properties.a.items.{keyword} is not supported" in str(caught.value)
    assert _keywords.fate(keyword) == "refused"


REFUSALS = [
    ({"uniqueItems": True}, "schema.uniqueItems is not supported"),
    ({"type": "strnig"}, "schema.type must be one of null"),
    ({"type": []}, "schema.type must be one of"),
    ({"type": 5}, "schema.type must be one of"),
    ({"properties": {"a b": {"not": {}}}}, 'schema.properties["a b"].not is not supported'),
    ({"anyOf": [{}, {"if": {}}]}, "schema.anyOf[1].if is not supported"),
    ({"anyOf": []}, "schema.anyOf must be a list of schemas, not empty"),
    ({"enum": []}, "schema.enum must be a list of values"),
    ({"enum": ["\u0001"]}, "schema.enum holds the character U+0001"),
    ({"const": 2**53 + 1}, "schema.const = 9007199254740993 is not supported"),
    ({"minimum": 1e300}, "schema.minimum = 1e+300 is not supported"),
    ({"minimum": True}, "schema.minimum must be a number"),
    ({"multipleOf": 0}, "schema.multipleOf must be above 0"),
    ({"minLength": -1}, "schema.minLength must be an integer"),
    ({"maxItems": 2**31}, "schema.maxItems must be an integer"),
    ({"maxItems": 2.5}, "schema.maxItems must be an integer"),
    ({"format": "regex"}, "schema.format = 'regex' is not supported (known: date, time"),
    ({"format": "unknown"}, "schema.format = 'unknown' is not supported"),
    ({"pattern": "(?=a)b"}, "schema.pattern has lookahead at character 1"),
    ({"pattern": 1}, "schema.pattern must be a string"),
    ({"patternProperties": {"(a)\\1": {}}}, "has a back-reference at character 4"),
    ({"$ref": "https://example.org/x"}, "schema.$ref = 'https://example.org/x' is not supported"),
    ({"$ref": "#/$defs/none"}, "schema.$ref = '#/$defs/none' leads to no schema"),
    ({"$ref": "#/examples/0", "examples": [{"type": "null"}]}, "leads to no schema"),
    ({"$schema": "https://example.org/dialect"}, "schema.$schema names a dialect that is not known"),
    ({"properties": {"a": {"$id": "x"}}}, "schema.properties.a.$id is not supported inside"),
    ({"items": [{}]}, "schema.items is a list"),
    ({"properties": []}, "schema.properties must be an object of schemas"),
    ({"properties": {"a": 5}}, "schema.properties.a is no schema"),
    ({"required": "a"}, "schema.required must be a list of names"),
    ({"type": "object", "minProperties": 2}, "schema.minProperties asks for more than one property"),
    ({"properties": {"a": {}}, "minProperties": 1}, "schema.minProperties is not supported beside optional properties"),
    ({"properties": {"a": {}, "b": {}}, "maxProperties": 2, **CLOSED}, "schema.maxProperties is not supported beside"),
    ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "alternatives of a oneOf may hold together"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "cannot be compiled"),
    (False, "cannot be compiled"),
    ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "cannot be compiled"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSALS, ids=[m[:40] for _, m in REFUSALS])
def test_what_cannot_be_enforced_is_refused(llm: LLM, schema: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        llm.compile(Grammar.json_schema(schema))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert caught.value.field == "grammar"
    assert "<non-verbose/>" not in str(caught.value)


def test_the_page_holds_the_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods" / "grammar.md").read_text(encoding="utf-8")
    for keyword, what in _keywords.ENFORCED.items():
        assert f"| `{keyword}` | enforced | {what} |" in page
    for keyword, what in _keywords.ANNOTATIONS.items():
        assert f"| `{keyword}` | no effect | {what} |" in page
    for keyword, hint in _keywords.REFUSED.items():
        assert f"| `{keyword}` | refused | {hint} |" in page
