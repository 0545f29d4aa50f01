"""`hasten serve --ray --replicas 2`: real replicas under load, one of them killed, all replaced in turn, told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chat_model import write_model
from ray_runs import LOOPBACK, below, command, get, open_addresses, processes, wait_for

import hasten
from hasten.serve.replicas.exposition import merged
from hasten.serve.replicas.front import Front
from hasten.serve.security import Gate
from hasten.serve.settings import Settings

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
CLIENTS, KINDS = 8, 12


# --- the door alone, with replicas that do as they are told ---


class Replies:
    """A replica's answer: parts, exceptions (raised) and floats (seconds of silence), in order."""

    def __init__(self, *parts: object) -> None:
        self.parts, self.cancelled = parts, False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self):
        for part in self.parts:
            if isinstance(part, BaseException):
                raise part
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                yield part


class Gone(Exception):
    """What a replica that died raises here."""


class Full(Exception):
    """What busy replicas raise here."""


JSON_START = [200, [["content-type", "application/json"], ["content-length", "99"], ["x-hasten-seed", "7"]]]
SSE_START = [200, [["content-type", "text/event-stream; charset=utf-8"]]]


def door(*replies: Replies, models=("a", "b"), **settings):
    """(application, models that were asked for) of a front whose replicas answer `replies` in turn."""
    asked, queue = [], list(replies)

    def ask(model, request):
        asked.append(model)
        return queue.pop(0)

    settings = Settings(aliases={"other": "b"}, **settings)
    front = Front(models, settings, ask, (Gone,), (Full,), lambda: {"RUNNING": 1}, lambda name, *given: [])
    front.state = "ready"
    return Gate(front, settings), asked


def call(app, body=b'{"model": "b"}', path="/v1/completions", method="POST"):
    async def one():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, content=body if method == "POST" else None)

    return asyncio.run(one())


def test_a_request_goes_to_the_model_that_it_names():
    for body, model in ((b'{"model": "b"}', "b"), (b'{"model": "other"}', "b"), (b'{"model": "a"}', "a"), (b"{", "a")):
        app, asked = door(Replies(JSON_START, b"{}"))
        answer = call(app, body)
        assert (answer.status_code, asked, answer.headers["x-hasten-seed"]) == (200, [model], "7")
        assert answer.headers.get("content-length") != "99"
    app, asked = door()
    answer = call(app, b'{"model": "none"}')
    assert (answer.status_code, answer.json()["error"]["code"], asked) == (404, "model_not_found", [])


def test_a_request_whose_replica_dies_is_asked_of_another_one():
    lost = Replies(JSON_START, b"{", Gone())
    app, asked = door(lost, Replies(Gone()), Replies(JSON_START, b'{"whole"', b": 1}"))
    answer = call(app)
    assert (answer.json(), len(asked), lost.cancelled) == ({"whole": 1}, 3, True)


def test_a_request_that_no_replica_survives_is_a_retriable_error():
    app, asked = door(*(Replies(Gone()) for _ in range(5)))
    answer = call(app)
    assert (answer.status_code, answer.json()["error"]["code"], len(asked)) == (503, "replica_lost", 3)
    assert answer.headers["retry-after"] == "1"


def test_a_stream_that_had_begun_ends_with_an_error_and_is_not_asked_again():
    app, asked = door(Replies(SSE_START, b'data: {"n": 1}\n\n', Gone()), Replies(SSE_START, b"data: [DONE]\n\n"))
    events = [json.loads(line.removeprefix("data: ")) for line in call(app).text.split("\n\n") if line]
    assert (events[0], events[1]["error"]["code"], len(events), len(asked)) == ({"n": 1}, "replica_lost", 2, 1)


def test_busy_replicas_are_a_429():
    app, _ = door(Replies(Full()))
    answer = call(app)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_a_client_that_goes_away_cancels_its_replica():
    reply = Replies(SSE_START, b"data: 1\n\n", 30.0)
    app, _ = door(reply)

    async def leave():
        from hasten.serve.asgi import exchange, http_scope

        scope = http_scope("POST", "/v1/completions", [("host", "localhost")])
        messages = exchange(app, scope, b'{"model": "a"}')
        await anext(messages)
        await anext(messages)
        started = time.monotonic()
        await messages.aclose()
        return time.monotonic() - started

    assert asyncio.run(leave()) < 2
    assert reply.cancelled


