"""Every field of OpenAI's request types is honoured, or refused by its name; one that is new there fails here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest
from chat_model import write_model
from official import CHAT, Served, load, serving, with_end
from openai.types import completion_create_params as completion_types
from openai.types import embedding_create_params as embedding_types
from openai.types.chat import chat_completion_content_part_param as part_types
from openai.types.chat import chat_completion_message_param as message_types
from openai.types.chat import completion_create_params as chat_types
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
NONE = object()  # there is no value that is allowed, or none that is not

# field -> (a value that is taken, one that is refused, what the refusal names)
SHARED: dict[str, tuple[Any, Any, str]] = {
    "model": ("tiny", "nobody", "model"),
    "max_tokens": (3, -1, "max_tokens"),
    "temperature": (0.5, 2.1, "temperature"),
    "top_p": (0.5, 0, "top_p"),
    "n": (2, 9, "n"),
    "seed": (4, "4", "seed"),
    "stop": (["x", "y"], [""], "stop"),
    "presence_penalty": (1.0, 2.5, "presence_penalty"),
    "frequency_penalty": (-1.0, -2.5, "frequency_penalty"),
    "logit_bias": ({"5": 3.5}, {"five": 3.5}, "logit_bias"),
    "stream": (True, "yes", "stream"),
    "stream_options": (NONE, {"include_usage": True}, "stream_options"),  # only with stream
    "user": ("somebody", 7, "user"),
}
CHATS: dict[str, tuple[Any, Any, str]] = {
    **SHARED,
    "messages": (CHAT, [], "messages"),
    "max_completion_tokens": (3, 0, "max_completion_tokens"),
    "logprobs": (True, 1, "logprobs"),
    "top_logprobs": (NONE, 2, "top_logprobs"),  # only with logprobs
    "response_format": ({"type": "text"}, {"type": "xml"}, "response_format.type"),
    "tools": ([TOOL], [{"type": "custom", "custom": {"name": "look"}}], "tools[0].type"),
    "tool_choice": (NONE, "auto", "tool_choice"),  # only with tools
    "parallel_tool_calls": (NONE, True, "parallel_tool_calls"),  # only with tools
    "modalities": (["text"], ["audio"], "modalities[0]"),
    "service_tier": ("auto", "flex", "service_tier"),
    "store": (False, True, "store"),
    "prompt_cache_key": ("mine", 7, "prompt_cache_key"),
    "safety_identifier": ("somebody", 7, "safety_identifier"),
    "audio": (NONE, {"voice": "alloy", "format": "wav"}, "audio"),
    "function_call": (NONE, "auto", "function_call"),
    "functions": (NONE, [{"name": "look"}], "functions"),
    "metadata": (NONE, {"a": "b"}, "metadata"),
    "moderation": (NONE, {"model": "m"}, "moderation"),
    "prediction": (NONE, {"type": "content", "content": "x"}, "prediction"),
    "prompt_cache_options": (NONE, {"mode": "explicit"}, "prompt_cache_options"),
    "prompt_cache_retention": (NONE, "24h", "prompt_cache_retention"),
    "reasoning_effort": (NONE, "low", "reasoning_effort"),
    "verbosity": (NONE, "low", "verbosity"),
    "web_search_options": (NONE, {}, "web_search_options"),
}
COMPLETIONS: dict[str, tuple[Any, Any, str]] = {
    **SHARED,
    "prompt": ("Once", "", "prompt"),
    "best_of": (1, 2, "best_of"),
    "echo": (True, "yes", "echo"),
    "logprobs": (1, 21, "logprobs"),
    "suffix": (NONE, "end", "suffix"),  # a canvas model's
}
EMBEDDINGS: dict[str, tuple[Any, Any, str]] = {
    "model": ("tiny", "nobody", "model"),
    "input": ("text", "", "input"),
    "dimensions": (8, 33, "dimensions"),
    "encoding_format": ("base64", "hex", "encoding_format"),
    "user": ("somebody", 7, "user"),
}
MESSAGES: dict[str, tuple[Any, Any, str]] = {
    "role": ("assistant", "function", "messages[1].role"),
    "content": ("words", 7, "messages[1].content"),
    "name": ("bob", 7, "messages[1].name"),
    "refusal": ("no", 7, "messages[1].refusal"),
    "tool_calls": (
        [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        [{"id": "1", "type": "custom", "custom": {"name": "look", "input": ""}}],
        "messages[1].tool_calls[0].type",
    ),
    "tool_call_id": (NONE, "1", "messages[1].tool_call_id"),  # only of role tool
    "audio": (NONE, {"id": "1"}, "messages[1].audio"),
    "function_call": (NONE, {"name": "look", "arguments": "{}"}, "messages[1].function_call"),
}
PARTS: dict[str, tuple[Any, Any, str]] = {
    "type": ("text", "image", "type"),
    "text": ("words", 7, "text"),
    "image_url": (NONE, {"url": "data:image/png;base64,AAAA"}, "image_url.url"),
    "input_audio": (NONE, {"data": "AAAA", "format": "wav"}, "input_audio"),
    "file": (NONE, {"file_id": "1"}, "file"),
    "prompt_cache_breakpoint": (NONE, {"mode": "explicit"}, "prompt_cache_breakpoint"),
}
ROUTES = {
    "chat/completions": (CHATS, {"model": "tiny", "messages": CHAT, "max_tokens": 3}),
    "completions": (COMPLETIONS, {"model": "tiny", "prompt": "Once", "max_tokens": 3}),
    "embeddings": (EMBEDDINGS, {"model": "tiny", "input": "text"}),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny = load(with_end(write_model(tmp_path_factory.mktemp("tiny")), 1))  # without an end, no grammar could end
    with serving({"tiny": tiny}) as running:
        yield running


def fields(*types: Any) -> set[str]:
    return {name for kind in types for name in kind.__annotations__}


def test_the_tables_hold_all_fields_of_this_openai() -> None:
    """A new version of the client that has a further field comes to light here: honour it, or refuse it in the table."""
    stream = chat_types.CompletionCreateParamsStreaming
    assert set(CHATS) == fields(chat_types.CompletionCreateParamsBase, stream)
    assert set(COMPLETIONS) == fields(
        completion_types.CompletionCreateParamsBase, completion_types.CompletionCreateParamsStreaming
    )
    assert set(EMBEDDINGS) == fields(embedding_types.EmbeddingCreateParams)
    assert set(MESSAGES) == fields(*get_args(message_types.ChatCompletionMessageParam))
    assert set(PARTS) == fields(*get_args(part_types.ChatCompletionContentPartParam))
    assert fields(ChatCompletionStreamOptionsParam) == {"include_usage", "include_obfuscation"}


@pytest.mark.parametrize(("route", "field"), [(route, field) for route, (table, _) in ROUTES.items() for field in table])
def test_every_field_is_honoured_or_refused_by_name(server: Served, route: str, field: str) -> None:
    table, body = ROUTES[route]
    taken, refused, named = table[field]
    if field == "max_completion_tokens":
        body = {name: value for name, value in body.items() if name != "max_tokens"}
    with server.http() as client:
        if taken is not NONE:
            answer = client.post(f"/v1/{route}", json={**body, field: taken})
            assert answer.status_code == 200, answer.text
        without = client.post(f"/v1/{route}", json={**body, field: None})  # null is "not given", as the client's types say
        assert without.status_code == (400 if field in ("model", "messages", "prompt", "input") else 200), without.text
        told(client.post(f"/v1/{route}", json={**body, field: refused}), named, 404 if field == "model" else 400)


@pytest.mark.parametrize("field", MESSAGES)
def test_every_field_of_a_message_is_honoured_or_refused_by_name(server: Served, field: str) -> None:
    taken, refused, named = MESSAGES[field]
    body = {"model": "tiny", "max_tokens": 3}
    with server.http() as client:
        for value, good in ((taken, True), (refused, False)):
            message = {"role": "assistant", "content": "Well.", field: value}
            if value is NONE:
                continue
            answer = client.post("/v1/chat/completions", json={**body, "messages": [*CHAT, message, *CHAT]})
            if good:
                assert answer.status_code == 200, answer.text
            else:
                told(answer, named)


@pytest.mark.parametrize("field", PARTS)
def test_every_field_of_a_content_part_is_honoured_or_refused_by_name(server: Served, field: str) -> None:
    taken, refused, named = PARTS[field]
    with server.http() as client:
        for value in (taken, refused):
            if value is NONE:
                continue
            content = [{"type": "text", "text": "Well.", field: value}]
            body = {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": content}]}
            answer = client.post("/v1/chat/completions", json=body)
            if value is taken:
                assert answer.status_code == 200, answer.text
            else:
                told(answer, f"messages[0].content[0].{named}")


def test_options_of_streams(server: Served) -> None:
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 3, "stream": True}
    with server.http() as client:
        for options in ({"include_usage": True}, {"include_usage": False, "include_obfuscation": False}, {}):
            answer = client.post("/v1/chat/completions", json={**body, "stream_options": options})
            assert answer.status_code == 200
            assert ('"total_tokens"' in answer.text) == options.get("include_usage", False)
        answer = client.post("/v1/chat/completions", json={**body, "stream_options": {"include_obfuscation": True}})
        told(answer, "stream_options.include_obfuscation")


@pytest.mark.parametrize("route", ROUTES)
def test_unknown_fields_are_refused_everywhere(server: Served, route: str) -> None:
    _, body = ROUTES[route]
    with server.http() as client:
        told(client.post(f"/v1/{route}", json={**body, "temprature": 1}), "temprature", code="unknown_field")
        told(client.post(f"/v1/{route}", json={**body, "hasten": {"methd": "x"}}), "hasten.methd", code="unknown_field")


def told(answer: httpx.Response, param: str, status: int = 400, code: str | None = None) -> None:
    """The answer is OpenAI's error object, which names the field."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    assert code is None or error["code"] == code
