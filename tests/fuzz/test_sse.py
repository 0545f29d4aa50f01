"""Streams of the server, cut at every byte: what clients read does not depend on how the network cuts them."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Iterable, Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import chat, ended_model, serving
from openai._streaming import SSEDecoder

import hasten
from hasten.serve.sse import EventStream

NASTY = 'caf\u00e9 \U0001f600 \u2028 \u2029 \x85 \x0b\x0c\x1c \r\n data: [DONE]\n\n: ping\n\nevent: x\nid: 1\r\rretry: 1 "\\" \ufeff\x00\x7f'


class Reference:
    """The event stream interpretation of the HTML standard, one byte after the other; only `data` is used here."""

    def __init__(self) -> None:
        self.text, self.line, self.data, self.after_cr = codecs.getincrementaldecoder("utf-8")(), "", [], False

    def read(self, piece: bytes) -> Iterator[str]:
        for c in self.text.decode(piece):
            if c == "\n" and self.after_cr:
                self.after_cr = False
                continue
            self.after_cr = c == "\r"
            if c not in "\r\n":
                self.line += c
                continue
            line, self.line = self.line, ""
            if not line and self.data:
                yield "\n".join(self.data)
                self.data = []
            elif line.startswith("data:"):
                self.data.append(line[5:].removeprefix(" "))
            else:
                assert not line or line.startswith(":"), line  # nothing but data and comments


def reference(pieces: Iterable[bytes]) -> list[str]:
    parser = Reference()
    return [event for piece in pieces for event in parser.read(piece)]


def of_openai(pieces: Iterable[bytes]) -> list[str]:
    return [event.data for event in SSEDecoder().iter_bytes(iter(pieces)) if event.data]


def of_httpx_lines(pieces: Iterable[bytes]) -> list[str]:
    """Clients that read `iter_lines`, which ends lines where str.splitlines does."""
    response = httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, content=iter(pieces))
    return [line[6:] for line in response.iter_lines() if line.startswith("data: ")]


READERS = {"the standard": reference, "openai": of_openai, "httpx": of_httpx_lines}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Whole streams: text echoed that looks like events, chat with counts and trace, several choices, a failure."""
    llm = hasten.load(str(ended_model(tmp_path_factory.mktemp("ended"))))
    bodies = [
        ("/v1/completions", {"model": "tiny", "prompt": NASTY, "echo": True, "max_tokens": 3}),
        ("/v1/chat/completions", chat(NASTY, max_tokens=4, n=2, stream_options={"include_usage": True}, temperature=2)),
        ("/v1/chat/completions", chat(max_tokens=2, hasten={"trace": True}, logprobs=True, top_logprobs=1)),
    ]
    with serving({"tiny": llm}) as served, served.client() as client:
        yield [client.post(path, json={**body, "stream": True, "seed": 5}).content for path, body in bodies]


@pytest.mark.parametrize("reader", READERS)
def test_a_stream_cut_at_any_byte_reads_the_same(streams, reader):
    for stream in streams:
        events = READERS[reader]([stream])
        assert events[-1] == "[DONE]"
        assert [json.loads(event) for event in events[:-1]]
        for cut in range(len(stream) + 1):
            assert READERS[reader]([stream[:cut], stream[cut:]]) == events
        assert READERS[reader]([stream[i : i + 1] for i in range(len(stream))]) == events


def test_all_readers_agree(streams):
    for stream in streams:
        first, *others = (read([stream]) for read in READERS.values())
        assert all(other == first for other in others)
    assert json.loads(reference([streams[0]])[0])["choices"][0]["text"] == NASTY


def test_a_stream_that_ends_early_is_never_taken_for_a_whole_one(streams):
    stream = streams[1]
    events = reference([stream])
    for cut in range(len(stream)):
        read = reference([stream[:cut]])
        assert read == events[: len(read)]
        assert "[DONE]" not in read


def sent(chunks: list, gap: float) -> bytes:
    """What EventStream sends for these chunks, with pings in silences of `gap` seconds."""
    out: list[bytes] = []

    async def make():
        for chunk in chunks:
            await asyncio.sleep(gap)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        out.append(message.get("body", b""))

    asyncio.run(EventStream(make(), lambda: None, ping_s=0.001 if gap else 10)({}, receive, send))
    return b"".join(out)


VALUES = st.dictionaries(st.text(max_size=4), st.text(max_size=12) | st.integers(-9, 9), max_size=3)


@given(chunks=st.lists(VALUES, max_size=4), data=st.data())
def test_any_text_comes_through_any_cutting(chunks, data):
    stream = sent(chunks, 0)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    for read in READERS.values():
        events = read(pieces)
        assert [json.loads(event) for event in events[:-1]] == chunks
        assert events[-1] == "[DONE]"


def test_pings_are_comments_between_events():
    stream = sent([{"a": 1}, {"b": NASTY}], 0.02)
    assert stream.count(b": ping\n\n") >= 2
    for read in READERS.values():
        assert [json.loads(event) for event in read([stream])[:-1]] == [{"a": 1}, {"b": NASTY}]


def test_a_failure_ends_a_stream_with_an_error_and_without_done():
    events = reference([sent([{"a": 1}, ValueError("secret at 0x7fff0000")], 0)])
    assert len(events) == 2
    assert json.loads(events[1])["error"]["code"] == "internal_error"
    assert "secret" not in events[1]
