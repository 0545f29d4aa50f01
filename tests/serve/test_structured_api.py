"""Tools and structured outputs through the official client's own helpers, checked by libraries that are not ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from official import Served, serving

import hasten


class Person(pydantic.BaseModel):
    """What a structured answer holds."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=150)
    kind: Literal["human", "robot"]
    tags: list[Literal["tea", "maps", "rain"]] = pydantic.Field(max_length=3)


class Weather(pydantic.BaseModel):
    """What the weather tool takes."""

    city: str
    unit: Literal["C", "F"]


class Now(pydantic.BaseModel):
    """What the clock takes: nothing."""


ASKED: dict[str, Any] = {
    "model": "smol", "seed": 1, "temperature": 0, "max_tokens": 120,
    "messages": [{"role": "user", "content": "Invent a person who likes three things. Answer as JSON."}],
}  # fmt: skip
WEATHER = {**ASKED, "messages": [{"role": "user", "content": "What is the weather in Paris, in Celsius?"}]}
TOOLS = [
    openai.pydantic_function_tool(Weather, name="weather", description="The weather of a city"),
    openai.pydantic_function_tool(Now, name="now", description="The time"),
]


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path) -> Iterator[Served]:
    with serving({"smol": hasten.load(smollm2_gguf, cache_bytes=200_000_000)}) as running:
        yield running


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_a_pydantic_model_comes_back_parsed(server: Served, temperature: float) -> None:
    client = server.openai()
    how = {**ASKED, "temperature": temperature}
    answer = client.chat.completions.parse(**how, response_format=Person)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Person)
    with client.chat.completions.stream(**how, response_format=Person) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


@pytest.mark.parametrize("method", ["plain", "prompt-lookup", "token-recycling"])
def test_forms_of_answers(server: Served, method: str) -> None:
    client, extra = server.openai(), {"method": method}
    schema = {
        "type": "object", "required": ["a", "b"], "additionalProperties": False,
        "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 9}, "b": {"enum": ["x", "y", 3]}},
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**ASKED, response_format=form, extra_body={"hasten": extra})
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    answer = client.chat.completions.create(**ASKED, response_format={"type": "json_object"}, extra_body={"hasten": extra})
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    for grammar, fits in (
        ({"regex": r"[A-Z][a-z]{2,5}, \d{4}"}, lambda text: re.fullmatch(r"[A-Z][a-z]{2,5}, \d{4}", text)),
        ({"choice": ["yes indeed", "no", "perhaps"]}, lambda text: text in ("yes indeed", "no", "perhaps")),
        ({"lark": 'start: "<" WORD ">"\nWORD: /[a-z]{3,8}/'}, lambda text: re.fullmatch(r"<[a-z]{3,8}>", text)),
    ):
        answer = client.chat.completions.create(**ASKED, extra_body={"hasten": {**extra, **grammar}})
        assert answer.choices[0].finish_reason == "stop"
        assert fits(answer.choices[0].message.content), answer.choices[0].message.content
        done = client.completions.create(
            model="smol", prompt="Answer:", max_tokens=40, extra_body={"hasten": {**extra, **grammar}}
        )
        assert fits(done.choices[0].text), done.choices[0].text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_has_arguments_of_the_schema(server: Served, choice: Any) -> None:
    client = server.openai()
    how = {**WEATHER, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.parse(**how)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert re.fullmatch(r"call_[0-9a-f]{24}", call.id)
    if choice != "required":
        assert call.function.name == "weather"
        assert isinstance(call.function.parsed_arguments, Weather)
    assert not answer.choices[0].message.content
    with client.chat.completions.stream(**how) as stream:
        parts = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (other,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert (other.id, other.function.name, other.function.arguments) == (
        call.id,
        call.function.name,
        call.function.arguments,
    )
    assert "".join(part.arguments_delta for part in parts) == call.function.arguments


def test_tools_beside_a_form_give_calls_or_json(server: Served) -> None:
    client = server.openai()
    schema = {"type": "object", "properties": {"degrees": {"type": "integer"}}, "required": ["degrees"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "told", "schema": schema}}
    free = client.chat.completions.create(**WEATHER, tools=TOOLS, response_format=form)
    message = free.choices[0].message
    if message.tool_calls:
        assert free.choices[0].finish_reason == "tool_calls"
        assert not message.content
    elif free.choices[0].finish_reason == "stop":
        jsonschema.validate(json.loads(message.content or ""), schema)
    told = client.chat.completions.create(**WEATHER, tools=TOOLS, response_format=form, tool_choice="none")
    jsonschema.validate(json.loads(told.choices[0].message.content or ""), schema)
    called = client.chat.completions.create(
        **WEATHER, tools=TOOLS, response_format=form, tool_choice={"type": "function", "function": {"name": "weather"}}
    )
    assert called.choices[0].message.tool_calls
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/$defs/nowhere"}}}
    for tools in ({}, {"tools": TOOLS}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**WEATHER, **tools, response_format=wrong)
        assert caught.value.param == "response_format"
        assert "nowhere" in caught.value.message


def test_a_dialogue_with_a_call_and_its_result(server: Served) -> None:
    client = server.openai()
    how = {**WEATHER, "tools": TOOLS, "max_tokens": 40}
    first = client.chat.completions.create(**how, tool_choice={"type": "function", "function": {"name": "weather"}})
    (call,) = first.choices[0].message.tool_calls or ()
    dialogue = [
        *WEATHER["messages"],
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'},
    ]
    told = client.chat.completions.create(**{**how, "messages": dialogue}, tool_choice="none")
    assert told.choices[0].message.content
    assert told.choices[0].message.tool_calls is None
    free = client.chat.completions.create(**{**how, "messages": dialogue})  # auto: text or calls, and nothing in between
    assert free.usage.prompt_tokens > first.usage.prompt_tokens > told.usage.prompt_tokens  # without tools it is short
    message = free.choices[0].message
    assert message.content or message.tool_calls
    assert "<tool_call>" not in (message.content or "")


def test_what_cannot_be_enforced_is_refused_with_its_path(server: Served) -> None:
    client = server.openai()
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED, response_format=form)
    assert "uniqueItems" in caught.value.message
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED, tools=[tool], tool_choice="required")
    assert "uniqueItems" in caught.value.message
    assert (caught.value.param or "").startswith("tools[0].function.parameters")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED, response_format=form, extra_body={"hasten": {"regex": "a"}})
    assert caught.value.param == "hasten.regex"
