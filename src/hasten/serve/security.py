"""Who may ask, and how much may arrive: host, origin, key, headers, body. A plain ASGI layer around everything else."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.engine.limits import LIMITS
from hasten.serve import errors
from hasten.serve.settings import Settings

OPEN = frozenset(("/health",))  # routes without a key
_DISCARDED = 4  # times limits.body_bytes of a body too large that are read and thrown away before it is refused
_METHODS = frozenset(("GET", "HEAD", "POST"))


class Gate:
    """Refuses what must not reach a route: foreign hosts and origins, missing keys, headers and bodies too large or slow.

    The key of a request is compared by its hash in constant time; `scope["hasten.tenant"]` is a hash of the key, which
    keeps cached prefixes of different keys apart.
    """

    def __init__(self, app: ASGIApp, settings: Settings, seconds: float = LIMITS.body_s) -> None:
        self._app, self._settings, self._seconds = app, settings, seconds
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)
        if refusal is None:
            try:
                receive = await self._whole(scope, receive)
            except errors.ApiError as error:
                refusal = error
        if refusal is None:
            await self._app(scope, receive, send)
            return
        response = errors.respond(refusal)
        response.headers["Connection"] = "close"  # what is left of the request is not read
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> errors.ApiError | None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if len(headers) > LIMITS.http_headers or size > LIMITS.http_header_bytes:
            return errors.ApiError(431, "the request's headers are too large", code="headers_too_large")
        named: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            named.setdefault(name.lower(), []).append(value)
        hosts = [value.decode("latin-1") for value in named.get(b"host", [])]
        if len(hosts) != 1 or not self._settings.names_host(hosts[0]):
            hint = "--allow-host NAME serves under a further name"
            return errors.ApiError(403, "this server does not go by that host name", code="host_not_allowed", hint=hint)
        for origin in named.get(b"origin", []):
            if origin.decode("latin-1").partition("://")[2].lower() != hosts[0].lower():
                return errors.ApiError(403, "requests of other sites are refused", code="origin_not_allowed")
        if scope["method"] not in _METHODS:
            return errors.ApiError(405, f"method {scope['method'][:16]} is not served", code="method_not_allowed")
        tenant = self._tenant(named.get(b"authorization", []))
        if self._keys and tenant is None and scope["path"] not in OPEN:
            return errors.ApiError(
                401, "a valid API key is required", code="invalid_api_key", hint="Authorization: Bearer KEY"
            )
        scope["hasten.tenant"] = tenant or ""
        return None

    def _tenant(self, values: list[bytes]) -> str | None:
        """The name that stands for the key of the request, None for no or a wrong one."""
        if len(values) != 1:
            return None
        scheme, _, rest = values[0].decode("latin-1").partition(" ")
        given = rest.strip()
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
            except (binascii.Error, ValueError):
                return None
        elif scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(given.encode("latin-1")).digest()
        found = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whichever it is
        return hashlib.sha256(b"tenant" + digest).hexdigest()[:32] if any(found) else None

    async def _discard(self, receive: Receive) -> None:
        """Read on for a moment, and keep nothing: a client that still sends would see a reset instead of the answer."""
        left, end = _DISCARDED * LIMITS.body_bytes, time.monotonic() + 1.0
        while left > 0:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    async def _whole(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body within its bounds of size and time; a receive that gives it, and then what comes after it."""
        if scope["method"] != "POST":
            return receive
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and (
                not value.isdigit() or len(value) > 15 or int(value) > LIMITS.body_bytes
            ):
                await self._discard(receive)
                raise _too_large()
        body, more, end = bytearray(), True, time.monotonic() + self._seconds
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                raise errors.ApiError(408, "the body did not arrive in time", code="request_timeout") from None
            if message["type"] == "http.disconnect":
                return _replay([message], receive)
            body += message.get("body", b"")
            if len(body) > LIMITS.body_bytes:
                if message.get("more_body", False):
                    await self._discard(receive)
                raise _too_large()
            more = message.get("more_body", False)
        return _replay([{"type": "http.request", "body": bytes(body), "more_body": False}], receive)


def _too_large() -> errors.ApiError:
    return errors.ApiError(413, f"the body has more than {LIMITS.body_bytes} bytes", code="body_too_large")


def _replay(messages: list[Message], receive: Receive) -> Callable[[], Any]:
    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again
