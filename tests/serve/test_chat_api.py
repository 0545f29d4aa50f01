"""Chat through the official client, against what the library itself answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from chat_model import write_model
from official import CHAT, Served, load, serving, texts, with_end

from hasten.llm import LLM
from hasten.types import Output

SEEDED: dict[str, Any] = {"model": "tiny", "messages": CHAT, "seed": 7, "max_tokens": 24}
END = 33  # a token, one printable character, at which the second model stops


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return load(write_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def server(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    own = load(write_model(tmp_path_factory.mktemp("same")))
    ending = load(with_end(write_model(tmp_path_factory.mktemp("ending")), END))
    with serving({"tiny": own, "ending": ending}, aliases={"gpt-4o-mini": "tiny"}) as running:
        yield running


def direct(llm: LLM, **how: Any) -> Output:
    """The library's answer to SEEDED."""
    return llm.chat(CHAT, **{"seed": 7, "max_tokens": 24, "temperature": 1.0, **how})


def test_models_are_listed_and_found(server: Served) -> None:
    client = server.openai()
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"tiny", "ending", "gpt-4o-mini"}
    one = client.models.retrieve("tiny")
    assert (one.id, one.object, one.owned_by) == ("tiny", "model", "hasten")
    assert one.hasten["kind"] == "causal"
    assert one.hasten["window"] == 512
    assert one.hasten["chat"] is True
    assert client.models.retrieve("gpt-4o-mini").hasten["alias_of"] == "tiny"


def test_an_answer_is_the_librarys(server: Served, llm: LLM) -> None:
    answer, own = server.openai().chat.completions.create(**SEEDED), direct(llm)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", own.text)
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert choice.message.refusal is None
    prompt = len(llm.chat_ids(CHAT))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 24)
    assert answer.usage.total_tokens == prompt + 24
    assert answer.hasten["seed"] == 7
    assert answer.hasten["usage"]["forwards"] >= 1


def test_choices_repeat_with_the_seed_and_differ_among_each_other(server: Served) -> None:
    client = server.openai()
    first, again = (client.chat.completions.create(**SEEDED, n=4) for _ in range(2))
    contents = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert contents == [choice.message.content for choice in again.choices]
    assert len(set(contents)) == 4
    other = client.chat.completions.create(**{**SEEDED, "seed": 8})
    assert other.choices[0].message.content not in contents
    alone = client.chat.completions.create(**SEEDED)
    assert alone.choices[0].message.content == contents[0]


def test_without_a_seed_answers_differ_and_tell_the_seed_they_can_be_repeated_with(server: Served) -> None:
    client = server.openai()
    how = {name: value for name, value in SEEDED.items() if name != "seed"}
    one, two = (client.chat.completions.create(**how) for _ in range(2))
    assert one.choices[0].message.content != two.choices[0].message.content
    again = client.chat.completions.create(**how, seed=one.hasten["seed"])
    assert again.choices[0].message.content == one.choices[0].message.content


def test_temperature_zero_and_the_cut_offs_are_the_librarys(server: Served, llm: LLM) -> None:
    client = server.openai()
    for how in ({"temperature": 0}, {"top_p": 0.3}, {"temperature": 1.7}, {"presence_penalty": 2.0},
                {"frequency_penalty": 1.5}, {"logit_bias": {"40": 6, "41": -100}}):  # fmt: skip
        own = direct(llm, **{**how, **({"logit_bias": {40: 6, 41: -100}} if "logit_bias" in how else {})})
        answer = client.chat.completions.create(**SEEDED, **how)
        assert answer.choices[0].message.content == own.text, how
        if how != {"temperature": 1.7}:
            assert own.text != direct(llm, temperature=1.7).text
    for name, value in (("top_k", 3), ("min_p", 0.3), ("repetition_penalty", 1.8)):
        answer = client.chat.completions.create(**SEEDED, extra_body={"hasten": {name: value}})
        assert answer.choices[0].message.content == direct(llm, **{name: value}).text != direct(llm).text, name


def test_logit_bias_forces_and_forbids(server: Served, llm: LLM) -> None:
    client = server.openai()
    forced = client.chat.completions.create(**SEEDED, logit_bias={"40": 100})
    assert forced.choices[0].message.content == llm.decode([40]) * 24
    greedy = client.chat.completions.create(**SEEDED, temperature=0, logprobs=True)
    banned = str(direct(llm, temperature=0).tokens[0])
    other = client.chat.completions.create(**SEEDED, temperature=0, logprobs=True, logit_bias={banned: -100})
    assert greedy.choices[0].logprobs.content[0].token != other.choices[0].logprobs.content[0].token