def test_every_route_but_health_needs_the_key_and_the_right_host():
    app, asked = door(keys=("k" * 20,))
    for path in ("/", "/ready", "/v1/models", "/metrics", "/hasten/replicas", "/anything"):
        assert call(app, path=path, method="GET").status_code == 401
    assert call(app).status_code == 401
    assert (call(app, path="/health", method="GET").status_code, asked) == (200, [])


def test_metrics_of_replicas_become_one_page():
    page = '# HELP a Things.\n# TYPE a counter\na{x="1"} 2\na{} 3\n# HELP b More.\n# TYPE b gauge\nb 4 1234\n'
    both = merged([({"replica": "7"}, page), ({"replica": 'q"\\'}, page)])
    lines = both.splitlines()
    assert lines.count("# TYPE a counter") == lines.count("# HELP b More.") == 1
    assert lines[2:4] == ['a{replica="7",x="1"} 2', 'a{replica="7"} 3']
    assert 'b{replica="7"} 4 1234' in lines
    assert 'b{replica="q\\"\\\\"} 4 1234' in lines
    assert lines.index("# TYPE b gauge") > max(i for i, line in enumerate(lines) if line.startswith("a{"))
    parser = pytest.importorskip("prometheus_client.parser")
    families = {family.name: len(family.samples) for family in parser.text_string_to_metric_families(both)}
    assert families == {"a": 4, "b": 2}


# --- the whole, on a cluster ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("tiny"), window=4096))


def ready(port: int, key: str = "") -> bool:
    """Whether two replicas run, and none starts or stops."""
    status, body = get(port, "/ready", key=key)
    return status == 200 and body["replicas"] == {"RUNNING": 2}


@contextlib.contextmanager
def served(log: Path, *arguments: str, key: str = "") -> Iterator[tuple[int, int]]:
    """(port, process) of a server with replicas that are ready; until they are, it answers 503."""
    with command("serve", *arguments, "--ray", "--port", "0", log=log) as child:

        def told() -> object:
            return child.poll() is not None or re.search(r"127\.0\.0\.1:(\d+)", log.read_text())

        found = wait_for(told, 120, "the server's address")
        assert isinstance(found, re.Match), log.read_text()[-3000:]
        port = int(found[1])
        early = get(port, "/health")[0], get(port, "/v1/models", key=key)[0]
        assert early in ((503, 503), (200, 200)), early
        wait_for(lambda: ready(port, key) or child.poll() is not None, 120, "two replicas")
        assert child.poll() is None, log.read_text()[-3000:]
        yield port, child.pid


def body(name: str, kind: int) -> dict:
    return {"model": name, "prompt": f"the fox {kind}", "max_tokens": 60, "temperature": 1.0, "seed": kind}


class Load:
    """Clients that ask all the time; `wrong` holds answers that are neither right nor a clean error to try again."""

    def __init__(self, port: int, name: str, expected: list[str]) -> None:
        self.url, self.name, self.expected = f"http://127.0.0.1:{port}/v1/completions", name, expected
        self.good, self.retriable, self.wrong, self.slowest = 0, 0, [], 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _client(self, index: int) -> None:
        with httpx.Client(timeout=90) as client:
            turn = index
            while not self._stop.is_set():
                turn += 1
                kind, started = turn % KINDS, time.monotonic()
                try:
                    answer = client.post(self.url, json=body(self.name, kind))
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                self.slowest = max(self.slowest, time.monotonic() - started)
                if answer.status_code == 200 and answer.json()["choices"][0]["text"] == self.expected[kind]:
                    self.good += 1
                elif answer.status_code in (429, 503) and "retry-after" in answer.headers:
                    self.retriable += 1
                else:
                    self.wrong.append((answer.status_code, answer.text[:300]))


def expected(model: str) -> list[str]:
    """What each kind of request is answered alone."""
    llm = hasten.load(model)
    return [llm.generate(f"the fox {k}", max_tokens=60, temperature=1.0, seed=k).text for k in range(KINDS)]


