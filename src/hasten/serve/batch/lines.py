"""The input of a batch: one request a line, read as a stream, each with an id of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, FormatError
from hasten.serve.protocol import Body, ChatBody, CompletionBody, EmbeddingBody, Extension

ROUTES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
}
_SHORT = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}
_LONG = ("custom_id", "method", "url", "body")
_ID_CHARS = 512
_LINE_BYTES = LIMITS.body_bytes + 8_192  # a body of the greatest size, and what stands around it
_SEED_BITS = 53  # every JSON reader keeps such numbers whole
_SHOWN = 5


class LineError(Exception):
    """A line that is no request: the id to answer under, OpenAI's error code and a message."""

    def __init__(self, id: str, code: str, message: str) -> None:
        super().__init__(message)
        self.id, self.code, self.message = id, code, message


@dataclass(frozen=True, slots=True)
class Job:
    """One request: `id` is its custom_id, `url` the route, `body` the route's JSON body."""

    id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file: its number (from 1), the byte it begins at and the byte behind its end; `raw` without line end.

    Of a line that is too long, `raw` holds the beginning only.
    """

    number: int
    start: int
    end: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Survey:
    """What one look at a whole input found: size, SHA-256 of all and of its first `prefix` bytes, and its ids' digests.

    `prefix_sha256` is empty when those bytes do not end with a line.
    """

    size: int
    sha256: str
    prefix_sha256: str
    ids: frozenset[bytes]


def digest(id: str) -> bytes:
    """What stands for an id in memory: 16 bytes."""
    return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read(path: Path, start: int = 0, end: int | None = None, number: int = 1) -> Iterator[Line]:
    """The lines of a file from byte `start`, which begins line `number`, up to byte `end`; blank ones are left out."""
    with path.open("rb") as file:
        file.seek(start)
        while end is None or start < end:
            raw = file.readline(_LINE_BYTES + 1)
            if not raw:
                return
            size, part = len(raw), raw
            while not part.endswith(b"\n"):
                part = file.readline(1 << 20)
                if not part:
                    break
                size += len(part)
            if start == 0:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.rstrip(b"\r\n")
            if raw.strip():
                yield Line(number, start, start + size, raw)
            start, number = start + size, number + 1


def survey(path: Path, prefix: int = 0) -> Survey:
    """Read an input once, in constant memory but for 16 bytes and their place in a table for every id.

    Raises FormatError for an input without lines, ConfigError when two lines have the same id, with their numbers.
    """
    whole, head, left = hashlib.sha256(), hashlib.sha256(), prefix
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            whole.update(chunk)
            head.update(chunk[:left])
            left -= min(left, len(chunk))
        size = file.tell()
        file.seek(max(0, prefix - 1))
        ends = b"\n" in file.read(2)  # the last byte of the prefix, or the one behind it
    seen: dict[bytes, int] = {}
    twice: list[str] = []
    for line in read(path):
        try:
            id = parse(line.number, line.raw).id
        except LineError as error:
            id = error.id
        first = seen.setdefault(digest(id), line.number)
        if first != line.number and len(twice) <= _SHOWN:
            twice.append(f"{id[:60]!r} on lines {first} and {line.number}")
    if twice:
        more = " and others" if len(twice) > _SHOWN else ""
        raise ConfigError(
            f"custom_id is there twice: {'; '.join(twice[:_SHOWN])}{more}",
            hint="give every line an id of its own; an answer is found by it",
            field="batch",
        )
    if not seen:
        raise FormatError("no line holds a request", path=path.name, hint="write one JSON object a line", field="batch")
    return Survey(size, whole.hexdigest(), head.hexdigest() if ends else "", frozenset(seen))


def parse(number: int, raw: bytes) -> Job:
    """The request of a line, in OpenAI's batch form or in the short one; raises LineError with the line's id.

    A line without an id is called "line-N". A request that samples and has no seed gets one that follows from its id, so
    that its answer does not depend on when, where or how often it is computed.
    """
    id = f"line-{number}"

    def refuse(code: str, message: str) -> NoReturn:
        raise LineError(id, code, message)

    if len(raw) > _LINE_BYTES:
        refuse("line_too_long", f"the line has more than {_LINE_BYTES} bytes")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        refuse("invalid_encoding", f"the line is not UTF-8 text (byte {error.start})")
    except (ValueError, RecursionError) as error:
        refuse("invalid_json", f"the line is not JSON ({str(error)[:100]})")
    if not isinstance(value, dict):
        refuse("invalid_line", "the line is not a JSON object")
    long = "custom_id" in value or "body" in value or "url" in value
    given = value.get("custom_id" if long else "id")
    if given is None and not long:
        given = id
    if not isinstance(given, str) or not 1 <= len(given) <= _ID_CHARS or not _plain(given):
        refuse("invalid_id", f"{'custom_id' if long else 'id'} must be a string of 1 to {_ID_CHARS} characters")
    id = given
    if long:
        for name in value:
            if name not in _LONG:
                refuse("unknown_field", f"{str(name)[:60]!r} is not a field of a batch line; those are {', '.join(_LONG)}")
        url, body = value.get("url"), value.get("body")
        if value.get("method") != "POST":
            refuse("invalid_method", 'method must be "POST"')
        if not isinstance(url, str) or url not in ROUTES:
            refuse("invalid_url", f"url must be one of {', '.join(ROUTES)}")
        if not isinstance(body, dict):
            refuse("invalid_body", "body must be a JSON object")
    else:
        kinds = [name for name in _SHORT if name in value]
        if len(kinds) != 1:
            refuse("invalid_line", f"the line must have one of {', '.join(_SHORT)}, or custom_id, method, url and body")
        url = _SHORT[kinds[0]]
        body = {name: field for name, field in value.items() if name != "id"}
        _extend(url, body)
    if body.get("stream"):
        refuse("invalid_value", "stream = true is for the server; a batch has whole answers")
    if url != "/v1/embeddings" and body.get("seed") is None:
        body["seed"] = int.from_bytes(digest(id), "big") % 2**_SEED_BITS
    return Job(id, url, body)


def _extend(url: str, body: dict[str, Any]) -> None:
    """Move what OpenAI has no field for (top_k, method, regex ...) to where the server reads it."""
    inner = body.get("hasten", {})
    names = [name for name in body if name in Extension.model_fields and name not in ROUTES[url].model_fields]
    if names and isinstance(inner, dict):
        body["hasten"] = {**inner, **{name: body.pop(name) for name in names}}


def _plain(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
