"""What the server writes: one line per request that says what it came to, and never what was asked, answered, or the key."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest
from chat_model import write_model
from live import KEY, chat, serving, until

import hasten
from hasten.errors import ConfigError
from hasten.serve import logs
from hasten.serve.access import Account, account
from hasten.serve.logs import Lines
from hasten.serve.settings import Settings

HOSTILE = "a\r\nERROR forged\x1b[31m\x00\u2028\u202e\x85b"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    llm = hasten.load(str(write_model(tmp_path_factory.mktemp("tiny"))))
    with serving({"tiny": llm}, Settings(keys=(KEY,))) as served:
        yield served


def record(message: str, exception: BaseException | None = None, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("hasten.access", logging.INFO, "x.py", 1, message, (), None)
    vars(made).update(fields)
    if exception is not None:
        try:
            raise exception
        except type(exception):
            made.exc_info = sys.exc_info()
    return made


def entries(caplog, count: int = 1) -> list[dict[str, object]]:
    """The access log's entries as JSON; a line is written when the answer is out, so some patience is needed."""

    def own() -> list[logging.LogRecord]:
        return [one for one in caplog.records if one.name == "hasten.access"]

    assert until(lambda: len(own()) >= count)
    return [json.loads(Lines(True).format(one)) for one in own()]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("messages", [False, True])
def test_nothing_that_is_logged_begins_a_line_of_its_own(as_json, messages):
    made = record(HOSTILE, ValueError(HOSTILE), model=HOSTILE, tokens=3)
    text = Lines(as_json, messages).format(made)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    if as_json:
        entry = json.loads(text)
        assert entry["tokens"] == 3
        assert entry["message"].startswith("a\\r\\nERROR forged")
        assert entry["logger"] == "hasten.access"
    else:
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info    a\\r\\nERROR forged", text)


def test_a_value_cannot_pretend_to_be_another_field():
    text = Lines(False).format(record("request", model='x status=200 key="y"', status=404))
    assert text.endswith(r'request model="x status=200 key=\"y\"" status=404')
    assert 'empty=""' in Lines(False).format(record("m", empty=""))


def test_long_values_are_cut():
    assert len(Lines(False).format(record("m" * 10_000, note="v" * 10_000))) < 2500


def test_an_exception_is_told_by_type_and_place_and_its_words_only_at_debug():
    made = record("trouble", KeyError("the user's secret"))
    assert "secret" not in Lines(False).format(made)
    assert "secret" not in Lines(True).format(made)
    assert "KeyError at test_access_log.py:" in Lines(False).format(made)
    assert "secret" in Lines(False, messages=True).format(made)


