"""A client of OpenAI-style servers that costs next to nothing: it shares the machine with the server that is measured.

One connection per request, the same for every server; HTTP/1.1 as far as these servers speak it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

LARGEST = 2**24  # bytes of one line


@dataclass(slots=True)
class Reply:
    """One answer: texts of its choices, tokens as the server counts them, seconds to the first text and to the end."""

    status: int
    texts: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    tokens: int = 0
    pieces: int = 0
    first_s: float = 0.0
    seconds: float = 0.0
    retry_s: float = 0.0
    error: str = ""

    def same(self, other: Reply) -> bool:
        """Whether both say the same."""
        return (self.texts, self.reasons) == (other.texts, other.reasons)


async def ask(port: int, path: str, body: dict[str, Any], *, leave_after: int = 0) -> Reply:
    """POST `body` and read the whole answer; with `leave_after`, hang up after so many events of a stream.

    Raises OSError and EOFError when the connection breaks.
    """
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LARGEST)
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status, headers = await _head(reader)
        reply = Reply(status, retry_s=float(headers.get("retry-after", 0) or 0))
        if status == 200 and headers.get("content-type", "").startswith("text/event-stream"):
            await _stream(_lines(reader, headers), reply, start, leave_after)
        else:
            whole = b"".join([part async for part in _body(reader, headers)])
            if status == 200:
                _whole(json.loads(whole), reply)
            else:
                reply.error = whole.decode("utf-8", "replace")[:300]
        reply.seconds = time.perf_counter() - start
        return reply
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def get(port: int, path: str) -> tuple[int, bytes]:
    """(status, body) of a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LARGEST)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        status, headers = await _head(reader)
        return status, b"".join([part async for part in _body(reader, headers)])
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line = await reader.readline()
    if not line:
        raise EOFError("the server hung up")
    headers: dict[str, str] = {}
    while (more := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = more.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(line.split()[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding") != "chunked":
        yield await (reader.readexactly(int(headers["content-length"])) if "content-length" in headers else reader.read())
        return
    while True:
        size = int((await reader.readline()).split(b";")[0] or b"x", 16)  # an early end is an error here
        yield await reader.readexactly(size)
        await reader.readline()
        if not size:
            return


async def _lines(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    rest = b""
    async for part in _body(reader, headers):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


async def _stream(lines: AsyncIterator[bytes], reply: Reply, start: float, leave_after: int) -> None:
    texts: dict[int, list[str]] = {}
    reasons: dict[int, str | None] = {}
    events, ended = 0, False
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            ended = True
            continue
        events += 1
        chunk = json.loads(data)
        if "error" in chunk:
            reply.error = str(chunk["error"])[:300]
            return
        for choice in chunk.get("choices") or ():
            said = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            own = texts.setdefault(choice["index"], [])
            if said:
                reply.first_s = reply.first_s or time.perf_counter() - start
                reply.pieces += 1
                own.append(said)
            reasons[choice["index"]] = choice.get("finish_reason") or reasons.get(choice["index"])
        reply.tokens = (chunk.get("usage") or {}).get("completion_tokens", reply.tokens)
        if leave_after and events >= leave_after:
            return
    if not ended and not all(reasons.values()):  # some servers leave the last line out
        reply.error = "the stream broke off"
    reply.texts = ["".join(texts[index]) for index in sorted(texts)]
    reply.reasons = [reasons[index] for index in sorted(texts)]


def _whole(answer: dict[str, Any], reply: Reply) -> None:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    reply.texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
    reply.reasons = [choice["finish_reason"] for choice in choices]
    reply.tokens = answer["usage"]["completion_tokens"]
