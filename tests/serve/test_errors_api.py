"""Errors as the official client raises them: the class, the field, the code."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from chat_model import write_model
from official import CHAT, Served, load, serving

from hasten.engine.limits import LIMITS

KEY = "a-key-of-the-tests-0123456789"
HOW: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = {"tiny": load(write_model(tmp_path_factory.mktemp("tiny"))), "mini-dlm": load("mini-dlm")}
    models["bare"] = load(write_model(tmp_path_factory.mktemp("bare"), template=None))
    with serving(models, keys=(KEY,)) as running:
        yield running


CASES: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = [
    ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
    ({"max_tokens": LIMITS.served_tokens + 1}, openai.BadRequestError, "max_tokens", "invalid_value"),
    ({"n": 10**9}, openai.BadRequestError, "n", "invalid_value"),
    ({"stop": ["x"] * (LIMITS.stop_strings + 1)}, openai.BadRequestError, "stop", "invalid_value"),
    ({"stop": "x" * (LIMITS.stop_chars + 1)}, openai.BadRequestError, "stop", "invalid_value"),
    ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias", "invalid_value"),
    ({"extra_body": {"stopp": "x"}}, openai.BadRequestError, "stopp", "unknown_field"),
    ({"extra_body": {"hasten": {"method": "no-such"}}}, openai.BadRequestError, "method", "unknown_name"),
    ({"extra_body": {"hasten": {"method": ["prompt-lookup"] * 2}}}, openai.BadRequestError, "method", "incompatible"),
    ({"extra_body": {"hasten": {"method": "prophet"}}}, openai.BadRequestError, "method", "incompatible"),
    ({"extra_body": {"hasten": {"method": "prompt-lookup:nodes=x"}}}, openai.BadRequestError, None, "invalid_value"),
    ({"extra_body": {"prompt_embeds": "AAAA"}}, openai.BadRequestError, "prompt_embeds", "invalid_value"),
    ({"max_tokens": 600}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
    ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
    ({"model": "bare"}, openai.BadRequestError, "messages", "invalid_value"),
    ({"model": "mini-dlm", "logprobs": True}, openai.BadRequestError, "logprobs", "incompatible"),
    ({"model": "mini-dlm", "response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "incompatible"),
    ({"model": "mini-dlm", "extra_body": {"hasten": {"method": "prompt-lookup"}}}, openai.BadRequestError, None, "incompatible"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("how", "kind", "param", "code"), CASES)
def test_what_is_refused(
    server: Served,
    how: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    """Streamed or not: what is wrong with a request is said before a stream begins, with a status."""
    with pytest.raises(kind) as caught:
        server.openai(KEY).chat.completions.create(**{**HOW, **how}, stream=stream)
    error = caught.value
    assert error.code == code, error.message
    assert param is None or error.param == param, error.message
    assert error.type == ("not_found_error" if kind is openai.NotFoundError else "invalid_request_error")
    assert set(error.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    answer = server.openai(KEY).chat.completions.create(**HOW)
    assert answer.usage.completion_tokens == 8  # the next one is served


def test_the_keys_of_a_server(server: Served) -> None:
    for key in ("wrong", KEY[:-1], KEY + "x", KEY.upper()):
        with pytest.raises(openai.AuthenticationError) as caught:
            server.openai(key).chat.completions.create(**HOW)
        assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
        assert KEY not in str(caught.value)
    assert server.openai(KEY).models.list().data


def test_completions_and_embeddings_say_what_is_wrong(server: Served) -> None:
    client = server.openai(KEY)
    for how, param in (
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * (LIMITS.served_inputs + 1)}, "prompt"),
        ({"prompt": [999_999]}, "prompt"),
        ({"prompt": [[1, 2], []]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "echo": True, "logprobs": 1, "stream": True}, "echo"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", **how)  # type: ignore[call-overload]
        assert caught.value.param == param, (how, caught.value.message)
    for how, param in (
        ({"input": ""}, "input"),
        ({"input": [999_999]}, "input"),
        ({"input": "x", "dimensions": 33}, "dimensions"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="tiny", **how)  # type: ignore[arg-type]
        assert caught.value.param == param, (how, caught.value.message)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", input=[1] * 513)
    assert caught.value.code == "context_length_exceeded"


def test_other_routes_are_not_there(server: Served) -> None:
    client = server.openai(KEY)
    for call in (client.files.list, client.fine_tuning.jobs.list, client.batches.list, client.vector_stores.list):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_full_queue_is_answered_with_a_time_to_come_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Requests beyond rows and queue get 429 at once; the client's own retries bring them all home."""
    llm = load(write_model(tmp_path_factory.mktemp("small"), window=4096))
    with serving({"tiny": llm}) as running:
        scheduler = llm.engine.scheduler
        scheduler.max_rows, scheduler.max_queue = 1, 2
        how = {**HOW, "max_tokens": 1500, "temperature": 0}

        async def ask(client: openai.AsyncOpenAI, **more: Any) -> Any:
            return await client.chat.completions.create(**{**how, **more})

        async def crowd() -> tuple[list[Any], list[Any]]:
            async with running.async_openai() as client:
                tries = [asyncio.ensure_future(ask(client)) for _ in range(12)]
                first = await asyncio.gather(*tries, return_exceptions=True)
            async with running.async_openai(max_retries=50) as client:
                again = await asyncio.gather(*(ask(client, max_tokens=60, seed=i) for i in range(12)))
            return first, again

        first, again = asyncio.run(crowd())
        refused = [one for one in first if isinstance(one, Exception)]
        assert refused
        assert len(refused) < 12
        for error in refused:
            assert isinstance(error, openai.RateLimitError)
            assert error.code == "queue_full"
            assert int(error.response.headers["retry-after"]) >= 1
        assert len({answer.choices[0].message.content for answer in again}) == 1


def test_a_server_that_still_loads_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, go = write_model(tmp_path_factory.mktemp("slow")), threading.Event()

    def slowly() -> Any:
        go.wait(20)
        return load(folder)

    with serving({"tiny": slowly}, loaded=False) as running:
        assert httpx.get(f"{running.base}/health").status_code == 503
        assert httpx.get(f"{running.base}/ready").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            running.openai().chat.completions.create(**HOW)
        assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        go.set()
        running.until(lambda: httpx.get(f"{running.base}/ready").status_code == 200, "ready")
        assert running.openai().chat.completions.create(**HOW).usage.completion_tokens == 8


def test_a_client_that_stops_waiting_frees_its_row(server: Served) -> None:
    client = server.openai(KEY, timeout=0.05)
    started = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**{**HOW, "max_tokens": 450, "n": 8})
    assert time.monotonic() - started < 5
    server.until(lambda: server.worker.load() == (0, 0), "the row of a client that has gone")
