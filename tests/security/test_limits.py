"""Bounds on what one request may bring or ask for: headers, bodies, time, numbers. Real sockets where that is the point."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import chat, read_all, routes

from hasten.engine.limits import LIMITS
from hasten.serve import run

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def alive(server) -> None:
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_cve_2026_34756_huge_n_is_refused_before_anything_is_made(server):
    with server.client() as client:
        client.get("/health")
        times = []
        for _ in range(5):
            start = time.perf_counter()
            answer = client.post("/v1/chat/completions", json=chat(n=10**9))
            times.append(time.perf_counter() - start)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "n"
        assert min(times) < 0.05
        assert client.post("/v1/chat/completions", json=chat(n=LIMITS.n)).status_code == 200
        assert client.post("/v1/chat/completions", json=chat(n=LIMITS.n + 1)).status_code == 400


# --- headers and bodies ---


def test_cve_2025_48956_large_headers_are_refused(server):
    pad = b"X-Pad: " + b"a" * LIMITS.http_header_bytes + b"\r\n"
    assert status(server.raw(HEAD + pad + b"Content-Length: 2\r\n\r\n{}")) in (400, 431)
    many = b"".join(b"X-%d: a\r\n" % i for i in range(LIMITS.http_headers))
    assert status(server.raw(HEAD + many + b"Content-Length: 2\r\n\r\n{}")) == 431
    fewer = b"".join(b"X-%d: a\r\n" % i for i in range(LIMITS.http_headers - 4))
    assert status(server.raw(HEAD + fewer + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")) == 400
    target = b"GET /" + b"a" * LIMITS.http_header_bytes + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert status(server.raw(target)) in (400, 414, 431)
    endless = server.connect()
    with endless:
        try:
            for _ in range(200):
                endless.sendall(b"X: " + b"a" * 10_000 + b"\r\n")
        except ConnectionError:
            pass
        assert status(read_all(endless)) in (0, 400, 431)
    alive(server)


def test_cve_2025_48956_large_bodies_are_refused_by_their_length_and_by_their_bytes(server):
    with server.client() as client:
        body = json.dumps(chat("x")).encode()
        fits = body + b" " * (LIMITS.body_bytes - len(body))
        json_type = {"Content-Type": "application/json"}
        assert client.post("/v1/chat/completions", content=fits, headers=json_type).status_code == 200
        assert client.post("/v1/chat/completions", content=fits + b" ", headers=json_type).status_code == 413

        def pieces():
            for _ in range(LIMITS.body_bytes // 65536 + 2):
                yield b" " * 65536

        assert client.post("/v1/chat/completions", content=pieces(), headers=json_type).status_code == 413
    for length in (b"-1", b"1e9", b"9" * 19, b"9" * 5000, b"0x10", b""):
        assert status(server.raw(HEAD + b"Content-Length: " + length + b"\r\n\r\n{}", 5)) in (400, 413), length[:20]
    alive(server)


@pytest.fixture
def hurried(monkeypatch):
    """Limits of time that a test can wait for."""
    monkeypatch.setattr(run, "LIMITS", dataclasses.replace(LIMITS, body_s=0.5))
    return 0.5


def drip(server, data: bytes, gap: float, most: float, before: bytes = b"") -> float:
    """Seconds until the server closes a connection on which these bytes come one by one."""
    with server.connect() as link:
        if before:
            link.sendall(before)
            answer = b""
            while b"}" not in answer:
                answer += link.recv(65536)
            assert b"200 OK" in answer
        start = time.monotonic()
        link.settimeout(gap)
        for i in range(len(data)):
            try:
                link.sendall(data[i : i + 1])
                if not link.recv(65536):
                    break
            except TimeoutError:
                pass
            except ConnectionError:
                break
            if time.monotonic() - start > most:
                return math.inf
        return time.monotonic() - start


def test_slow_headers_are_cut_off(server, hurried):
    assert drip(server, HEAD * 3, 0.05, 4) < hurried + 1.5


def test_slow_headers_of_a_later_request_are_cut_off_too(server, hurried):
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert drip(server, HEAD * 3, 0.05, 4, before=first) < hurried + 1.5


def test_a_quick_client_may_ask_again_and_again(server, hurried):
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect() as link:
        for i in range(12):
            cut = 1 + i * 3
            link.sendall(first[:cut])
            time.sleep(0.08)
            link.sendall(first[cut:])
            answer = b""
            while b"}" not in answer:
                answer += link.recv(65536)
            assert b"200 OK" in answer


def test_a_slow_body_is_cut_off(monkeypatch, tiny):
    from live import serving

    from hasten.serve import app

    class Hurried(app.Gate):
        def __init__(self, inner, settings):
            super().__init__(inner, settings, 0.4)

    monkeypatch.setattr(app, "Gate", Hurried)
    import hasten

    with serving({"mini-dlm": lambda: hasten.load("mini-dlm")}) as other:
        start = time.monotonic()
        with other.connect() as link:
            link.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
            assert status(read_all(link)) == 408
        assert time.monotonic() - start < 3
        assert drip(other, HEAD + b"Content-Length: 500\r\n\r\n" + b"{" * 500, 0.02, 5) < 4


# --- numbers ---

HUGE = [
    -1,
    0,
    1,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**30,
    1e308,
    -1e308,
    5e-324,
    True,
    False,
    "1",
    [],
    {},
    1.5,
]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-0", "-0.0", "1E400", "9" * 5000, "0.1e-400"]
NUMBERS = {
    "/v1/chat/completions": (
        "max_tokens", "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "hasten.top_k", "hasten.min_p",
        "hasten.repetition_penalty", "logit_bias.5", "max_completion_tokens", "top_logprobs",
    ),
    "/v1/completions": (
        "max_tokens", "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "hasten.top_k", "hasten.min_p",
        "hasten.repetition_penalty", "logit_bias.5", "logprobs", "best_of",
    ),
    "/v1/embeddings": ("dimensions",),
}  # fmt: skip
BODIES = {
    "/v1/chat/completions": chat(max_tokens=2),
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 2},
    "/v1/embeddings": {"model": "tiny", "input": "a"},
}


def with_number(path: str, name: str, text: str) -> bytes:
    body = dict(BODIES[path])
    outer, _, inner = name.partition(".")
    body.pop(outer, None)
    value = f'{{"{inner}": {text}}}' if inner else text
    extra = ', "logprobs": true' if name == "top_logprobs" else ""
    if outer == "max_completion_tokens":
        body.pop("max_tokens")
    return (json.dumps(body)[:-1] + f', "{outer}": {value}{extra}}}').encode()


def numbers(schema: dict, document: dict, path: str = "") -> set[str]:
    """Dotted names of the fields that take a number, by the OpenAPI document."""
    found: set[str] = set()
    for name, field in schema.get("properties", {}).items():
        for one in field.get("anyOf", [field]):
            if "$ref" in one and name == "hasten":
                inner = document["components"]["schemas"][one["$ref"].rpartition("/")[2]]
                found |= numbers(inner, document, f"{name}.")
            elif one.get("type") in ("integer", "number"):
                found.add(path + name)
    return found


def test_every_number_of_the_bodies_is_in_the_table(server):
    document = server.app.openapi()
    for path, names in NUMBERS.items():
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        found = numbers(document["components"]["schemas"][reference.rpartition("/")[2]], document)
        assert found == {name for name in names if name != "logit_bias.5"}, path


@settings(max_examples=120)
@given(
    place=st.sampled_from([(path, name) for path, names in NUMBERS.items() for name in names]),
    text=st.sampled_from([*map(json.dumps, HUGE), *RAW]) | st.integers().map(str) | st.floats().map(json.dumps),
)
def test_cve_2026_21869_any_number_in_any_field_is_used_or_refused(server, place, text):
    path, name = place
    with server.client() as client:
        answer = client.post(path, content=with_number(path, name, text), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), (place, text, answer.text)
    assert len(answer.content) < 100_000
    if answer.status_code == 400:
        assert name.split(".")[0] in answer.text or "cannot be read" in answer.text or "max_tokens" in answer.text, (
            answer.text
        )


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in NUMBERS.items() for name in names])
@pytest.mark.parametrize("text", ["-1000", str(2**63), "1e308", "NaN", "true", '"5"'])
def test_cve_2026_21869_what_no_field_allows_is_refused_everywhere(server, path, name, text):
    if name == "seed" and text == "-1000":
        return  # OpenAI's seeds are signed
    with server.client() as client:
        answer = client.post(path, content=with_number(path, name, text), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert "error" in answer.json()


@pytest.mark.parametrize(
    "ids", [[-1], [2**31], [2**63], [10**30], [320], [True], [1.5], ["1"], [None], [[1, -1]], [[]], [[1], "a"], []]
)
@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_token_ids_outside_the_vocabulary_are_refused(server, path, field, ids):
    body = {key: value for key, value in BODIES[path].items() if key != field}
    with server.client() as client:
        answer = client.post(path, json={**body, field: ids})
        expected = 200 if ids == ["1"] else 400
        assert answer.status_code == expected, answer.text
    alive(server)


@pytest.mark.parametrize("model", ["tiny", "mini-dlm"])
@pytest.mark.parametrize("token", ["100000", str(2**31 - 1), str(2**31), "-1", "1.0", "x", "", "\u0663", "9" * 400])
def test_a_bias_outside_the_vocabulary_costs_its_own_request_only(server, model, token):
    with server.client() as client:
        for path, body in BODIES.items():
            if path != "/v1/embeddings":
                answer = client.post(path, json={**body, "model": model, "logit_bias": {token: 1.0}})
                assert answer.status_code == 400, answer.text
                assert "logit_bias" in answer.json()["error"]["param"]


# --- ranges ---


def test_cve_2025_62727_range_headers_do_nothing_anywhere(server):
    bomb = "bytes=" + ",".join(f"{i}-{i + 1}" for i in range(0, 2000, 2))
    with server.client() as client:
        for path in sorted(routes(server.app)):
            path = path.replace("{model}", "tiny")
            start = time.perf_counter()
            answer = client.get(path, headers={"Range": bomb, "If-Range": '"x"'})
            assert time.perf_counter() - start < 2
            plain = client.get(path)
            assert (answer.status_code, len(answer.content)) == (
                plain.status_code,
                len(plain.content),
            ) or path == "/metrics"
            assert answer.status_code != 206


def test_cve_2024_47874_multipart_is_no_body_of_any_route(server):
    form = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"a" * 500_000 + b"\r\n--x--\r\n"
    with server.client() as client:
        for path in BODIES:
            for kind in ("multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
                assert client.post(path, content=form, headers={"Content-Type": kind}).status_code == 400
