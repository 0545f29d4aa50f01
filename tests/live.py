"""Real servers for tests: uvicorn in a thread on a free port of this machine, over tiny models."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from chat_model import write_model

from hasten.serve.app import build_app
from hasten.serve.run import Server, config
from hasten.serve.settings import Settings
from hasten.serve.worker import Worker

KEY, OTHER_KEY = "correct-horse-battery-staple", "another-key-of-somebody-else"


@dataclass(frozen=True, slots=True)
class Served:
    """A running server: where it is, its parts, and what it did."""

    port: int
    worker: Worker
    app: Any
    steps: list[tuple[str, float]]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None = None, **more: Any) -> httpx.Client:
        """A client of this server."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **more)

    def connect(self, seconds: float = 10) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), seconds)

    def raw(self, data: bytes, seconds: float = 10) -> bytes:
        """What comes back for these bytes until the server closes or the time is up."""
        with self.connect(seconds) as link:
            link.sendall(data)
            return read_all(link)


def read_all(link: socket.socket) -> bytes:
    """Everything until the end of the connection, a reset, or its time limit."""
    out = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while more := link.recv(65536):
            out += more
    return out


def until(true: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether `true()` became true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def serving(models: Mapping[str, Any], settings: Settings | None = None, *, loaded: bool = True) -> Iterator[Served]:
    """A server of these models (LLMs, or functions that load them), ready, until the end of the block.

    Without `loaded` it listens, and may still load.
    """
    settings = settings or Settings()
    steps: list[tuple[str, float]] = []
    worker = Worker(models, settings, [lambda name, seconds, *_: steps.append((name, seconds))])
    app = build_app(worker, settings, drain_s=0.2)
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(config(app, settings), worker)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        assert until(lambda: server.started, 60)
        assert not loaded or until(lambda: worker.state != "loading", 60)
        assert not loaded or worker.state == "ready", worker.failure
        yield Served(listener.getsockname()[1], worker, app, steps)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


def ended_model(folder: Path) -> Path:
    """A tiny chat model whose answers can end, as grammars need it."""
    write_model(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 1}))
    return folder


def rows(served: Served) -> int:
    """Rows that run or wait in all engines."""
    return sum(served.worker.load())


def texts(stream: bytes) -> list[str]:
    """The data of every event of a whole SSE stream."""
    return [line[6:] for line in stream.decode().split("\n") if line.startswith("data: ")]


def routes(app: Any) -> set[str]:
    """Every path the application answers, those of included routers and those outside its OpenAPI document too."""
    found: set[str] = set(app.openapi()["paths"])
    stack = list(app.routes)
    while stack:
        route = stack.pop()
        inner = getattr(route, "original_router", None)
        stack += getattr(inner, "routes", None) or getattr(route, "routes", None) or ()
        if getattr(route, "path", ""):
            found.add(route.path)
    return found


def chat(text: Any = "hi", **more: Any) -> dict[str, Any]:
    """The body of a small chat request to the tiny model."""
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": 4, **more}
