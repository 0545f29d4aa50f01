"""One request to an ASGI application of this process: no socket, the same answer as over one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message

from hasten.errors import HastenError

_GRACE_S = 5.0  # what an application gets to end by itself after its client has gone


def http_scope(method: str, path: str, headers: Sequence[tuple[str, str]] = (), query: str = "") -> dict[str, Any]:
    """The ASGI scope of one HTTP request; header names in any case, values in Latin-1."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query.encode("latin-1", "replace"),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "client": ("127.0.0.1", 0),
        "server": ("localhost", None),
        "state": {},
    }


def reason(failure: BaseException | None) -> str:
    """Why an engine's thread has ended, in a few words."""
    return str(failure) if isinstance(failure, HastenError) else type(failure).__name__ if failure else "stopped"


async def exchange(app: ASGIApp, scope: Mapping[str, Any], body: bytes = b"") -> AsyncGenerator[Message, None]:
    """The messages that `app` sends for one request, as it sends them; the application's own exceptions come out here.

    Closing the iterator is the client's hanging up: the application hears a disconnect, and is cancelled when it does not
    end soon after. Nothing is sent ahead: the application waits until the message before has been taken.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=1)
    gone = asyncio.Event()
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if not gone.is_set():
            await messages.put(message)

    async def run() -> None:
        try:
            await app(dict(scope), receive, send)
        finally:
            if not gone.is_set():
                await messages.put(None)

    task = asyncio.ensure_future(run())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        gone.set()
        while not messages.empty():
            messages.get_nowait()
        if not task.done():
            await asyncio.wait([task], timeout=_GRACE_S)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def answer(app: ASGIApp, scope: Mapping[str, Any], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """(status, headers with names in lower case, body) of one request."""
    status, headers, parts = 500, {}, []
    async for message in exchange(app, scope, body):
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))
    return status, headers, b"".join(parts)
