"""Server-sent events: one JSON object each, a comment in long silences; a client that leaves ends the stream at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hasten.engine.limits import LIMITS
from hasten.serve.errors import describe

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for every event
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
        self._chunks, self._close, self._ping_s, self._sent = chunks, close, ping_s, 0.0

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
        pings = asyncio.ensure_future(self._ping(send))
        more = True
        try:
            while more:
                try:
                    chunk = await anext(self._chunks, None)
                    more, data = chunk is not None, b"data: [DONE]\n\n" if chunk is None else _event(chunk)
                except Exception as error:  # noqa: BLE001 - whatever ends a stream is told in it
                    body = describe(error)[1]
                    scope["hasten.error"] = body["error"]["code"]
                    more, data = False, _event(body)
                if not more:
                    pings.cancel()  # nothing may follow the end
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            pings.cancel()

    async def _ping(self, send: Send) -> None:
        """Break silences. A task of its own: a timeout around every event would cost more than the event."""
        self._sent = time.monotonic()
        while True:
            left = self._sent + self._ping_s - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            else:
                self._sent = time.monotonic()
                with contextlib.suppress(OSError):
                    await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(value: Mapping[str, Any]) -> bytes:
    """One event. JSON in it is on one line for every client: some end lines where Unicode does, not only at \\n."""
    text = _JSON.encode(value)
    for character in _LINE_ENDS:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"
