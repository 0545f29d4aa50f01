"""Every bound on a request, at the bound and one beyond it, through the API; the bound is honoured, not a neighbour of it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_model import write_model
from live import Served, chat, read_all, rows, serving, texts, until

import hasten
from hasten.engine.limits import LIMITS, Limits
from hasten.errors import ConfigError
from hasten.serve import run, sse, worker
from hasten.serve.settings import Settings

TESTS = Path(__file__).resolve().parents[1]
WINDOW = 16_384
CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return hasten.load(
        str(write_model(tmp_path_factory.mktemp("wide"), window=WINDOW)), serving=True, cache_bytes=400_000_000
    )


@pytest.fixture(scope="module")
def server(llm):
    with serving({"tiny": llm, "mini-dlm": lambda: hasten.load("mini-dlm", serving=True)}) as served:
        yield served


def text(prompt: Any = "a", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 1, **more}


def tool(i: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object", "properties": {}}}}


def bias(count: int) -> dict[str, float]:
    """So many entries for a vocabulary of a few hundred: leading zeros make keys of their own."""
    return {f"{i % 100:0{2 + i // 100}d}": 0.5 for i in range(count)} if count <= 900 else {
        **bias(900), **{str(100 + i): 0.5 for i in range(count - 900)},
    }  # fmt: skip


CASES = {
    "messages": (CHAT, lambda k: chat([{"role": "user", "content": "a"}] * k, max_tokens=1), LIMITS.messages, "messages"),
    "max_tokens": (CHAT, lambda k: chat(max_tokens=k, stream=True), LIMITS.served_tokens, "max_tokens"),
    "max_completion_tokens": (
        CHAT, lambda k: {**chat(stream=True, max_completion_tokens=k), "max_tokens": None}, LIMITS.served_tokens,
        "max_completion_tokens",
    ),
    "max_tokens of a text": (TEXT, lambda k: text(max_tokens=k, stream=True), LIMITS.served_tokens, "max_tokens"),
    "n": (CHAT, lambda k: chat(n=k, max_tokens=1), LIMITS.n, "n"),
    "stop strings": (CHAT, lambda k: chat(stop=[f"~{i}" for i in range(k)]), LIMITS.stop_strings, "stop"),
    "characters of stop": (CHAT, lambda k: chat(stop="~" * k), LIMITS.stop_chars, "stop"),
    "characters of a stop string": (CHAT, lambda k: chat(stop=["b", "~" * k]), LIMITS.stop_chars, "stop"),
    "top_logprobs": (CHAT, lambda k: chat(logprobs=True, top_logprobs=k), LIMITS.logprobs, "top_logprobs"),
    "logprobs": (TEXT, lambda k: text(logprobs=k), LIMITS.logprobs, "logprobs"),
    "logit_bias": (CHAT, lambda k: chat(logit_bias=bias(k)), LIMITS.logit_bias, "logit_bias"),
    "tools": (CHAT, lambda k: chat(tools=[tool(i) for i in range(k)], tool_choice="none"), LIMITS.tools, "tools"),
    "inputs": (EMBED, lambda k: {"model": "tiny", "input": ["a"] * k}, LIMITS.served_inputs, "input"),
    "scored prompts": (TEXT, lambda k: text(["a"] * k, max_tokens=0, echo=True), LIMITS.served_inputs, "prompt"),
    "prompts": (TEXT, lambda k: text(["a"] * k), LIMITS.served_queue, "prompt"),
    "prompt and answer": (TEXT, lambda k: text([3] * k, max_tokens=2), WINDOW - 2, "max_tokens"),
    "prompt": (TEXT, lambda k: text([3] * k, max_tokens=0, echo=True, logprobs=0), WINDOW + 1, "prompt"),
    "prompt of an answer": (TEXT, lambda k: text([3] * k), WINDOW - 1, "prompt"),
    "input": (EMBED, lambda k: {"model": "tiny", "input": [3] * k}, WINDOW, "input"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_allowed_and_one_more_is_not(server, name):
    path, body, bound, param = CASES[name]
    with server.client() as client:
        with client.stream("POST", path, json=body(bound)) as answer:  # a long answer need not be waited for
            if answer.status_code != 200:
                answer.read()
            assert answer.status_code == 200, answer.text
        refused = client.post(path, json=body(bound + 1))
    assert refused.status_code == 400, refused.text[:500]
    error = refused.json()["error"]
    assert error["param"] is not None
    assert error["param"].startswith(param), error
    assert str(bound) in error["message"].replace(",", "") or str(bound + 1) in error["message"], error
    assert until(lambda: not rows(server))


def test_a_canvas_costs_what_it_may_and_not_a_step_more(server):
    body = {"model": "mini-dlm", "prompt": "a", "stream": True, "hasten": {"method": "plain"}}
    size = next(s for s in (256, 128, 64) if s + 8 < 512)
    most = LIMITS.canvas_steps // (size * size)
    with server.client() as client:
        with client.stream("POST", TEXT, json={**body, "max_tokens": size, "n": most}) as answer:
            assert answer.status_code == 200
        refused = client.post(TEXT, json={**body, "max_tokens": size, "n": most + 1})
    assert refused.status_code == 400
    assert f"limits.canvas_steps allows {LIMITS.canvas_steps}" in refused.json()["error"]["message"]
    assert until(lambda: not rows(server))


def head(fields: list[tuple[bytes, bytes]]) -> bytes:
    lines = b"".join(b"%s: %s\r\n" % field for field in fields)
    return b"GET /health HTTP/1.1\r\n" + lines + b"\r\n"


@pytest.mark.parametrize(("more", "status"), [(0, b"200"), (1, b"431")])
def test_bytes_of_headers(server, more, status):
    fields = [(b"Host", b"localhost"), (b"Connection", b"close")]
    used = len(b"/health") + sum(len(name) + len(value) + 4 for name, value in fields)
    pad = LIMITS.http_header_bytes - used - len(b"X-Pad") - 4
    assert server.raw(head([*fields, (b"X-Pad", b"a" * (pad + more))])).split(b" ")[1] == status


@pytest.mark.parametrize(("count", "status"), [(LIMITS.http_headers, b"200"), (LIMITS.http_headers + 1, b"431")])
def test_number_of_headers(server, count, status):
    fields = [(b"Host", b"localhost"), (b"Connection", b"close"), *((b"X-%d" % i, b"a") for i in range(count - 2))]
    assert server.raw(head(fields)).split(b" ")[1] == status


@pytest.mark.parametrize(("size", "status"), [(LIMITS.body_bytes, 200), (LIMITS.body_bytes + 1, 413)])
def test_bytes_of_a_body(server, size, status):
    body = json.dumps(chat()).encode()
    with server.client() as client:
        answer = client.post(CHAT, content=body + b" " * (size - len(body)), headers={"Content-Type": "application/json"})
    assert answer.status_code == status


def test_characters_of_a_key():
    assert Settings(keys=("k" * LIMITS.key_chars,)).keys
    with pytest.raises(ConfigError, match=f"at least {LIMITS.key_chars}"):
        Settings(keys=("k" * (LIMITS.key_chars - 1),))


def test_the_queue_is_bounded_and_says_when_to_come_back(server):
    """Rows full, as many waiting as may wait: the next is 429, nobody else notices, and then there is room again."""
    with server.client() as client:
        long = chat(n=LIMITS.n, max_tokens=3000, stream=True)
        holding = [
            client.send(client.build_request("POST", CHAT, json=long), stream=True) for _ in range(LIMITS.rows // LIMITS.n)
        ]
        waiting = None
        try:
            assert until(lambda: server.worker.load() == (LIMITS.rows, 0))
            body = text(["a"] * LIMITS.served_queue, stream=True)
            waiting = client.send(client.build_request("POST", TEXT, json=body), stream=True)
            assert waiting.status_code == 200
            assert server.worker.load() == (LIMITS.rows, LIMITS.served_queue)
            refused = client.post(CHAT, json=chat())
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["code"] == "queue_full"
            assert server.worker.load() == (LIMITS.rows, LIMITS.served_queue)
            assert client.get("/health").status_code == 200
        finally:
            for answer in [*holding, *([waiting] if waiting else [])]:
                answer.close()
        assert until(lambda: not rows(server))
        assert client.post(CHAT, json=chat()).status_code == 200


def slow(seconds: float):
    import time

    return lambda *_: time.sleep(seconds)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of its own: one engine belongs to one worker."""
    return hasten.load(str(write_model(tmp_path_factory.mktemp("other"))))