@needs_ray
@pytest.mark.slow
def test_replicas_killed_and_replaced_under_load_mix_up_and_lose_nothing(model, tmp_path):
    name, log, alone = Path(model).name, tmp_path / "log", expected(model)
    with served(log, model, "--replicas", "2") as (port, server):
        assert open_addresses({server, *below(server)}) <= LOOPBACK, "Ray listens beyond this machine"
        assert get(port, "/health", host="evil.example")[0] == 403

        def replicas() -> set[int]:
            status, found = get(port, "/hasten/replicas")
            return {one["pid"] for one in found["replicas"]} if status == 200 else set()

        first = replicas()
        assert len(first) == 2
        streams_arrive_in_pieces(port, name)
        with Load(port, name, alone) as load:
            wait_for(lambda: load.good >= 16, 60, "answers under load")
            killed = min(first)
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda: ready(port) and len(replicas()) == 2 and killed not in replicas(), 90, "two replicas again")
            after = load.good
            wait_for(lambda: load.good >= after + 16, 60, "answers after the kill")
        assert (load.wrong, first & replicas()) == ([], first - {killed})
        before = replicas()
        with Load(port, name, alone) as load:
            wait_for(lambda: load.good >= 8, 60, "answers before the restart")
            os.kill(server, signal.SIGHUP)
            wait_for(lambda: ready(port) and len(replicas()) == 2 and not replicas() & before, 150, "new replicas")
        assert (load.wrong, load.retriable) == ([], 0), "a rolling restart loses nothing"
        streams_end_when_told_to_stop(port, name, server)


def streams_arrive_in_pieces(port: int, name: str) -> None:
    """The first chunk is there long before the last."""
    data = json.dumps(body(name, 1) | {"stream": True, "max_tokens": 1500}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", data, {"Content-Type": "application/json"})
    times, started = [], time.monotonic()
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                times.append(time.monotonic() - started)
    assert len(times) > 20
    assert line == b"\n"
    assert times[0] < times[-1] / 2


def streams_end_when_told_to_stop(port: int, name: str, server: int) -> None:
    """SIGTERM lets a stream that runs come to its end, while new requests are refused."""
    data = json.dumps(body(name, 1) | {"stream": True, "max_tokens": 2500}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        head = answer.readline()
        os.kill(server, signal.SIGTERM)
        text = head + answer.read()
    assert text.endswith(b"data: [DONE]\n\n")
    assert get(port, "/v1/models")[0] in (0, 503)
    wait_for(lambda: server not in processes(), 60, "the server's end")


@needs_ray
@pytest.mark.slow
def test_two_models_are_served_by_the_replicas_that_hold_them(model, tmp_path):
    other = tmp_path / "second"
    other.mkdir()
    write_model(other, window=256)
    first, key = Path(model).name, "a-key-of-twenty-chars"
    keys = tmp_path / "keys"
    keys.write_text(key + "\n")
    keys.chmod(0o600)
    arguments = (model, str(other), "--replicas", "2", "--key-file", str(keys), "--model-alias", "two=second")
    with served(tmp_path / "log", *arguments, key=key) as (port, _):
        assert get(port, "/v1/models")[0] == get(port, "/hasten/replicas", key="wrong")[0] == 401
        status, listed = get(port, "/v1/models", key=key)
        assert (status, {one["id"] for one in listed["data"]}) == (200, {first, "second", "two"})
        assert {one["id"]: one["hasten"]["window"] for one in listed["data"]} == {first: 4096, "second": 256, "two": 256}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}) as client:
            for _ in range(6):
                for name in (first, "second", "two"):
                    answer = client.post("/v1/completions", json=body(name, 2), timeout=60)
                    assert (answer.status_code, answer.json()["model"]) == (200, name)
            assert client.post("/v1/completions", json=body("third", 2)).status_code == 404
        holding = [set(one["models"]) for one in get(port, "/hasten/replicas", key=key)[1]["replicas"]]
        assert {first} in holding, "a replica that does not hold a model was asked for it although another one does"
        assert {"second"} in holding


@needs_ray
@pytest.mark.slow
def test_replicas_that_cannot_load_the_model_end_the_server_with_the_reason(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    log = tmp_path / "log"
    with command("serve", str(broken), "--ray", "--replicas", "1", "--port", "0", log=log) as child:
        assert child.wait(180) == 1
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "config.json" in line
