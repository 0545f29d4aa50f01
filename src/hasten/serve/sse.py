"""Server-sent events: one JSON object each, a comment in long silences; a client that leaves ends the stream at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hasten.engine.limits import LIMITS
from hasten.serve.errors import describe

_LINE_ENDS = ("\x85", "\u2028", "\u2029")  # those that JSON does not escape by itself
_LOG = logging.getLogger("hasten.serve")
_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(Response):
    """A response that sends `chunks` as events and "[DONE]" after the last.

    `close` is called whatever ends the stream; when the client goes away, at once, not at the next event. An exception of
    `chunks` becomes an error event, after which nothing follows.
    """

    def __init__(
        self,
        chunks: AsyncIterator[Mapping[str, Any]],
        close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
        ping_s: float = LIMITS.ping_s,
    ) -> None:
        super().__init__(None, 200, {**_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._chunks, self._close, self._ping_s = chunks, close, ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        sender = asyncio.ensure_future(self._send(scope, send))
        watcher = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close()
            for task in (sender, watcher):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        waiting: asyncio.Future[Mapping[str, Any] | None] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(_next(self._chunks))
                done, _ = await asyncio.wait({waiting}, timeout=self._ping_s)
                more, data = True, b": ping\n\n"
                if done:
                    finished, waiting = waiting, None
                    try:
                        chunk = finished.result()
                        more, data = chunk is not None, b"data: [DONE]\n\n" if chunk is None else _event(chunk)
                    except Exception as error:  # noqa: BLE001 - whatever ends a stream is told in it
                        body = describe(error)[1]
                        scope["hasten.error"] = body["error"]["code"]
                        more, data = False, _event(body)
                await send({"type": "http.response.body", "body": data, "more_body": more})
                if not more:
                    return
        finally:
            if waiting is not None:
                waiting.cancel()


async def _next(chunks: AsyncIterator[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        return None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(value: Mapping[str, Any]) -> bytes:
    """One event. JSON in it is on one line for every client: some end lines where Unicode does, not only at \\n."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in _LINE_ENDS:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"
