"""The door of a server of replicas: takes HTTP requests behind the gate and relays each to a replica that has its model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from hasten.errors import HastenError, unknown_name
from hasten.serve import errors
from hasten.serve.replicas.exposition import merged
from hasten.serve.settings import Settings
from hasten.serve.worker import State

Ask = Callable[[str, dict[str, Any]], Any]
_LOG = logging.getLogger("hasten.serve")
_TRIES = 3  # a request whose replica dies before it has said anything is asked of another one
_HOP = ("connection", "content-length", "transfer-encoding")


class LostError(HastenError):
    """The replica that worked on a request has gone."""


class Front:
    """An ASGI application. `ask(model, request)` gives a replica's answer as an async iterator with `cancel()`: first
    [status, headers], then pieces of the body; it raises one of `lost` when the replica is gone, one of `full` when all
    are busy. `counts()` says how many replicas are in which state, `every(name, *given)` what each of them returns for the
    method `name`.
    """

    def __init__(
        self,
        models: Sequence[str],
        settings: Settings,
        ask: Ask,
        lost: tuple[type[BaseException], ...],
        full: tuple[type[BaseException], ...],
        counts: Callable[[], dict[str, int]],
        every: Callable[..., list[Any]],
    ) -> None:
        self.state: State = "loading"
        self.failure: BaseException | None = None  # what ended the replicas for good
        self._open = 0  # requests that are being relayed
        self._models, self._settings, self._ask = tuple(models), settings, ask
        self._lost, self._full, self._counts, self._every = lost, full, counts, every

    def drain(self) -> None:
        """Take no further request; what runs goes on. Safe in a signal handler."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    @property
    def busy(self) -> bool:
        """Whether a request is being relayed."""
        return self._open > 0

    async def stop(self, seconds: float = 0.0) -> None:
        """Take no further request; what runs is given up when the server closes its connections."""
        self.drain()

    def fail(self, error: BaseException) -> None:
        """There are no replicas, and there will be none."""
        self.failure, self.state = error, "stopped"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        try:
            await self._route(scope, receive, send)
        except HastenError as error:
            await errors.respond(error)(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in ("/health", "/ready"):
            counts = await asyncio.to_thread(self._counts)
            running = counts.get("RUNNING", 0)
            status = self.state if running else "loading"
            good = ("ready", "draining") if path == "/health" else ("ready",)
            said: dict[str, Any] = {"status": status}
            if path == "/ready":
                said["replicas"] = counts
            await JSONResponse(said, 200 if status in good else 503)(scope, receive, send)
            return
        if path == "/hasten/replicas":
            await JSONResponse({"replicas": await asyncio.to_thread(self._every, "facts")})(scope, receive, send)
            return
        if path == "/metrics":
            await self._metrics(scope, receive, send)
            return
        if self.state != "ready":
            why = {"loading": "is starting its replicas", "draining": "is shutting down"}.get(self.state, "has stopped")
            raise errors.ApiError(503, f"the server {why}", code="unavailable", retry_s=1)
        body = b""
        if scope["method"] == "POST":
            message = await receive()  # the gate has read it whole
            if message["type"] == "http.disconnect":
                return
            body = message["body"]
        if path == "/v1/models" and len(self._models) > 1:
            await self._all_models(scope, receive, send)
            return
        await self._relay(self._model(path, body), scope, receive, send, body)

    def _model(self, path: str, body: bytes) -> str:
        """The model a request is for; the first where it says none, whose application then answers what is wrong."""
        try:
            name = json.loads(body)["model"] if body else None
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
        if not isinstance(name, str):
            return self._models[0]
        found = self._settings.aliases.get(name, name)
        if found not in self._models:
            error = unknown_name("model", name[:200], {*self._models, *self._settings.aliases})
            raise errors.ApiError(404, error.message, code="model_not_found", field="model", hint=error.hint)
        return found

    def _request(self, scope: Scope, body: bytes) -> dict[str, Any]:
        headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]]
        query = scope.get("query_string", b"").decode("latin-1")
        return {"method": scope["method"], "path": scope["path"], "query": query, "headers": headers, "body": body}

    async def _parts(self, model: str, request: dict[str, Any], gone: asyncio.Future[Any]) -> AsyncIterator[Any]:
        """What a replica answers; ends early when the client is `gone`. Raises LostError, ApiError."""
        answer = self._ask(model, request)
        try:
            parts = aiter(answer)
            while True:
                part = asyncio.ensure_future(anext(parts))
                try:
                    await asyncio.wait({part, gone}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not part.done():
                        part.cancel()
                if not part.done():
                    return
                yield part.result()
        except StopAsyncIteration:
            return
        except self._full:
            raise errors.ApiError(429, "all replicas are busy", code="queue_full", retry_s=1) from None
        except self._lost as error:
            _LOG.warning("a replica was lost (%s)", type(error).__name__)
            raise LostError("the replica that worked on the request has gone", hint="try again") from None
        finally:
            answer.cancel()

    async def _relay(self, model: str, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Relay one request. An answer that is no stream is sent when it is whole; so it is asked again if it is lost."""
        request = self._request(scope, body)
        gone = asyncio.ensure_future(_disconnect(receive))
        begun = False
        self._open += 1
        try:
            for _ in range(_TRIES):
                start: Message | None = None
                pieces: list[bytes] = []
                try:
                    async for part in self._parts(model, request, gone):
                        if start is None:
                            start = _start(part)
                            if _streams(start):
                                begun = True
                                await send(start)
                        elif begun:
                            await send({"type": "http.response.body", "body": part, "more_body": True})
                        else:
                            pieces.append(part)
                except LostError as error:
                    if begun:
                        event = b"data: " + json.dumps(errors.describe(_retriable(error))[1]).encode() + b"\n\n"
                        await send({"type": "http.response.body", "body": event, "more_body": False})
                        return
                    continue
                if gone.done() or start is None:
                    return
                if not begun:
                    await send(start)
                await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": False})
                return
            raise _retriable(LostError("no replica stayed to answer the request", hint="try again"))
        finally:
            self._open -= 1
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What every replica measures, on one page."""
        found = await asyncio.to_thread(self._every, "pages", self._request(scope, b""))
        pages = [(labels, text) for replica in found for labels, status, text in replica if status == 200]
        if not pages:
            raise errors.ApiError(404, "the replicas have no metrics", code="no_metrics")
        await PlainTextResponse(merged(pages), media_type="text/plain; version=0.0.4")(scope, receive, send)

    async def _all_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The lists of all models' applications as one."""
        rows: list[Any] = []
        never: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        for model in self._models:
            parts = [part async for part in self._parts(model, self._request(scope, b""), never)]
            rows += json.loads(b"".join(parts[1:]))["data"]
        await JSONResponse({"object": "list", "data": rows})(scope, receive, send)


def _retriable(error: LostError) -> errors.ApiError:
    return errors.ApiError(503, error.message, code="replica_lost", hint=error.hint, retry_s=1)


def _start(part: Any) -> Message:
    status, fields = part
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields if name.lower() not in _HOP]
    return {"type": "http.response.start", "status": status, "headers": headers}


def _streams(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
