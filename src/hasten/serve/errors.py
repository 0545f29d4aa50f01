"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}}, bounded, without paths or addresses."""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hasten.engine.limits import LIMITS
from hasten.engine.scheduler import QueueFullError
from hasten.errors import (
    BusyError,
    ConfigError,
    ContextLengthError,
    FormatError,
    HastenError,
    IncompatibleError,
    MemoryFitError,
    MissingExtraError,
    UnknownNameError,
    UnsupportedError,
)
from hasten.serve.worker import UnavailableError

_LOG = logging.getLogger("hasten.serve")
_PRIVATE = re.compile(
    r"0x[0-9a-fA-F]{4,}|<[^<>]* object at [^<>]*>|(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[\w.@+-]+[/\\])+[\w.@+-]*"
)
_TYPES = frozenset(("str", "int", "float", "bool"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class ApiError(HastenError):
    """An answer other than 200 that a route gives on purpose: HTTP `status` and OpenAI's `code`."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, field: str = "", hint: str = "", retry_s: float = 0.0
    ) -> None:
        super().__init__(message, hint=hint, field=field)
        self.status, self.code, self.retry_s = status, code, retry_s


_KINDS: tuple[tuple[type[HastenError], int, str], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (UnknownNameError, 400, "unknown_name"),
    (IncompatibleError, 400, "incompatible"),
    (ConfigError, 400, "invalid_value"),
    (FormatError, 400, "invalid_format"),
    (UnsupportedError, 400, "unsupported"),
    (MissingExtraError, 400, "unsupported"),
    (MemoryFitError, 400, "does_not_fit"),
    (QueueFullError, 429, "queue_full"),
    (BusyError, 503, "busy"),
    (UnavailableError, 503, "unavailable"),
)


def public(text: str, most: int = 1000) -> str:
    """`text` without control characters, addresses and paths of this machine, at most `most` characters."""
    clean = _PRIVATE.sub("…", _CONTROL.sub(" ", text))
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def describe(error: BaseException) -> tuple[int, dict[str, Any], float]:
    """(HTTP status, body, seconds after which to try again or 0) for an exception.

    What is not ours is logged under an id, and the body holds nothing but the id.
    """
    retry_s = float(getattr(error, "retry_after_s", 0.0))
    if isinstance(error, ApiError):
        status, code, retry_s = error.status, error.code, error.retry_s
    elif isinstance(error, HastenError):
        found = next(((status, code) for kind, status, code in _KINDS if isinstance(error, kind)), None)
        status, code = found or (500, "engine_error")
        retry_s = (retry_s or 1.0) if status in (429, 503) else 0.0
    else:
        number = secrets.token_hex(6)
        _LOG.error("internal error %s", number, exc_info=error)
        body = {"message": f"internal error {number}; the server's log says more", "type": "server_error"}
        return 500, {"error": {**body, "param": None, "code": "internal_error"}}, 0.0
    message = public(f"{error.message} ({error.hint})" if error.hint else error.message)
    return status, shape(status, message, param=public(error.field, 200) or None, code=code), retry_s


def shape(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error answer."""
    types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = types.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorAnswer(Response):
    """An error as a response, which leaves its `code` in the scope for the log and the metrics."""

    def __init__(self, data: bytes, status: int, headers: Mapping[str, str], code: str | None) -> None:
        super().__init__(data, status, headers, "application/json")
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        scope["hasten.error"] = self._code or str(self.status_code)
        await super().__call__(scope, receive, send)


def answer(status: int, body: Mapping[str, Any], retry_s: float = 0.0) -> Response:
    """The response for an error body, at most `LIMITS.error_bytes` long."""
    inner = dict(body["error"])
    for most in (1000, 300, 100):  # characters; JSON writes one as up to twelve bytes
        data = json.dumps({"error": inner}).encode()
        if len(data) <= LIMITS.error_bytes:
            break
        inner["message"] = inner["message"][:most] + "…"
        inner["param"] = inner["param"][: most // 5] if inner["param"] else None
    else:
        data = json.dumps({"error": inner}).encode()
    headers = {"Retry-After": str(max(1, round(retry_s)))} if retry_s else {}
    if status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="hasten", charset="UTF-8"'
    return ErrorAnswer(data, status, headers, body["error"]["code"])


def respond(error: BaseException) -> Response:
    """The response for an exception."""
    return answer(*describe(error))


def invalid_body(problems: Sequence[Mapping[str, Any]]) -> Response:
    """The response for a body that does not have the form of its route; names the first fields that are wrong.

    Values are never repeated: one item of a few bytes must not come back as megabytes.
    """
    parts, param, code = [], None, "invalid_value"
    problems = _nearest(problems)
    for problem in problems[:5]:
        where = _path(problem.get("loc", ()))
        kind = str(problem.get("type", ""))
        if kind == "extra_forbidden":
            code = "unknown_field" if param is None else code
            text = "is not a field of this route; nothing is ignored"
        elif kind == "missing":
            text = "is missing"
        elif kind in ("json_invalid", "value_error.jsondecode"):
            where, text = "body", "is not JSON"
        else:
            text = str(problem.get("msg", "is not allowed")).removeprefix("Value error, ")
            name = text.partition(" ")[0]
            if kind == "value_error" and re.fullmatch(r"[a-z_]{1,40}", name):
                where, text = name if where == "body" else f"{where}.{name}", text.removeprefix(name).lstrip()
            text = text[:1].lower() + text[1:]
        param = param or where
        parts.append(f"{where}: {text}")
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return answer(400, shape(400, public("; ".join(parts) + more), param=public(param or "body", 200), code=code))


def _nearest(problems: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a value that fits none of several types, what is wrong with it as the type that it fits best: the deepest."""
    first = problems[:50]
    paths = [_path(problem.get("loc", ())) for problem in first]
    kept = [one for path, one in zip(paths, first, strict=True) if not any(_inside(other, path) for other in paths)]
    return [*kept, *problems[50:]]


def _inside(path: str, other: str) -> bool:
    return path.startswith((f"{other}[", f"{other}."))


def _path(loc: Sequence[Any]) -> str:
    """Where a problem is, as one writes it; without the names of types that pydantic puts in for unions."""
    out = ""
    for part in [*loc][1 if loc and loc[0] in ("body", "query", "path", "header") else 0 :][:12]:
        if isinstance(part, int):
            out += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(part)) and part not in _TYPES:
            out += f".{part}" if out else str(part)
    return out or "body"