def test_stop_strings_end_the_text_before_themselves(server: Served, llm: LLM) -> None:
    text = direct(llm, temperature=0).text
    stop = next(text[i : i + 3] for i in range(8, len(text)) if text[i : i + 3].isascii() and len(text[i : i + 3]) == 3)
    want = direct(llm, temperature=0, stop=[stop])
    client = server.openai()
    for given in (stop, [stop], ["never there", stop]):
        answer = client.chat.completions.create(**SEEDED, temperature=0, stop=given)
        assert answer.choices[0].message.content == want.text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(**SEEDED, temperature=0, stop=given, stream=True)
        assert texts(stream) == [want.text]


def test_finish_reasons(server: Served) -> None:
    client = server.openai()
    ended = client.chat.completions.create(**{**SEEDED, "model": "ending"}, logit_bias={str(END): 100})
    assert (ended.choices[0].finish_reason, ended.choices[0].message.content) == ("stop", "")
    assert ended.usage is not None
    assert ended.usage.completion_tokens == 1
    on = client.chat.completions.create(
        **{**SEEDED, "model": "ending"}, logit_bias={str(END): 100}, extra_body={"hasten": {"ignore_eos": True}}
    )
    assert on.choices[0].finish_reason == "length"
    assert on.usage.completion_tokens == 24


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_lengths(server: Served, name: str) -> None:
    how = {key: value for key, value in SEEDED.items() if key != "max_tokens"}
    for count in (1, 5):
        answer = server.openai().chat.completions.create(**how, **{name: count})
        assert answer.usage.completion_tokens == count
        assert answer.choices[0].finish_reason == "length"


def test_without_a_length_the_window_is_filled(server: Served, llm: LLM) -> None:
    how = {key: value for key, value in SEEDED.items() if key != "max_tokens"}
    answer = server.openai().chat.completions.create(**how)
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_logprobs_are_the_librarys_numbers(server: Served, llm: LLM) -> None:
    own = direct(llm, logprobs=5)
    answer = server.openai().chat.completions.create(**SEEDED, logprobs=True, top_logprobs=5)
    entries = answer.choices[0].logprobs.content
    assert own.logprobs is not None
    assert len(entries) == len(own.logprobs) == 24
    joined = b""
    for entry, one in zip(entries, own.logprobs, strict=True):
        raw = llm.tokenizer.token_bytes(one.token)
        assert bytes(entry.bytes) == raw
        assert entry.token == raw.decode() if raw.isascii() else entry.token.startswith("bytes:\\x")
        assert entry.logprob == pytest.approx(one.logprob, abs=1e-5)
        assert [bytes(other.bytes) for other in entry.top_logprobs] == [llm.tokenizer.token_bytes(t) for t, _ in one.top]
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx([v for _, v in one.top], abs=1e-5)
        joined += raw
    assert joined.decode("utf-8", "replace") == answer.choices[0].message.content
    bare = server.openai().chat.completions.create(**SEEDED, logprobs=True)
    assert all(entry.top_logprobs == [] for entry in bare.choices[0].logprobs.content)
    assert bare.choices[0].message.content == answer.choices[0].message.content


def test_a_stream_put_together_is_the_answer(server: Served, llm: LLM) -> None:
    client = server.openai()
    whole = client.chat.completions.create(**SEEDED, n=3, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**SEEDED, n=3, logprobs=True, top_logprobs=2, stream=True))
    assert texts(chunks, 3) == [choice.message.content for choice in whole.choices]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    for index, choice in enumerate(whole.choices):
        own = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert own[0].delta.role == "assistant"
        assert own[0].delta.content == ""
        assert all(part.delta.role is None for part in own[1:])
        assert own[-1].finish_reason == choice.finish_reason == "length"
        entries = [entry for part in own if part.logprobs for entry in part.logprobs.content]
        assert entries == choice.logprobs.content
    assert all(chunk.usage is None for chunk in chunks)
    assert sum(1 for chunk in chunks if chunk.choices and chunk.choices[0].index == 0) > 5  # it came in pieces