@pytest.fixture
def slowed(other):
    """A server whose passes take a twentieth of a second."""
    with serving({"tiny": other}) as served:
        served.worker.observe.append(slow(0.05))
        yield served


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline(slowed: Served, monkeypatch, stream):
    monkeypatch.setattr(worker, "LIMITS", dataclasses.replace(LIMITS, deadline_s=1.0))
    with slowed.client() as client:
        assert client.post(CHAT, json=chat(max_tokens=5)).status_code == 200
        late = client.post(CHAT, json=chat(max_tokens=400, stream=stream))
    error = json.loads(texts(late.content)[-1])["error"] if stream else late.json()["error"]
    assert late.status_code == (200 if stream else 504)
    assert error["code"] == "deadline"
    assert "1 second" in error["message"]
    assert until(lambda: not rows(slowed))


def test_a_silent_stream_is_kept_open_with_a_comment(slowed: Served, monkeypatch):
    kept = sse.EventStream.__init__.__defaults__
    assert kept == (None, LIMITS.ping_s)
    with slowed.client() as client:
        assert ": ping" not in client.post(CHAT, json=chat(max_tokens=4, stream=True)).text
        monkeypatch.setattr(sse.EventStream.__init__, "__defaults__", (None, 0.02))
        answer = client.post(CHAT, json=chat(max_tokens=4, stream=True)).text
    assert answer.count("\n\n: ping\n\n") >= 3
    assert texts(answer.encode())[-1] == "[DONE]"