def test_one_line_per_request_says_what_it_came_to(server, caplog):
    caplog.set_level(logging.INFO, "hasten")
    with server.client(KEY) as client:
        answer = client.post(
            "/v1/chat/completions",
            json=chat(max_tokens=5, n=2),
            headers={"X-Request-Id": "mine_1-A", "User-Agent": HOSTILE[0]},
        )
        client.post("/v1/embeddings", json={"model": "tiny", "input": "fox"})
        client.post("/v1/completions", json={"model": "tiny", "prompt": "fox", "max_tokens": 0, "echo": True})
        client.get("/v1/models/none")
    assert answer.headers["x-request-id"] == "mine_1-A"
    found = entries(caplog, 4)
    assert [one["route"] for one in found] == [
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/completions",
        "/v1/models/{model}",
    ]
    first = found[0]
    assert {key: first[key] for key in ("request", "verb", "status", "model", "completion_tokens", "finish")} == {
        "request": "mine_1-A", "verb": "POST", "status": 200, "model": "tiny", "completion_tokens": 10, "finish": "length,length",
    }  # fmt: skip
    assert first["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert first["method"] == answer.headers["x-hasten-method"]
    assert 0 < first["seconds"] < 30
    assert all(one["prompt_tokens"] > 0 and one["model"] == "tiny" for one in found[1:3])
    assert found[3]["error"] == "model_not_found"
    assert len({one["request"] for one in found}) == 4


def test_a_stream_is_one_line_at_its_end(server, caplog):
    caplog.set_level(logging.INFO, "hasten")
    with server.client(KEY) as client:
        text = client.post("/v1/chat/completions", json=chat(max_tokens=6, stream=True)).text
    assert text.endswith("data: [DONE]\n\n")
    [entry] = entries(caplog)
    assert entry["completion_tokens"] == 6
    assert entry["finish"] == "length"


def test_a_client_that_leaves_is_told_apart(server, caplog):
    caplog.set_level(logging.INFO, "hasten")
    body = chat(max_tokens=400, stream=True)
    with server.client(KEY) as client, client.stream("POST", "/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())
    [entry] = entries(caplog)
    assert entry["gone"] is True
    assert "finish" not in entry


def test_prompts_answers_and_keys_are_never_written_not_even_at_debug(server, caplog):
    caplog.set_level(logging.DEBUG)
    words = "zirconium"
    with server.client(KEY) as client:
        answer = client.post("/v1/chat/completions", json=chat(words, max_tokens=20, user=words, prompt_cache_key=words))
        assert answer.status_code == 200
        spoken = answer.json()["choices"][0]["message"]["content"]
        for body in (chat(words, n=0), chat(words, stop=[words * 20]), chat(words, model=words), {words: words}):
            client.post("/v1/chat/completions", json=body)
        client.post("/v1/chat/completions", content=b'{"messages": "' + words.encode())
        client.get(f"/v1/models/{words}", headers={"X-Note": words, "Cookie": words})
        client.get(f"/{words}?x={words}")
    with server.client("wrong-" + KEY) as client:
        client.get("/v1/models")
    assert len(entries(caplog, 9)) == 9
    names = ("hasten", "uvicorn.error", "asyncio")  # uvicorn.access is switched off; pytest's capture switches it on
    text = "\n".join(Lines(True).format(one) for one in caplog.records if one.name.startswith(names))
    assert words not in text
    assert KEY not in text
    assert len(spoken) > 10
    assert json.dumps(spoken)[1:-1] not in text


@pytest.mark.parametrize("given", ["a b", "x" * 65, "", "a\tb", "ü".encode().decode("latin-1"), "a,b", "a=b", "'"])
def test_a_request_id_that_is_not_plain_is_replaced(server, given):
    with server.client(KEY) as client:
        answer = client.get("/health", headers=[("X-Request-Id", given.encode("latin-1"))])
        twice = client.get("/health", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    for one in (answer, twice):
        assert re.fullmatch(r"req-[0-9a-f]{24}", one.headers["x-request-id"])


def test_every_kind_of_answer_carries_its_request_id(server):
    with server.client(KEY) as client, server.client() as nobody:
        longest = {"X-Request-Id": "x" * 64}
        assert client.get("/v1/models", headers=longest).headers["x-request-id"] == "x" * 64
        assert nobody.get("/v1/models", headers={"X-Request-Id": "id"}).headers["x-request-id"] == "id"  # 401
        assert client.post("/v1/completions", json={}, headers={"X-Request-Id": "id"}).headers["x-request-id"] == "id"
        assert client.post("/v1/chat/completions", json=chat(stream=True)).headers["x-request-id"].startswith("req-")


def test_what_a_route_did_not_expect_is_one_error_with_an_id_and_one_line(server, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server.worker, "load", lambda: {}["the user's secret"])
    with server.client(KEY) as client:
        answer = client.get("/ready")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"].startswith("req-")
    number = re.search(r"internal error ([0-9a-f]{12})", answer.json()["error"]["message"])
    entries(caplog)
    own = [Lines(False).format(one) for one in caplog.records if one.levelname == "ERROR"]
    assert len([line for line in own if "KeyError" in line]) == 1
    assert number is not None
    assert number[1] in own[0]
    assert "secret" not in "".join(own)


def test_checks_of_health_are_quiet_and_refusals_are_warnings(server, caplog):
    caplog.set_level(logging.DEBUG, "hasten")
    with server.client(KEY) as client, server.client() as nobody:
        for path in ("/health", "/ready", "/metrics"):
            client.get(path)
        nobody.get("/metrics")
    levels = [(one["level"], one["route"]) for one in entries(caplog, 4)]
    assert levels == [("debug", "/health"), ("debug", "/ready"), ("debug", "/metrics"), ("warning", "other")]


def test_levels_are_named():
    with pytest.raises(ConfigError, match="log_level = 'loud' is not allowed; log_level must be debug, info"):
        logs.configure("loud", False)


def test_without_the_layer_an_account_goes_nowhere():
    assert account({}) == Account("")
