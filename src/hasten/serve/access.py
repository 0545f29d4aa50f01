"""What becomes of a request: an id, and when it ends one line in the log and one entry in the metrics.

The outermost layer: what the gate refuses is counted too. Whatever a route did not expect ends here as a 500. Routes note
what they learn in the request's `Account`; prompts, answers and keys are not among it.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.serve import errors
from hasten.serve.metrics import Metrics
from hasten.types import Output

_LOG = logging.getLogger("hasten.access")
_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}\Z")
_QUIET = frozenset(("/health", "/ready", "/metrics"))  # asked for every few seconds


@dataclass(slots=True)
class Account:
    """What is known of one HTTP request."""

    id: str
    model: str = ""
    method: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: list[str] = field(default_factory=list)

    def ended(self, output: Output) -> None:
        """A choice has ended."""
        self.completion_tokens += output.usage.completion_tokens
        self.finish.append(output.finish_reason)
        self.method = output.method


def account(scope: Scope) -> Account:
    """The account of a request; one that nobody reads where the layer is not there."""
    found = scope.get("hasten.account")
    return found if isinstance(found, Account) else Account("")


class Access:
    """The layer: gives every answer `X-Request-Id`, the caller's own where it is plain."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = scope["hasten.account"] = Account(_id(scope))
        started, status, complete, gone = time.perf_counter(), 0, False, False

        async def told() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not complete)
            return message

        async def sent(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = own.id
            else:
                complete = not message.get("more_body", False)
            await send(message)

        self._metrics.opened()
        try:
            await self._app(scope, told, sent)
        except Exception as error:
            if status:  # the answer has begun: all that can be done is to cut it off
                raise
            await errors.respond(error)(scope, told, sent)
        finally:
            seconds, route = time.perf_counter() - started, _route(scope)
            status = status or 499  # cancelled before an answer began
            code = str(scope.get("hasten.error", ""))
            self._metrics.closed(route, status, seconds, code, gone)
            _log(own, scope["method"], route, status, seconds, code, gone)


def _id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name.lower() == b"x-request-id"]
    if len(given) == 1 and _ID.match(given[0]):
        return str(given[0].decode("ascii"))
    return f"req-{secrets.token_hex(12)}"


def _route(scope: Scope) -> str:
    """The route as it is declared, so that paths of callers do not become labels."""
    return str(getattr(scope.get("route"), "path", "other"))


def _log(own: Account, verb: str, route: str, status: int, seconds: float, code: str, gone: bool) -> None:
    level = logging.ERROR if status >= 500 else logging.WARNING if status in (401, 403) else logging.INFO
    level = logging.DEBUG if route in _QUIET and status in (200, 503) else level
    if not _LOG.isEnabledFor(level):
        return
    facts = {
        "request": own.id, "verb": verb[:8], "route": route, "status": status, "seconds": round(seconds, 4),
        "model": own.model, "method": ",".join(own.method), "prompt_tokens": own.prompt_tokens,
        "completion_tokens": own.completion_tokens, "finish": ",".join(own.finish), "error": code, "gone": gone,
    }  # fmt: skip
    _LOG.log(level, "request", extra={name: value for name, value in facts.items() if value not in ("", 0, False)})
