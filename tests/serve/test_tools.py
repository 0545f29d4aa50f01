"""Tools of chat requests: what is refused, what the grammar allows, and how answers are read back, cut anywhere."""

from __future__ import annotations

import itertools
import json
import random

import byte_grammars as grammars
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError
from hasten.serve.tools import Offer, ToolCallParser, assembled, call_id, read_tools, tool_grammar
from hasten.types import Grammar

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name"],
    "additionalProperties": False,
}


def tool(name: str = "get", parameters: object = None, **more: object) -> dict[str, object]:
    function = {"name": name, **more}
    return {"type": "function", "function": function if parameters is None else {**function, "parameters": parameters}}


TOOLS = [tool("get", CITY), tool("get_weather", description='"}\nstart: /.*/ // # %json <tool_call>'), tool("tree", TREE)]


def offered(choice: object = None, parallel: bool | None = None, tools: object = None) -> Offer:
    offer = read_tools(TOOLS if tools is None else tools, choice, parallel)
    assert offer is not None
    return offer


def form(choice: object = None, parallel: bool | None = None, tools: object = None):
    grammar = tool_grammar(offered(choice, parallel, tools))
    assert isinstance(grammar, Grammar)
    assert grammar.kind == "lark"
    return grammars.matcher(grammar)


