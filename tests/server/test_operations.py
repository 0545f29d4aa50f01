"""How a server starts and ends, as real processes: what a supervisor, a load balancer and a client see of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from chat_model import write_model
from live import chat, serving, until

import hasten
from hasten.errors import IncompatibleError
from hasten.serve.run import Server, config
from hasten.serve.settings import Settings
from hasten.serve.worker import UnavailableError, Worker

SLOW = """
import sys, time
import hasten
from hasten.serve.run import run
from hasten.serve.settings import Settings

def load():
    time.sleep(float(sys.argv[2]))
    llm = hasten.load(sys.argv[1])
    step = llm.engine.step
    llm.engine.step = lambda: (time.sleep(0.01), step())[1]  # long enough for a test to do something meanwhile
    return llm

run({"tiny": load}, Settings(port=0))
"""
WEB = httpx.Client(verify=False, timeout=30)  # one, because making one takes longer than a request


@pytest.fixture(scope="module", autouse=True)
def _closed():
    yield
    WEB.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@dataclass(slots=True)
class Process:
    """A server of its own; `url` once it has said where it listens."""

    popen: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def find(self) -> bool:
        found = re.search(r"http://[0-9a-z.\[\]:]+:\d+", self.text())
        self.url = found[0] if found else ""
        return bool(found)

    def get(self, path: str) -> httpx.Response:
        return WEB.get(self.url + path)

    def status(self, path: str) -> int:
        """The status of a GET; 0 when nothing listens."""
        try:
            return self.get(path).status_code
        except httpx.TransportError:
            return 0

    def ended(self, seconds: float = 20) -> int:
        return self.popen.wait(seconds)


@contextlib.contextmanager
def process(folder: Path, *command: str) -> Iterator[Process]:
    """A Python process that serves; killed at the end of the block if it still runs."""
    log = folder / f"log-{time.monotonic_ns()}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        popen = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=out, env=environment, stdin=subprocess.DEVNULL
        )
    made = Process(popen, log)
    try:
        yield made
    finally:
        popen.kill()
        popen.wait()


@contextlib.contextmanager
def slow(tmp_path: Path, folder: Path, load_s: float = 0.0) -> Iterator[Process]:
    with process(tmp_path, "-c", SLOW, str(folder), str(load_s)) as made:
        assert until(made.find, 60), made.text()
        yield made


def test_while_it_loads_it_says_so_and_then_it_is_ready(tmp_path, folder):
    with slow(tmp_path, folder, 1.5) as server:
        loading = server.get("/health")
        assert (loading.status_code, loading.json()) == (503, {"status": "loading"})
        assert server.get("/ready").status_code == 503
        refused = WEB.post(server.url + "/v1/chat/completions", json=chat())
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["message"] == "the server is loading its models (try again later)"
        assert until(lambda: server.status("/health") == 200, 30)
        assert server.get("/ready").json() == {"status": "ready", "running": 0, "waiting": 0}
        started = time.monotonic()
        server.popen.send_signal(signal.SIGINT)
        assert server.ended() == 0
        assert time.monotonic() - started < 5  # idle, with this client's connection kept open
        assert "Traceback" not in server.text()


def test_told_to_stop_it_answers_what_it_has_begun_and_refuses_the_rest(tmp_path, folder):
    with slow(tmp_path, folder) as server:
        assert until(lambda: server.status("/ready") == 200, 30)
        body = chat(max_tokens=300, stream=True)
        with WEB.stream("POST", server.url + "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.popen.send_signal(signal.SIGTERM)
            assert until(lambda: server.status("/ready") == 503, 20)
            time.sleep(0.5)  # several of the server's looks at whether it may end
            refused = WEB.post(server.url + "/v1/chat/completions", json=chat())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert "is shutting down" in refused.json()["error"]["message"]
            assert server.status("/health") == 200  # what runs still runs
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        reasons = [one["finish_reason"] for line in rest[:-1] for one in json.loads(line[6:])["choices"]]
        assert reasons[-1] == "length"
        assert server.ended() == 0
        assert server.status("/health") == 0
        assert server.text().splitlines()[-1].endswith("stopped")


def test_told_twice_it_ends_at_once(tmp_path, folder):
    with slow(tmp_path, folder) as server:
        assert until(lambda: server.status("/ready") == 200, 30)
        with WEB.stream("POST", server.url + "/v1/chat/completions", json=chat(max_tokens=400, stream=True)) as stream:
            next(stream.iter_lines())
            server.popen.send_signal(signal.SIGTERM)
            assert until(lambda: server.status("/ready") == 503, 20)
            assert server.popen.poll() is None
            server.popen.send_signal(signal.SIGTERM)
            assert server.ended(2) == -signal.SIGTERM


def test_told_to_stop_while_it_loads_it_stops(tmp_path, folder):
    with slow(tmp_path, folder, 30) as server:
        assert server.get("/health").status_code == 503
        server.popen.send_signal(signal.SIGTERM)
        assert server.ended(8) == 0


def test_a_port_that_is_taken_is_a_clear_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process(tmp_path, "-m", "hasten", "serve", "mini-dlm", "--port", str(port)) as server:
            assert server.ended(60) == 2
            assert server.text() == (
                f"error: 127.0.0.1:{port} cannot be listened on (Address already in use)\n"
                "hint: another server may be running; --port chooses another\n"
            )


def test_a_model_that_cannot_be_loaded_ends_the_process_with_its_error(tmp_path, folder):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.glob("*.*"):
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with process(tmp_path, "-m", "hasten", "serve", str(broken), "--port", "0") as server:
        assert server.ended(60) == 1
        lines = server.text().splitlines()
        [error] = [line for line in lines if line.startswith("error: ")]
        assert "model.safetensors" in error
        assert "Traceback" not in server.text()


def test_a_model_of_no_name_ends_the_process_as_a_wrong_request(tmp_path):
    with process(tmp_path, "-m", "hasten", "serve", "mini-dml", "--port", "0") as server:
        assert server.ended(60) == 2
        assert re.search(r"^error: .*'mini-dml'", server.text(), re.MULTILINE)
        assert "mini-dlm" in server.text()


def test_logs_are_one_json_object_per_line_uvicorns_too_and_hold_no_query(tmp_path):
    command = ("-m", "hasten", "serve", "mini-dlm", "--port", "0", "--log-json", "--log-level", "debug")
    with process(tmp_path, *command) as server:
        assert until(server.find, 60)
        assert until(lambda: server.status("/ready") == 200, 30)
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 5) as link:
            link.sendall(b"no \r\n\x00 HTTP\r\n\r\n")
            link.recv(1000)
        server.get("/v1/models?api_key=zirconium")
        server.popen.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        entries = [json.loads(line) for line in server.text().splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(one) for one in entries))
    assert any(one["logger"] == "uvicorn.error" and one["level"] == "warning" for one in entries)
    assert any(one.get("route") == "/v1/models" for one in entries)
    assert "zirconium" not in server.text()


def test_an_engine_that_dies_ends_the_process(tmp_path, folder):
    dies = SLOW.replace("run({", "from hasten.serve.metrics import Metrics\nMetrics.watch = lambda *_: 1 / 0\nrun({")
    with process(tmp_path, "-c", dies, str(folder), "0") as server:
        assert until(server.find, 60)
        assert until(lambda: server.status("/ready") == 200, 30)
        answer = WEB.post(server.url + "/v1/chat/completions", json=chat())
        assert answer.status_code == 503
        assert server.ended() == 1
        assert "the engine's thread ended exception=\"ZeroDivisionError at " in server.text()


# --- in this process: what cannot be timed from outside ---


@pytest.fixture(scope="module")
def tiny(folder):
    return hasten.load(str(folder))


def test_an_engine_that_dies_answers_503_to_everybody(tiny):
    """A worker without the process around it, as in a replica of somebody else's making: nothing hangs."""

    def boom(*_: object) -> None:
        raise ZeroDivisionError

    with serving({"tiny": tiny}) as served, served.client() as client:
        served.worker.observe.append(boom)
        with client.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=50)) as stream:
            text = "".join(stream.iter_text())
        assert '"code":"unavailable"' in text
        assert "[DONE]" not in text
        assert isinstance(served.worker.failure, ZeroDivisionError)
        with contextlib.suppress(httpx.TransportError):  # the server may have ended by now
            health = client.get("/health")
            assert (health.status_code, health.json()) == (503, {"status": "stopped"})


