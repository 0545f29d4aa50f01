"""What errors say: bounded, ours, without values, addresses or paths; and one bad request costs one error."""

from __future__ import annotations

import json
import logging
import re

import pytest
from live import chat

from hasten.engine.limits import LIMITS
from hasten.serve import errors

PRIVATE = re.compile(r"0x[0-9a-fA-F]{4}|object at|/(work|tmp|usr|home|root|etc|site-packages)\b|\.py\b|Traceback|line \d+")
JSON = {"Content-Type": "application/json"}
MANY = [{"role": "nobody", "content": 3}] * 10_000
BAD = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"{}", b'{"model": null}',
    b'{"model": "tiny", "model": 3}', b'{"__proto__": {}, "model": "tiny"}', b'{"model": "\\u0000", "messages": []}',
    b'{"model": "\\ud800"}', json.dumps(chat(**{"x" * 5000: 1})).encode(), json.dumps(chat(**{f"x{i}": 1 for i in range(5000)})).encode(),
    json.dumps({"model": "\U0001f600" * 256, "messages": [{"role": "user", "content": "x"}]}).encode(),
    json.dumps({"model": "/etc/passwd 0xdeadbeef00 <a object at 0x7f00>", "messages": [{"role": "user", "content": "x"}]}).encode(),
    json.dumps(chat(hasten={"method": "/etc/passwd"})).encode(), json.dumps(chat(hasten={"method": ["\U0001f600" * 200] * 16})).encode(),
    json.dumps(chat(hasten={"method": "prompt-lookup:nodes=" + "9" * 200})).encode(), json.dumps(chat(stop=["x" * 10_000] * 9)).encode(),
    json.dumps(chat(logit_bias={str(i): 1e9 for i in range(900)})).encode(), json.dumps(chat(logit_bias={"x" * 100_000: 1})).encode(),
    json.dumps(chat("x" * 100_000)).encode(), json.dumps(chat([{"role": "user", "content": [{"type": "x" * 9999}] * 500}])).encode(),
    json.dumps({**chat(), "messages": MANY}).encode(), json.dumps(chat(tools=[{"type": "x" * 9999}] * 64)).encode(),
]  # fmt: skip


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_cve_2026_22778_errors_hold_no_addresses_paths_or_objects(server, path, body):
    with server.client() as client:
        answer = client.post(path, content=body, headers=JSON)
    assert 400 <= answer.status_code < 500, answer.text[:300]
    assert len(answer.content) <= LIMITS.error_bytes
    assert not PRIVATE.search(answer.text), answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]


def test_vllm_49239_ten_thousand_bad_items_give_a_small_answer(server):
    for messages in (
        MANY,
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}] * 10_000}],
        ["x"] * 10_000,
    ):
        with server.client() as client:
            answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        assert answer.status_code == 400
        assert len(answer.content) < 4096
    with server.client() as client:
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": [[1.5]] * 10_000})
        assert (answer.status_code, len(answer.content) < 4096) == (400, True)
        answer = client.post("/v1/chat/completions", json={"secret": "s3cr3t-value", **chat(temperature="s3cr3t-value")})
        assert "s3cr3t" not in answer.text


def test_what_is_not_ours_is_told_by_a_number_only(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hasten"), "propagate", True)
    with caplog.at_level(logging.ERROR, logger="hasten.serve"):
        status, body, _ = errors.describe(ValueError("secret <x object at 0x7fffdeadbeef> in /etc/passwd"))
    assert status == 500
    message = body["error"]["message"]
    number = re.fullmatch(r"internal error ([0-9a-f]{12}); the server's log says more", message)
    assert number
    assert number[1] in caplog.text
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    "text", ["0x7fffdeadbeef", "<llama object at 0x7fff>", "/usr/lib/x.py", "C:\\Users\\me\\x.py", "see /work/a/b"]
)
def test_our_own_texts_are_cleaned_too(text):
    assert not PRIVATE.search(errors.public(f"cannot read {text} now"))
    assert not PRIVATE.search(errors.respond(errors.ApiError(400, text * 500)).body.decode())


def test_a_broken_request_costs_nobody_else(server):
    """Good requests between bad ones answer as they do alone."""
    with server.client() as client:
        alone = client.post("/v1/chat/completions", json=chat(temperature=0, max_tokens=8)).json()["choices"][0]["message"]
        for body in BAD[:12]:
            assert client.post("/v1/chat/completions", content=body, headers=JSON).status_code < 500
            again = client.post("/v1/chat/completions", json=chat(temperature=0, max_tokens=8)).json()["choices"][0][
                "message"
            ]
            assert again == alone
