"""A real server for tests: uvicorn in a thread of this process, on a free port, over real models."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

import hasten
from hasten.llm import LLM
from hasten.serve.app import build_app
from hasten.serve.run import Server, config
from hasten.serve.settings import Settings
from hasten.serve.worker import Worker

CACHE = 64_000_000  # bytes of keys and values that a test's model may hold
CHAT = [{"role": "user", "content": "Why does the quick fox jump over the lazy dog?"}]


@dataclass(frozen=True)
class Served:
    """A running server, and clients of it."""

    base: str
    worker: Worker
    closing: ExitStack

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The official client; it does not try again, so that a test sees the first answer. Closed with the server."""
        how = {"max_retries": 0, "timeout": 60.0, **options}
        return self.closing.enter_context(openai.OpenAI(base_url=f"{self.base}/v1", api_key=key, **how))

    def async_openai(self, key: str = "none", **options: Any) -> openai.AsyncOpenAI:
        """The official client for asyncio."""
        return openai.AsyncOpenAI(base_url=f"{self.base}/v1", api_key=key, **{"max_retries": 0, "timeout": 60.0, **options})

    def http(self) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.base, timeout=60.0)

    def load(self) -> tuple[int, int]:
        """(rows running, requests waiting) as /ready tells it."""
        found = httpx.get(f"{self.base}/ready", timeout=10.0).json()
        return found["running"], found["waiting"]

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 10.0) -> float:
        """Seconds until `holds`; fails when that takes longer than `seconds`."""
        start = time.monotonic()
        while not holds():
            assert time.monotonic() - start < seconds, f"not in {seconds} s: {what}"
            time.sleep(0.005)
        return time.monotonic() - start


@contextmanager
def serving(models: Mapping[str, LLM | Callable[[], LLM]], **settings: Any) -> Iterator[Served]:
    """Serve `models` while the context lasts; it ends with nothing left in any engine."""
    how = Settings(port=0, **settings)
    worker = Worker(models, how)
    server = Server(config(build_app(worker, how, drain_s=0.2), how), worker)
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started or worker.state == "loading":
            assert thread.is_alive(), f"the server ended: {worker.failure}"
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.01)
        assert worker.state == "ready", worker.failure
        port = server.servers[0].sockets[0].getsockname()[1]
        with ExitStack() as closing:
            yield Served(f"http://127.0.0.1:{port}", worker, closing)
        end = time.monotonic() + 10
        while worker.load() != (0, 0):
            assert time.monotonic() < end, f"rows are left behind: {worker.load()}"
            time.sleep(0.01)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def load(folder: str | Path) -> LLM:
    """A model with a small cache."""
    return hasten.load(folder, cache_bytes=CACHE)


def with_end(folder: Path, token: int) -> Path:
    """Give a written model an end token."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": token}))
    return folder


def texts(chunks: Any, choices: int = 1) -> list[str]:
    """The contents of a chat stream's choices, put together; finish reasons must come once each, last."""
    parts, ended = [""] * choices, [False] * choices
    for chunk in chunks:
        for choice in chunk.choices:
            assert not ended[choice.index], "a choice went on after its end"
            parts[choice.index] += choice.delta.content or ""
            ended[choice.index] = choice.finish_reason is not None
    assert all(ended)
    return parts