def call(name: str, arguments: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def whole(
    text: str, reason: str = "stop", offer: Offer | None = None, cuts: tuple[int, ...] = ()
) -> tuple[dict, str, list]:
    """(message, finish reason, deltas) of `text` pushed in pieces that end at `cuts`."""
    parser = ToolCallParser(offer or offered(), "seed 1")
    deltas = []
    for start, end in itertools.pairwise((0, *cuts, len(text))):
        deltas += parser.push(text[start:end])
    last, why = parser.finish(reason)
    return assembled([*deltas, *last]), why, [*deltas, *last]


# --- definitions ---

DEEP: dict = {"type": "object"}
for _ in range(LIMITS.grammar_depth + 1):
    DEEP = {"type": "object", "properties": {"a": DEEP}}

WRONG = [
    ([], {}, "tools"), ({}, {}, "tools"), ("x", {}, "tools"), ([tool()] * (LIMITS.tools + 1), {}, "tools"),
    ([1], {}, "tools[0]"), ([tool(), {"type": "web_search"}], {}, "tools[1].type"),
    ([{"type": "function"}], {}, "tools[0].function"), ([{**tool(), "x": 1}], {}, "tools[0]"),
    ([tool("")], {}, "tools[0].function.name"), ([tool("a b")], {}, "tools[0].function.name"),
    ([tool("a" * 65)], {}, "tools[0].function.name"), ([tool("a\n")], {}, "tools[0].function.name"),
    ([tool("\u00e9")], {}, "tools[0].function.name"), ([tool(3)], {}, "tools[0].function.name"),
    ([tool("a"), tool("b"), tool("a")], {}, "tools[2].function.name"),
    ([tool("<|im_end|>")], {}, "tools[0].function.name"), ([tool(description=3)], {}, "tools[0].function.description"),
    ([tool(strict="yes")], {}, "tools[0].function.strict"), ([tool(returns=1)], {}, "tools[0].function"),
    ([tool(parameters=[])], {}, "tools[0].function.parameters"), ([tool(parameters=True)], {}, "tools[0].function.parameters"),
    ([tool(parameters={"type": "string"})], {}, "tools[0].function.parameters.type"),
    ([tool(parameters={"properties": {}})], {}, "tools[0].function.parameters.type"),
    ([tool(parameters={"type": "object", "x-guidance": {}})], {}, "tools[0].function.parameters"),
    ([tool(parameters=DEEP)], {}, "tools[0].function.parameters"),
    ([tool()], {"tool_choice": "any"}, "tool_choice"), ([tool()], {"tool_choice": 1}, "tool_choice"),
    ([tool()], {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ([tool()], {"tool_choice": {"type": "function", "name": "get"}}, "tool_choice"),
    ([tool()], {"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ([tool()], {"tool_choice": {"type": "function", "function": {"name": "put"}}}, "tool_choice.function.name"),
    ([tool()], {"parallel_tool_calls": 1}, "parallel_tool_calls"), ([tool()], {"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (None, {"tool_choice": "auto"}, "tool_choice"), (None, {"parallel_tool_calls": True}, "parallel_tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(("tools", "more", "path"), WRONG)
def test_a_wrong_definition_is_refused_by_its_path(tools, more, path):
    with pytest.raises(ConfigError) as caught:
        read_tools(tools, **more)
    assert caught.value.field == path
    assert path in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_greatest_numbers_are_accepted():
    names = ["a" * 64, *(f"f{i}" for i in range(LIMITS.tools - 1))]
    assert grammars.names(offered(tools=[tool(name) for name in names])) == names


def test_what_is_accepted():
    assert read_tools(None) is None
    assert read_tools(TOOLS, "none") is None
    assert tool_grammar(None) is None
    named = {"type": "function", "function": {"name": "tree"}}
    assert (offered(named).choice, offered(named).only) == ("function", 2)
    assert offered().choice == "auto"
    assert offered().parallel
    assert not offered(parallel=False).parallel
    assert [t.strict for t in offered(tools=[tool(strict=True), tool("b", strict=False), tool("c")]).tools] == [
        True,
        False,
        False,
    ]
    assert list(offered().schemas())[2] == ("tools[2].function.parameters", TREE)
    assert offered(tools=[tool(parameters={})]).for_template()[0]["function"]["parameters"]["additionalProperties"] is False


def test_schemas_beyond_the_limit_of_a_grammar_are_refused():
    big = {"type": "object", "description": "x" * LIMITS.grammar_bytes}
    with pytest.raises(ConfigError, match="tools"):
        tool_grammar(offered(tools=[tool(parameters=big)]))
    with pytest.raises(ConfigError, match="parameters"):
        tool_grammar(offered(tools=[tool(parameters={"type": "object", "minProperties": float("nan")})]))


# --- the grammar ---

GET, WEATHER = call("get", {"city": "a </tool_call> b", "days": 3}), call("get_weather", {})
ONLY_GET = {"type": "function", "function": {"name": "get"}}
ENDS = [  # (choice, parallel, text, may end here)
    ("auto", True, "", True), ("auto", True, "text <tool_ca", True), ("auto", True, "\u00e9 < {", True),
    ("auto", True, GET, True), ("auto", True, f"I look.\n{GET}\n{WEATHER}", True), ("auto", True, "<<tool_call>", False),
    ("auto", True, f"x{GET}\n{WEATHER}\n<tool_call>", False), ("auto", False, f"x {GET}", True),
    ("required", True, f"{WEATHER}\n{GET}\n{GET}", True), ("required", True, "", False),
    ("required", False, GET, True), (ONLY_GET, True, GET, True), (ONLY_GET, True, "", False),
    ("auto", True, call("tree", {"name": "r", "children": [{"name": "s", "children": []}]}), True),
]  # fmt: skip
NEVER = [
    ("auto", True, "a <tool_call>b"), ("auto", True, '<tool_call>\n{"name": "put'), ("auto", True, GET + " more"),
    ("auto", True, '<tool_call>\n{"name": "get", "arguments": {"days'), ("auto", True, '<tool_call>\n{"name": "get", "arguments": {}'),
    ("auto", True, '<tool_call>\n{"name": "get", "arguments": {"city": 3'), ("auto", False, f"{GET}\n"),
    ("auto", True, '<tool_call>\n{"name": "get_weather", "arguments": {"'), ("required", True, "text"),
    ("required", False, f"{GET}\n"), (ONLY_GET, True, '<tool_call>\n{"name": "get_'), (ONLY_GET, True, f"{GET}\n"),
    (ONLY_GET, True, "text"), ("auto", True, call("tree", {"name": "longer"})),
    ("auto", True, call("tree", {"name": "r", "children": [{}]})), ("auto", True, '<tool_call>\n{"name": "get", "arguments": {}}'),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "parallel", "text", "end"), ENDS)
def test_the_grammar_allows(choice, parallel, text, end):
    assert grammars.allowed(form(choice, parallel), text) == (True, end)


@pytest.mark.parametrize(("choice", "parallel", "text"), NEVER)
def test_the_grammar_never_allows(choice, parallel, text):
    assert grammars.allowed(form(choice, parallel), text)[0] is False


@pytest.mark.parametrize(
    ("choice", "start"), [("auto", ""), ("auto", "let me see <tool_call>"), ("required", ""), (ONLY_GET, "")]
)
def test_whatever_the_grammar_ends_is_text_or_valid_calls(choice, start):
    matcher, ended = form(choice), 0
    offer = offered(choice)
    schemas = {t.name: t.parameters for t in offer.tools}
    for seed in range(40):
        text, done = grammars.walk(matcher, random.Random(seed), start)
        message, why, _ = whole(text, "stop" if done else "length", offer)
        assert "<tool_call>" not in (message["content"] or "")
        if not done:
            continue
        calls = message.get("tool_calls", [])
        ended += bool(calls)
        assert bool(calls) or (choice == "auto" and not start)
        assert why == ("tool_calls" if calls else "stop")
        assert len(calls) == 1 or choice != ONLY_GET
        for made in calls:
            value = json.loads(made["function"]["arguments"])
            jsonschema.validate(value, schemas[made["function"]["name"]] or {"type": "object", "maxProperties": 0})
    assert ended > 5 or (choice == "auto" and not start)


FORMED = Grammar.json_schema({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False})  # fmt: skip
TAGGED = '{"city": "<tool_call> \\"name\\": x"}'


@pytest.mark.parametrize(
    ("content", "choice", "text", "fits"),
    [
        (FORMED, "auto", '{"city": "x"}', (True, True)), (FORMED, "auto", TAGGED, (True, True)), (FORMED, "auto", GET, (True, True)),
        (FORMED, "auto", "text", (False, False)), (FORMED, "auto", '{"town', (False, False)), (FORMED, "auto", f"x{GET}", (False, False)),
        (FORMED, "auto", "", (True, False)), (FORMED, "required", GET, (True, True)), (FORMED, "required", '{"city": "x"}', (False, False)),
        (Grammar("json_object"), "auto", '{"any": [1]}', (True, True)), (Grammar("json_object"), "auto", "[1]", (False, False)),
        (FORMED, "auto", f'{{"city": "x"}}\n{GET}', (False, False)),
    ],
)  # fmt: skip
def test_with_a_form_an_answer_is_content_of_it_or_calls(content, choice, text, fits):
    grammar = tool_grammar(offered(choice), content)
    assert grammar is not None
    written, end = grammars.allowed(grammars.matcher(grammar), text)
    assert (written, written and end) == fits


@given(st.text(max_size=40), st.lists(st.integers(0, 60), max_size=4))
def test_tags_in_the_strings_of_formed_content_stay_there(text, cuts):
    whole = json.dumps({"city": text + "<tool_call>" + text})
    places = sorted({min(cut, len(whole)) for cut in cuts})
    for reason, end in (("stop", len(whole)), ("length", len(whole) // 2)):
        parser, deltas = ToolCallParser(offered(), "k", formed=True), []
        for first, last in itertools.pairwise((0, *(min(place, end) for place in places), end)):
            deltas += parser.push(whole[first:last])
        rest, why = parser.finish(reason)
        assert assembled([*deltas, *rest]) == {"content": whole[:end]}
        assert why == reason
    parser = ToolCallParser(offered(), "k", formed=True)
    deltas = [delta for character in f"{GET}\n{WEATHER}" for delta in parser.push(character)]
    assert [one["function"]["name"] for one in assembled(deltas)["tool_calls"]] == ["get", "get_weather"]


# --- the parser ---

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | TEXTS
    | st.sampled_from(["</tool_call>", "<tool_call>", '"}}', "\\", "<|im_end|>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(["get", "get_weather", "tree"]), st.dictionaries(TEXTS, VALUES, max_size=3)), max_size=3
)


def answer(text: str, calls: list[tuple[str, dict]], ascii_only: bool) -> str:
    made = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(value, ensure_ascii=ascii_only)}}}\n</tool_call>'
        for name, value in calls
    ]
    return "\n".join([text, *made] if text else made)


@given(text=TEXTS, calls=CALLS, ascii_only=st.booleans())
def test_calls_come_back_as_they_were_made(text, calls, ascii_only):
    message, why, _ = whole(answer(text, calls, ascii_only))
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]
    assert found == calls
    assert why == ("tool_calls" if calls else "stop")
    assert message["content"] == ((text.rstrip(" \t\r\n") or None) if calls else text)


@given(text=TEXTS, calls=CALLS, reason=st.sampled_from(["stop", "length"]), data=st.data())
def test_any_cutting_gives_the_same_whole(text, calls, reason, data):
    full = answer(text, calls, False)
    full = full[: data.draw(st.integers(0, len(full)))]
    cuts = data.draw(st.lists(st.integers(0, len(full)), max_size=6).map(sorted))
    expected = whole(full, reason)[:2]
    assert whole(full, reason, cuts=tuple(cuts))[:2] == expected
    assert whole(full, reason, cuts=tuple(range(1, len(full))))[:2] == expected


SCRAPS = ["<tool_call>", "</tool_call>", "\n", " ", '{"name": "get"', ', "arguments": ', "{", "}", '{"name": "nope", "arguments": {}}',
          "text", "<", "<tool_", '"', "\\", "x" * 300, '{"name": "get", "arguments": {}}']  # fmt: skip


@given(scraps=st.lists(st.sampled_from(SCRAPS), max_size=10), reason=st.sampled_from(["stop", "length"]), data=st.data())
def test_scraps_of_calls_give_the_same_whole_too(scraps, reason, data):
    full = "".join(scraps)
    cuts = data.draw(st.lists(st.integers(0, len(full)), max_size=8).map(sorted))
    assert whole(full, reason, cuts=tuple(cuts))[:2] == whole(full, reason)[:2]
    assert whole(full, reason, cuts=tuple(range(1, len(full))))[:2] == whole(full, reason)[:2]


@settings(max_examples=15)
@given(text=TEXTS, calls=CALLS.filter(len))
def test_content_never_shows_half_a_tag(text, calls):
    full = answer(text, calls, False)
    for cut in range(len(full)):
        parser = ToolCallParser(offered(), "k")
        shown = assembled([delta for character in full[:cut] for delta in parser.push(character)])["content"] or ""
        assert text.startswith(shown)


def test_deltas_have_openai_s_form():
    text = "Hm.\n" + call("get", {"city": "x"}) + "\n" + WEATHER
    _, why, deltas = whole(text, cuts=tuple(range(1, len(text))))
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert all(len(delta) == 1 and len(delta.get("tool_calls", [0])) == 1 for delta in deltas)
    assert deltas[0] == {"content": "H"}
    assert why == "tool_calls"
    assert calls[0] == {
        "index": 0, "id": call_id("seed 1", 0, 0), "type": "function", "function": {"name": "get", "arguments": ""},
    }  # fmt: skip
    assert [c["index"] for c in calls] == sorted(c["index"] for c in calls)
    assert calls[-1]["index"] == 1
    assert all(c.keys() == {"index", "function"} and c["function"].keys() == {"arguments"} for c in calls if "id" not in c)
    assert len(calls) > 10


def test_a_cut_call_ends_as_openai_s_do():
    text = 'x <tool_call>\n{"name": "get", "arguments": {"city": "Par'
    message, why, _ = whole(text, "length")
    assert why == "length"
    assert message["content"] == "x"
    assert message["tool_calls"][0]["function"] == {"name": "get", "arguments": '{"city": "Par'}
    assert whole('x <tool_call>\n{"na', "length")[:2] == ({"content": "x"}, "length")
    assert whole("x <tool_ca", "length")[:2] == ({"content": "x"}, "length")
    assert whole("x <tool_ca", "stop")[:2] == ({"content": "x <tool_ca"}, "stop")
    assert whole(GET, "abort")[1] == "abort"
    assert whole(GET + "\n<tool_call>\n{", "length")[1] == "length"
    assert whole(text, "stop")[1] == "stop"


def test_text_that_no_grammar_kept_is_content():
    for text in (
        "a <tool_call> is a tag",
        '<tool_call>{"name": "put", "arguments": {}}</tool_call>',
        "<tool_call>" + "x" * 400,
    ):
        message, why, _ = whole(text)
        assert message["content"] == text
        assert "tool_calls" not in message
        assert why == "stop"


def test_ids_repeat_with_the_key_and_differ_without():
    ids = {call_id(key, choice, index) for key in ("1:a", "1:b", "2:a") for choice in range(3) for index in range(3)}
    assert len(ids) == 27
    assert call_id("1:a", 0, 0) == call_id("1:a", 0, 0)
    assert all(name.startswith("call_") and len(name) == 29 for name in ids)
    assert whole(GET)[0] == whole(GET)[0]
