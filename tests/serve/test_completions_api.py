"""Completions and embeddings through the official client, against what the library itself answers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from chat_model import write_model
from official import Served, load, serving

from hasten.llm import LLM

PROMPT = "The quick brown fox"
HOW: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "seed": 5, "max_tokens": 16}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return load(write_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def dlm() -> LLM:
    return load("mini-dlm")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    own = load(write_model(tmp_path_factory.mktemp("same")))
    with serving({"tiny": own, "mini-dlm": load("mini-dlm")}) as running:
        yield running


def direct(llm: LLM, prompt: Any = PROMPT, **how: Any) -> Any:
    return llm.generate(prompt, **{"seed": 5, "max_tokens": 16, "temperature": 1.0, **how})


def test_a_completion_is_the_librarys(server: Served, llm: LLM) -> None:
    answer, own = server.openai().completions.create(**HOW), direct(llm)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, own.text, "length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(llm.encode(PROMPT)), 16)
    ids = server.openai().completions.create(**{**HOW, "prompt": llm.encode(PROMPT)})
    assert ids.choices[0].text == own.text
    short = server.openai().completions.create(model="tiny", prompt=PROMPT)
    assert short.usage.completion_tokens == 16  # OpenAI's default


def test_several_prompts_times_several_choices(server: Served, llm: LLM) -> None:
    prompts = [PROMPT, "over the lazy dog", "again and again"]
    answer = server.openai().completions.create(**{**HOW, "prompt": prompts}, n=2)
    want = [one.text for outs in direct(llm, prompts, n=2) for one in outs]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == want
    assert answer.usage.prompt_tokens == sum(len(llm.encode(prompt)) for prompt in prompts)
    assert answer.usage.completion_tokens == 6 * 16
    parts = [""] * 6
    for chunk in server.openai().completions.create(**{**HOW, "prompt": prompts}, n=2, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == want
    lists = server.openai().completions.create(**{**HOW, "prompt": [llm.encode(one) for one in prompts]}, n=2)
    assert [choice.text for choice in lists.choices] == want


def test_echo_comes_before_the_text(server: Served, llm: LLM) -> None:
    own = direct(llm)
    assert server.openai().completions.create(**HOW, echo=True).choices[0].text == PROMPT + own.text
    stream = server.openai().completions.create(**HOW, echo=True, stream=True)
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == PROMPT + own.text
    given = server.openai().completions.create(**{**HOW, "prompt": llm.encode(PROMPT)}, echo=True)
    assert given.choices[0].text == PROMPT + own.text


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_ids", [False, True])
def test_scores_of_a_prompt_are_the_librarys(server: Served, llm: LLM, max_tokens: int, as_ids: bool) -> None:
    texts = ["The quick brown fox jumps over", "again and again reads"]
    tokens = [llm.encode(text) for text in texts]
    answer = server.openai().completions.create(
        model="tiny", prompt=tokens if as_ids else texts, max_tokens=max_tokens, echo=True, logprobs=3, temperature=0
    )
    for choice, text, ids in zip(answer.choices, texts, tokens, strict=True):
        found = choice.logprobs
        more = direct(llm, text, temperature=0, max_tokens=1, logprobs=3) if max_tokens else None
        want = llm.score(ids[:1], ids[1:])
        after = [more.logprobs[0].logprob] if more else []
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx([*want.logprobs, *after], abs=1e-5)
        assert found.tokens == [llm.decode([token], skip_special=False) for token in [*ids, *(more.tokens if more else ())]]
        assert len(found.top_logprobs) == len(found.tokens) == len(found.text_offset)
        for token, value, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
            assert len(top) == 3
            assert max(top.values()) >= value - 1e-6
            assert token not in top or top[token] == pytest.approx(value, abs=1e-5)
            assert list(top.values()) == sorted(top.values(), reverse=True)
        for token, at in zip(found.tokens, found.text_offset, strict=True):
            assert choice.text[at : at + len(token)] == token
        assert choice.text == text + (more.text if more else "")
        assert choice.finish_reason == "length"
    count = sum(map(len, tokens))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (count, max_tokens * 2)


def test_logprobs_of_new_tokens(server: Served, llm: LLM) -> None:
    own = direct(llm, logprobs=2)
    found = server.openai().completions.create(**HOW, logprobs=2).choices[0].logprobs
    assert found.token_logprobs == pytest.approx([one.logprob for one in own.logprobs], abs=1e-5)
    for top, one in zip(found.top_logprobs, own.logprobs, strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(value for _, value in one.top), abs=1e-5)
    offsets: list[int] = []
    values: list[float] = []
    for chunk in server.openai().completions.create(**HOW, logprobs=2, stream=True):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                values += choice.logprobs.token_logprobs
                offsets += choice.logprobs.text_offset
    assert values == pytest.approx([one.logprob for one in own.logprobs], abs=1e-5)
    assert offsets == found.text_offset


def test_a_long_prompt_is_scored_while_others_write(server: Served, llm: LLM) -> None:
    ids = (llm.encode("again and again reads this text ") * 80)[:500]
    answer = server.openai().completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    want = llm.score(ids[:1], ids[1:]).logprobs
    assert answer.choices[0].logprobs.token_logprobs[1:] == pytest.approx(list(want), abs=1e-5)


def test_infill_on_a_canvas(server: Served, dlm: LLM) -> None:
    answer = server.openai().completions.create(
        model="mini-dlm", prompt="copy: abc ", suffix=" def", max_tokens=6, seed=3, temperature=0
    )
    want = dlm.fill("copy: abc <mask:6> def", temperature=0, seed=3)
    assert "copy: abc " + answer.choices[0].text == want.text
    assert answer.choices[0].text.endswith(" def")


def test_canvases_stream_in_order_with_guesses_on_request(server: Served, dlm: LLM) -> None:
    how: dict[str, Any] = {"model": "mini-dlm", "prompt": "sort: d b a c =", "max_tokens": 24, "seed": 1, "temperature": 0}
    want = dlm.generate(how["prompt"], max_tokens=24, seed=1, temperature=0)
    client = server.openai()
    assert client.completions.create(**how).choices[0].text == want.text
    seen: dict[bool, set[str]] = {}
    for provisional in (False, True):
        extra = {"hasten": {"trace": True, "provisional": provisional}}
        text, events = "", []
        for chunk in client.completions.create(**how, stream=True, extra_body=extra):
            text += "".join(choice.text for choice in chunk.choices)
            events += (chunk.model_extra.get("hasten") or {}).get("events", [])
        assert text == want.text
        seen[provisional] = {event["kind"] for event in events}
        assert [e["token"] for e in sorted((e for e in events if e["kind"] == "commit"), key=lambda e: e["position"])][
            : len(want.tokens)
        ] == list(want.tokens)
        if provisional:
            guesses = [event for event in events if event["kind"] == "propose"]
            assert all(0 <= event["confidence"] <= 1 and "piece" in event for event in guesses)
    assert "propose" not in seen[False]
    assert "propose" in seen[True]
    assert "block" in seen[False]


def test_embeddings_are_the_librarys(server: Served, llm: LLM) -> None:
    client, texts = server.openai(), ["The quick brown fox", "the lazy dog", "x"]
    want = llm.embed(texts).numpy()
    answer = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64 and decodes it
    assert [one.index for one in answer.data] == [0, 1, 2]
    np.testing.assert_allclose([one.embedding for one in answer.data], want, atol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(llm.encode(text)) for text in texts)
    floats = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    np.testing.assert_allclose([one.embedding for one in floats.data], want, atol=1e-6)
    raw = server.http()
    with raw:
        body = {"model": "tiny", "input": texts[0], "encoding_format": "base64"}
        sent = raw.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(sent), "<f4"), want[0], atol=1e-6)
    for given in (llm.encode(texts[0]), [llm.encode(texts[0])]):
        one = client.embeddings.create(model="tiny", input=given)
        np.testing.assert_allclose(one.data[0].embedding, want[0], atol=1e-6)


def test_embeddings_of_other_shapes(server: Served, llm: LLM, dlm: LLM) -> None:
    client, text = server.openai(), "The quick brown fox"
    for pooling in ("mean", "last"):
        full = llm.embed(text, pooling=pooling, normalize=False).numpy()[0]
        raw = {"hasten": {"pooling": pooling, "normalize": False}}
        got = client.embeddings.create(model="tiny", input=text, extra_body=raw).data[0].embedding
        np.testing.assert_allclose(got, full, atol=1e-5)
        cut = client.embeddings.create(model="tiny", input=text, dimensions=8, extra_body={"hasten": {"pooling": pooling}})
        np.testing.assert_allclose(cut.data[0].embedding, full[:8] / np.linalg.norm(full[:8]), atol=1e-6)
    assert not np.allclose(llm.embed(text).numpy(), llm.embed(text, pooling="last").numpy())
    got = client.embeddings.create(model="mini-dlm", input=text).data[0].embedding
    np.testing.assert_allclose(got, dlm.embed(text).numpy()[0], atol=1e-6)