def test_a_worker_that_ends_leaves_nobody_waiting(tiny, monkeypatch):
    """What is asked of it while it ends, after its state was looked at, is answered or refused, at whatever moment."""

    async def race() -> list[object]:
        worker = Worker({"tiny": tiny}, Settings())
        worker.start()
        while worker.state == "loading":
            await asyncio.sleep(0.001)
        monkeypatch.setattr(worker, "llm", lambda model: tiny)  # every look at the state is too early
        asked = [asyncio.ensure_future(worker.call("tiny", lambda llm: 1))]
        stopping = asyncio.ensure_future(worker.stop())
        for _ in range(100):
            asked.append(asyncio.ensure_future(worker.call("tiny", lambda llm: 1)))
            await asyncio.sleep(0.0005)
        await stopping
        asked.append(asyncio.ensure_future(worker.call("tiny", lambda llm: 1)))
        return list(await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10))

    for _ in range(5):
        done = asyncio.run(race())
        assert done[0] == 1
        assert isinstance(done[-1], UnavailableError)
        assert all(one == 1 or isinstance(one, UnavailableError) for one in done)


def test_one_engine_is_served_from_one_place_and_free_again_afterwards(tiny):
    with serving({"tiny": tiny}) as served:
        worker = Worker({"other": tiny}, Settings())

        async def refused() -> None:
            worker.start()
            while worker.state == "loading":
                await asyncio.sleep(0.001)
            await worker.stop()

        asyncio.run(refused())
        assert isinstance(worker.failure, IncompatibleError)
        assert "'other' is served already" in str(worker.failure)
        with served.client() as client:  # the first one goes on
            assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    with serving({"again": tiny}) as served, served.client() as client:
        assert client.post("/v1/chat/completions", json={**chat(), "model": "again"}).status_code == 200
    with pytest.raises(AssertionError, match="alias"), serving({"one": tiny, "two": tiny}):
        pass


def test_when_the_time_is_up_the_rest_is_given_up(tiny):
    from hasten.serve.app import build_app

    worker = Worker({"tiny": tiny}, Settings(), [lambda *_: time.sleep(0.02)])
    app = build_app(worker, Settings())
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(config(app, Settings()), worker, drain_s=0.3)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        assert until(lambda: worker.state == "ready", 30)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
        with WEB.stream("POST", url, json=chat(stream=True, max_tokens=400)) as stream:
            lines = stream.iter_lines()
            next(lines)
            started = time.monotonic()
            server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1][6:])["error"]["code"] == "unavailable"
        assert time.monotonic() - started < 3
        thread.join(10)
        assert not thread.is_alive()
    finally:
        listener.close()
