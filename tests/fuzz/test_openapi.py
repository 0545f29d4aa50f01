"""Requests made from the OpenAPI document: no answer is a 5xx, every error has OpenAI's form, and the server is as it was."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from chat_model import write_model
from live import chat, ended_model, rows, serving, texts, until
from requests_of import Maker

import hasten
from hasten.engine.limits import LIMITS

PRIVATE = re.compile(r"0x[0-9a-fA-F]{4}|object at|/(work|tmp|usr|home|root|etc|site-packages)\b|\.py\b|Traceback")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    llm = hasten.load(str(write_model(tmp_path_factory.mktemp("tiny"))))
    ended = hasten.load(str(ended_model(tmp_path_factory.mktemp("ended"))))
    with serving({"tiny": llm, "ended": ended, "mini-dlm": lambda: hasten.load("mini-dlm")}) as served:
        yield served


def judge(request: dict, answer) -> None:
    """Fail for an answer that no server should give."""
    shown = f"{request}\n{answer.status_code} {answer.text[:500]}"
    assert answer.status_code < 500, shown
    if answer.status_code >= 400:
        assert len(answer.content) <= LIMITS.error_bytes, shown
        assert not PRIVATE.search(answer.text), shown
        if request["method"] != "HEAD":
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}, shown
    elif "event-stream" in answer.headers.get("content-type", ""):
        events = texts(answer.content)
        assert events[-1] == "[DONE]", shown
        assert all("error" not in json.loads(event) for event in events[:-1]), shown
    elif request["method"] != "HEAD" and request["url"] not in ("/", "/metrics"):
        answer.json()


def fuzz(server, seed: int, count: int) -> Counter:
    maker, statuses = Maker(server.app.openapi(), seed), Counter()
    with server.client() as client:
        body = {**chat(), "temperature": 0}
        before = client.post("/v1/chat/completions", json=body).json()["choices"]
        for _ in range(count):
            request = maker.request()
            answer = client.request(**request)
            judge(request, answer)
            statuses[request["url"], answer.status_code] += 1
        assert until(lambda: rows(server) == 0)
        assert client.post("/v1/chat/completions", json=body).json()["choices"] == before
    return statuses


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_hundred_random_requests(server, seed):
    statuses = fuzz(server, seed, 100)
    assert sum(count for (_, status), count in statuses.items() if status == 200) > 10, statuses
    assert sum(count for (_, status), count in statuses.items() if status == 400) > 10, statuses


@pytest.mark.slow
def test_thousands_of_random_requests(server):
    statuses = fuzz(server, 0, 2500)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        assert statuses[path, 200] > 50, statuses
        assert statuses[path, 400] > 50, statuses


def test_the_judge_finds_a_fault():
    class Answer:
        status_code, text, content, headers = 500, "x", b"x", {}

    with pytest.raises(AssertionError):
        judge({"method": "GET", "url": "/"}, Answer)
    Answer.status_code, Answer.text = 400, "<x object at 0x7fff00>"
    with pytest.raises(AssertionError):
        judge({"method": "GET", "url": "/"}, Answer)