def test_a_stream_ends_with_the_counts_when_they_are_asked_for(server: Served) -> None:
    client = server.openai()
    whole = client.chat.completions.create(**SEEDED, n=2)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**SEEDED, n=2, stream=True, stream_options=options))
    assert chunks[-1].choices == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])


def test_the_bytes_of_a_stream(server: Served) -> None:
    with server.http() as client, client.stream("POST", "/v1/chat/completions", json={**SEEDED, "stream": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-hasten-method"] == "auto"
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_the_trace_of_a_stream(server: Served, llm: LLM) -> None:
    own = direct(llm)
    stream = server.openai().chat.completions.create(**SEEDED, stream=True, extra_body={"hasten": {"trace": True}})
    chunks = list(stream)
    events = [event for chunk in chunks for event in (chunk.model_extra.get("hasten") or {}).get("events", ())]
    commits = [event for event in events if event["kind"] == "commit"]
    prompt = len(llm.chat_ids(CHAT))
    assert [event["token"] for event in commits] == list(own.tokens)
    assert [event["position"] for event in commits] == list(range(prompt, prompt + 24))
    assert "".join(event.get("text", "") for event in commits) == own.text
    assert {"prefill", "forward", "commit", "stop"} <= {event["kind"] for event in events}
    assert all(event["choice"] == 0 and event["t"] >= 0 for event in events)
    last = next(chunk for chunk in reversed(chunks) if chunk.model_extra.get("hasten")).model_extra["hasten"]
    passes = sum(event["kind"] == "forward" for event in events)
    assert last["seed"] == 7
    assert last["usage"]["forwards"] == passes - 1
    plain = list(server.openai().chat.completions.create(**SEEDED, stream=True))
    assert not any((chunk.model_extra.get("hasten") or {}).get("events") for chunk in plain)


def test_methods_per_request_and_headers(server: Served, llm: LLM) -> None:
    client = server.openai()
    own = direct(llm, temperature=0, method="plain", max_tokens=60)
    for method in ("plain", "prompt-lookup", "prompt-lookup:nodes=4", ["token-recycling", "prompt-lookup"]):
        raw = client.chat.completions.with_raw_response.create(
            **{**SEEDED, "temperature": 0, "max_tokens": 60}, extra_body={"hasten": {"method": method}}
        )
        answer = raw.parse()
        assert answer.choices[0].message.content == own.text, method
        slugs = [name.partition(":")[0] for name in ([method] if isinstance(method, str) else method)]
        assert answer.hasten["method"] == slugs
        assert raw.headers["x-hasten-method"] == ",".join(slugs)
        assert int(raw.headers["x-hasten-forwards"]) == answer.hasten["usage"]["forwards"]
        drafted = answer.hasten["usage"]["drafted_tokens"]
        assert method != "plain" or (drafted, answer.hasten["usage"]["forwards"]) == (0, 59)
        share = answer.hasten["usage"]["accepted_tokens"] / drafted if drafted else 0
        assert float(raw.headers["x-hasten-acceptance"]) == pytest.approx(share, abs=1e-3)
        assert raw.headers["x-hasten-seed"] == "7"


def test_messages_in_parts_roles_and_names(server: Served, llm: LLM) -> None:
    client = server.openai()
    parts = [{"type": "text", "text": CHAT[0]["content"][:9]}, {"type": "text", "text": CHAT[0]["content"][9:]}]
    same = client.chat.completions.create(**{**SEEDED, "messages": [{"role": "user", "content": parts}]})
    assert same.choices[0].message.content == direct(llm).text
    dialogue = [{"role": "system", "content": "Be short."}, *CHAT, {"role": "assistant", "content": "No."}, *CHAT]
    answer = client.chat.completions.create(**{**SEEDED, "messages": dialogue})
    assert answer.choices[0].message.content == llm.chat(dialogue, seed=7, max_tokens=24, temperature=1.0).text


def test_the_asynchronous_client(server: Served, llm: LLM) -> None:
    async def ask() -> tuple[str, list[str]]:
        async with server.async_openai() as client:
            whole = await client.chat.completions.create(**SEEDED)
            stream = await client.chat.completions.create(**SEEDED, stream=True)
            chunks = [chunk async for chunk in stream]
            return whole.choices[0].message.content, texts(chunks)

    assert asyncio.run(ask()) == (direct(llm).text, [direct(llm).text])
