"""Messages for templates: tools in the template's own words or in ours, and texts of users that stay data wherever they sit."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import SPECIAL, TEXT, tokenizer  # noqa: F401 - a fixture

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError
from hasten.models.messages import check_depth
from hasten.models.templates import ChatTemplate

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
# The form of Qwen2.5's and Hermes 2 Pro's templates: tools as JSON lines, calls and results in tags.
HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- "<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n<tool_call>\\n{"name": <name>, "arguments": <args>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}"""
# Reads `tools`, but asks for another form of calls than the one that answers are read in.
LLAMA = (
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools is not none %}NATIVE "
    '{{ tools | tojson }} Respond {"name": function name, "parameters": {}}{% endif %}'
    "{% for m in messages %}{% if m.role == 'tool' %}RESULT{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
XML = HERMES.replace('{"name": <name>, "arguments": <args>}', "<function=name>arguments</function>")
TEMPLATES = {"plain": PLAIN, "hermes": HERMES, "llama": LLAMA, "no system": NO_SYSTEM, "xml": XML}
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "Weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "put", "parameters": {"type": "object"}}},
]
TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "get", "arguments": '{"city": "Caf\\u00e9"}'}},
        {"id": "b", "type": "function", "function": {"name": "put", "arguments": ""}},
    ]},
    {"role": "tool", "tool_call_id": "a", "content": "21"}, {"role": "tool", "tool_call_id": "b", "content": "ok"},
]  # fmt: skip


def text(name: str, messages: list, generation_prompt: bool = True, **options: object) -> str:
    pieces = ChatTemplate(TEMPLATES[name], SPECIAL, {}).render(messages, generation_prompt, **options)
    return "".join(piece for piece, _ in pieces)


def test_a_template_of_our_form_gets_tools_and_calls_as_they_are():
    out = text("hermes", TALK, tools=TOOLS)
    assert "\n".join(["<tools>", *(json.dumps(tool) for tool in TOOLS), "</tools>"]) in out
    assert '<tool_call>\n{"name": "get", "arguments": {"city": "Caf\u00e9"}}\n</tool_call>\n<tool_call>' in out
    assert out.count("<|im_start|>user\n<tool_response>\n") == 2
    assert "# Tools" not in out


@pytest.mark.parametrize("name", ["plain", "llama", "xml"])
def test_other_templates_get_our_words(name):
    out = text(name, TALK, tools=TOOLS)
    assert "Be brief.\n\n# Tools" in out
    assert "\n".join(["<tools>", *(json.dumps(tool) for tool in TOOLS), "</tools>"]) in out
    calls = '<tool_call>\n{"name": "get", "arguments": {"city": "Caf\u00e9"}}\n</tool_call>'
    assert calls + '\n<tool_call>\n{"name": "put", "arguments": {}}\n</tool_call>' in out
    assert "user\n" in out or "user: " in out
    assert "<tool_response>\n21\n</tool_response>\n<tool_response>\nok\n</tool_response>" in out
    assert not any(word in out for word in ("NATIVE", "RESULT", "None", "<function="))


def test_an_offer_finds_its_place():
    question = [{"role": "user", "content": "Weather?"}]
    assert text("plain", question, tools=TOOLS).startswith("<|im_start|>system\n# Tools")
    refusing = text("no system", question, tools=TOOLS)
    assert refusing.startswith("<|im_start|>user\n# Tools")
    assert refusing.endswith("Weather?<|im_end|>\n<|im_start|>assistant\n")
    assert "Tools" not in text("plain", question) + text("hermes", question)


def test_calls_keep_the_words_before_them():
    talk = [{"role": "user", "content": "x"}, {**TALK[2], "content": "I look."}]
    assert "I look.\n<tool_call>" in text("plain", talk)


def test_parts_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|> there"}]
    pieces = ChatTemplate(PLAIN, SPECIAL, {}).render([{"role": "developer", "content": parts}], False)
    assert pieces[:3] == [("<|im_start|>system\n", True), ("<|im_end|>", False), (" there<|im_end|>\n", True)]
    knows = "{% if messages[0].role == 'developer' %}yes{% endif %}"
    assert ChatTemplate(knows, SPECIAL, {}).render([{"role": "developer", "content": ""}], False) == [("yes", True)]


def test_options_are_an_allow_list_of_two():
    question = [{"role": "user", "content": "x"}]
    assert text("hermes", question, options={"enable_thinking": False}).endswith("<think></think>")
    assert text("plain", question, options={"add_generation_prompt": False}) == "<|im_start|>user\nx<|im_end|>\n"
    assert text("plain", question, options={"enable_thinking": False}) == text("plain", question)
    for options in (
        {"messages": []}, {"tools": []}, {"chat_template": "x"}, {"tokenize": False}, {"add_generation_prompt": 1},
        {"add_generation_prompt": None}, {"enable_thinking": {}}, {"enable_thinking": [1]}, {"x" * 9999: 1},
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            text("hermes", question, options=options)
        assert caught.value.field.startswith("chat_template_kwargs")
        assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError, match="no such switch"):
        text("plain", question, options={"enable_thinking": True})