@pytest.mark.parametrize(("others", "status"), [(1, b"200"), (2, b"503")])
def test_open_connections(other, monkeypatch, others, status):
    monkeypatch.setattr(run, "LIMITS", dataclasses.replace(LIMITS, connections=3))
    with serving({"tiny": other}) as served:
        idle = [served.connect() for _ in range(others)]
        try:
            assert until(lambda: ask(served) == status, 5)
        finally:
            for one in idle:
                one.close()


def ask(served: Served) -> bytes:
    with served.connect() as link:
        link.sendall(head([(b"Host", b"localhost"), (b"Connection", b"close")]))
        return read_all(link).split(b" ")[1]


# --- the list itself ---

ELSEWHERE = {
    "body_s": "security/test_limits.py::test_a_slow_body_is_cut_off",
    "error_bytes": "security/test_error_bodies.py::test_vllm_49239_ten_thousand_bad_items_give_a_small_answer",
    "drain_s": "server/test_operations.py::test_when_the_time_is_up_the_rest_is_given_up",
    "template_chars": "security/test_templates.py::",
    "template_s": "security/test_templates.py::",
    "rows": "server/test_served_limits.py::test_the_queue_is_bounded_and_says_when_to_come_back",
    **dict.fromkeys(
        ("images", "image_pixels"),
        "security/test_images.py::test_a_whole_image_reaches_no_decoder_where_the_model_has_no_eyes",
    ),
    "prefix_share": "engine/test_prefix.py::",
    **dict.fromkeys(
        ("grammar_bytes", "grammar_depth", "grammar_symbols", "enum_values", "regex_size", "schema_properties"),
        "logits/test_grammar_limits.py::test_the_limit_is_allowed_and_one_more_is_not",
    ),
    "compile_s": "logits/test_grammar_limits.py::test_a_grammar_that_takes_too_long_to_compile_is_refused",
    "mask_s": "logits/test_grammar_limits.py::test_slow_masks_end_their_request_and_no_other",
    "grammar_cache_bytes": "logits/test_grammar.py::test_equal_grammars_are_compiled_once_and_kept_within_bounds",
}
HERE = {
    "messages", "n", "served_tokens", "stop_strings", "stop_chars", "logprobs", "logit_bias", "tools", "served_inputs",
    "served_queue", "canvas_steps", "http_header_bytes", "http_headers", "body_bytes", "key_chars", "deadline_s", "ping_s",
    "connections",
}  # fmt: skip


def test_every_bound_of_the_server_has_its_test():
    own = Path(__file__).read_text(encoding="utf-8")
    assert all(f"LIMITS.{name}" in own or f"{name}=" in own for name in HERE)
    for name, place in ELSEWHERE.items():
        file, test = place.split("::")
        assert (TESTS / file).is_file(), name
        assert f"def {test}" in (TESTS / file).read_text(encoding="utf-8"), name
    below = {"prompt_chars", "max_tokens", "queue", "canvas", "prefill_chunk", "step_tokens", "draft_budget", "draft_nodes",
             "cache_share"}  # fmt: skip
    files = {"header_bytes", "tensors", "tensor_dims", "string_bytes", "array_items", "config_bytes", "patterns"}
    assert {field.name for field in dataclasses.fields(Limits)} == {*HERE, *ELSEWHERE, *below, *files}


def test_doctor_prints_every_bound_and_the_page_lists_it():
    printed = subprocess.run(
        [sys.executable, "-m", "hasten", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    shown = {one["name"]: one["value"] for one in json.loads(printed.stdout)["limits"]}
    assert shown == {name: value for name, value, _, _ in LIMITS.rows_for_people()}
    page = (TESTS.parent / "docs" / "limits.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(shown)
