"""The official client, and what tests of the API share: requests, models with small caches, streams put together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import live
import openai

import hasten
from hasten.llm import LLM
from hasten.serve.settings import Settings
from hasten.serve.worker import Worker

CACHE = 64_000_000  # bytes of keys and values that a test's model may hold
CHAT = [{"role": "user", "content": "Why does the quick fox jump over the lazy dog?"}]


@dataclass(frozen=True)
class Served:
    """A running server, and clients of it, which are closed with it."""

    base: str
    worker: Worker
    closing: ExitStack

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The official client; it does not try again, so that a test sees the first answer."""
        how = {"max_retries": 0, "timeout": 60.0, **options}
        return self.closing.enter_context(openai.OpenAI(base_url=f"{self.base}/v1", api_key=key, **how))

    def async_openai(self, key: str = "none", **options: Any) -> openai.AsyncOpenAI:
        """The official client for asyncio; the caller closes it."""
        return openai.AsyncOpenAI(base_url=f"{self.base}/v1", api_key=key, **{"max_retries": 0, "timeout": 60.0, **options})

    def http(self) -> httpx.Client:
        """A plain client; the caller closes it."""
        return httpx.Client(base_url=self.base, timeout=60.0)

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 10.0) -> float:
        """Seconds until `holds`; fails when that takes longer than `seconds`."""
        start = time.monotonic()
        assert live.until(holds, seconds), f"not in {seconds} s: {what}"
        return time.monotonic() - start


@contextmanager
def serving(models: Mapping[str, Any], *, loaded: bool = True, **settings: Any) -> Iterator[Served]:
    """Serve `models` while the context lasts; it must end with nothing left in any engine."""
    with live.serving(models, Settings(**settings), loaded=loaded) as running, ExitStack() as closing:
        own = Served(running.url, running.worker, closing)
        yield own
        own.until(lambda: running.worker.load() == (0, 0), "no rows left behind")


def load(folder: str | Path, **options: Any) -> LLM:
    """A model with a small cache."""
    return hasten.load(folder, cache_bytes=CACHE, **options)


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
