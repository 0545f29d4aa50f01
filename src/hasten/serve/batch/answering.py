"""One engine that answers the lines of a batch: through the server's own application, without a socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from hasten.engine.limits import LIMITS
from hasten.errors import HastenError
from hasten.serve.asgi import answer, http_scope, reason
from hasten.serve.batch.lines import Line, LineError, parse
from hasten.serve.batch.results import Results, error_row, row
from hasten.serve.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from hasten.llm import LLM

AHEAD = LIMITS.rows + LIMITS.rows // 2  # lines in work at once: every row of the engine, and the next ones made ready
_HEADERS = (("host", "localhost"), ("content-type", "application/json"))


class Answering:
    """An async context whose `answer` gives the output line of an input line; any number may run at once.

    `name` is the model's name in requests, which may leave it out; `method` decodes those that do not say.
    """

    def __init__(self, llm: LLM, name: str, method: tuple[str, ...] = ("auto",)) -> None:
        from hasten.serve.app import build_app
        from hasten.serve.worker import Worker

        settings = Settings(method=method)
        self._name = name
        self._worker = Worker({name: llm}, settings)
        self._app = build_app(self._worker, settings, drain_s=0)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Answering:
        await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))
        while self._worker.state == "loading":
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def answer(self, number: int, raw: bytes) -> dict[str, Any]:
        """The output line for line `number`; one that is no request, or that the server refuses, is answered with why.

        Raises HastenError when the engine has ended.
        """
        try:
            job = parse(number, raw)
        except LineError as error:
            return error_row(error.id, error.code, error.message)
        # a lone surrogate becomes its JSON escape
        body = json.dumps({"model": self._name, **job.body}, ensure_ascii=False).encode("utf-8", "backslashreplace")
        end = time.monotonic() + LIMITS.deadline_s
        while True:
            status, headers, data = await answer(self._app, http_scope("POST", job.url, _HEADERS), body)
            if status >= 500 and self._worker.state == "stopped":
                raise HastenError(
                    f"the engine ended ({reason(self._worker.failure)})",
                    hint="what was answered is kept; the same command goes on",
                )
            if status not in (429, 503) or time.monotonic() > end:
                return row(job.id, status, json.loads(data))
            await asyncio.sleep(float(headers.get("retry-after", 1)))


async def answer_all(answering: Answering, lines: Iterable[Line], results: Results, progress: Callable[[], None]) -> None:
    """Answer `lines` with a full engine: the next goes in when one comes out. Answers are written as they come."""
    working: set[asyncio.Task[dict[str, Any]]] = set()

    def collect(done: Iterable[asyncio.Task[dict[str, Any]]]) -> None:
        for task in done:
            results.add(task.result())
            progress()

    try:
        for line in lines:
            working.add(asyncio.create_task(answering.answer(line.number, line.raw)))
            if len(working) >= AHEAD:
                done, working = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
                collect(done)
        while working:
            done, working = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
            collect(done)
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