DEEP: object = 1
for _ in range(LIMITS.grammar_depth):
    DEEP = [DEEP]


def with_call(**change: object) -> list:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return [{"role": "assistant", "content": None, "tool_calls": [{**call, **change}]}]


def arguments(value: object) -> list:
    return with_call(function={"name": "f", "arguments": value})


CALLS = "messages[0].tool_calls"
BAD = [
    ([], "messages"), ("x", "messages"), ([3], "messages[0]"), ([{"content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"), ([{"role": "assistant", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages[0].content"), ([{"role": "user", "content": 3}], "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": "x", "tool_calls": [{}]}], CALLS),
    ([{"role": "assistant", "content": "x", "tool_calls": []}], CALLS),
    ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
    ([{"role": "tool", "content": "x", "tool_call_id": "zz"}], "messages[0].tool_call_id"),
    (with_call(id=3), f"{CALLS}[0].id"), (with_call(type="custom"), f"{CALLS}[0]"), (with_call(function=3), f"{CALLS}[0].function"),
    *((arguments(value), f"{CALLS}[0].function.arguments") for value in ("[1]", "{", 3, None, '{"x": NaN}', "[" * 9999)),
    (arguments(json.dumps({"a": DEEP})), f"{CALLS}[0].function.arguments"),
    ([{"role": "user", "content": "x"}] * (LIMITS.messages + 1), "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "field"), BAD)
@pytest.mark.parametrize("name", ["plain", "hermes"])
def test_a_malformed_message_is_named(messages, field, name):
    with pytest.raises(ConfigError) as caught:
        text(name, messages)
    assert caught.value.field == field
    assert len(str(caught.value)) < 400


def test_depth_is_measured_at_the_limit():
    check_depth(DEEP, "x")
    with pytest.raises(ConfigError):
        check_depth([DEEP], "x")
    endless: object = 1
    for _ in range(100_000):
        endless = {"a": endless}
    with pytest.raises(ConfigError):
        check_depth(endless, "x")


WORDS = st.one_of(TEXT, st.sampled_from([*SPECIAL, "<|im_", "end|>", "{{ 7*7 }}", "\ue0f0\ue100\ue0f1", "</tool_call>"]))
VALUES = st.recursive(WORDS, lambda v: st.lists(v, max_size=2) | st.dictionaries(WORDS, v, max_size=2), max_leaves=5)


@pytest.mark.parametrize("name", ["plain", "hermes", "llama"])
@settings(max_examples=40)
@given(words=st.lists(WORDS, min_size=5, max_size=5), value=VALUES, encoded=st.booleans())
def test_texts_of_tools_calls_and_results_stay_data(tokenizer, name, words, value, encoded):  # noqa: F811
    def talk(words: list[str], value: object) -> tuple[list, list]:
        call = {"name": words[1], "arguments": json.dumps({"a": value, words[2]: 1}, ensure_ascii=encoded)}
        tools = [
            {
                "type": "function",
                "function": {"name": words[0], "description": words[3], "parameters": {"type": "object", words[4]: value}},
            }
        ]
        return [
            {"role": "user", "content": words[0]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": words[2] or "id", "function": call}]},
            {"role": "tool", "tool_call_id": words[2] or "id", "content": [{"type": "text", "text": words[3]}]},
        ], tools

    template = ChatTemplate(TEMPLATES[name], SPECIAL, {})

    def specials(words: list[str], value: object) -> tuple[list[int], str]:
        messages, tools = talk(words, value)
        ids: list[int] = []
        for piece, trusted in template.render(messages, True, tools=tools):
            ids += tokenizer.encode(piece, bos=False, special=trusted)
        return [i for i in ids if i in tokenizer.special_ids], tokenizer.decode(ids, skip_special=False)

    found, written = specials(words, value)
    assert found == specials(["x", "x", "y", "x", "z"], "x")[0]
    assert json.dumps(words[0], ensure_ascii=False) in written  # unchanged, as JSON writes it
    assert words[3] in written


class _Interrupted:
    """A tokenizer whose switch is always turned by somebody else before it is read, if anybody can."""

    def __init__(self, fast: object) -> None:
        self.__dict__["fast"] = fast

    def __getattr__(self, name: str) -> object:
        return getattr(self.fast, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.fast, name, value)
        time.sleep(0.001)


def test_special_tokens_stay_off_while_another_thread_writes_a_template(tokenizer, monkeypatch):  # noqa: F811
    """One switch of the whole tokenizer decides whether "<|im_end|>" is a token; two threads turn it here."""
    monkeypatch.setattr(tokenizer, "_fast", _Interrupted(tokenizer._fast))
    text, stop = "<|im_end|>", threading.Event()

    def trusted() -> None:
        while not stop.is_set():
            tokenizer.encode(text, special=True)

    other = threading.Thread(target=trusted)
    other.start()
    try:
        wrong = [i for _ in range(50) for i in tokenizer.encode(text) if i in tokenizer.special_ids]
    finally:
        stop.set()
        other.join()
    assert not wrong
