"""Images in requests: what their headers say is checked before anything is decoded, against Pillow's encoders."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import chat
from PIL import Image

import hasten.serve
from hasten.engine.limits import LIMITS
from hasten.serve.images import read

SAVE = {
    "png": [{}, {"optimize": True}],
    "jpeg": [{}, {"progressive": True}, {"quality": 3}, {"exif": b"Exif\0\0II*\0" + bytes(400)}, {"comment": b"\xff\xc0" * 90}],
    "webp": [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0" + bytes(40)}],
}  # fmt: skip


def url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encoded(kind: str, size: tuple[int, int], options: dict, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 7).save(out, kind.upper(), **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 700), st.integers(1, 700), st.sampled_from(sorted(SAVE)))
def test_sizes_are_those_that_were_encoded(data, width, height, kind):
    mode = data.draw(
        st.sampled_from(["RGB", "L"] if kind == "jpeg" else ["RGB", "RGBA", "P"] if kind == "png" else ["RGB", "RGBA"])
    )
    raw = encoded(kind, (width, height), data.draw(st.sampled_from(SAVE[kind])), mode)
    found = read(url(kind, raw))
    assert (found.kind, found.width, found.height, found.data) == (kind, width, height, raw)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(SAVE)))
def test_damaged_headers_are_a_size_within_the_limits_or_refused(data, kind):
    raw = bytearray(encoded(kind, (9, 5), data.draw(st.sampled_from(SAVE[kind]))))
    for place in data.draw(st.lists(st.integers(0, min(len(raw), 64) - 1), max_size=5)):
        raw[place] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        found = read(url(kind, bytes(raw)))
    except ValueError as error:
        assert 10 < len(str(error)) < 200
    else:
        assert 1 <= found.width * found.height <= LIMITS.image_pixels


BOMBS = {
    "nothing": url("png", b""),
    "a header of 65535 x 65535": url("png", png_header(65535, 65535)),
    "a width of 0": url("png", png_header(0, 5)),
    "one pixel more than allowed": url("png", png_header(LIMITS.image_pixels + 1, 1)),
    "a broken checksum": url("png", png_header(5, 5)[:-1] + b"\0"),
    "half a JPEG header": url("jpeg", encoded("jpeg", (9, 9), {})[:60]),
    "a JPEG of 65535 x 65535": url("jpeg", b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" + bytes(9)),
    "a JPEG that goes round": url("jpeg", b"\xff\xd8\xff\xe0\x00\x00" * 9),
    "a WebP of 16384 x 16384": url("webp", b"RIFF\x24\0\0\0WEBPVP8L\x18\0\0\0\x2f\xff\xff\xff\x0f" + bytes(20)),
    "FITS": url("png", b"SIMPLE  =                    T" + bytes(50)),
    "a GIF": "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
    "an SVG": "data:image/svg+xml;base64,PHN2Zy8+",
    "a PNG that says it is a JPEG": url("jpeg", png_header(5, 5)),
    "no base64": "data:image/png;base64,&&&&",
    "percent signs": "data:image/png,%89PNG",
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(BOMBS))
def test_cve_2026_5497_media_bombs_are_refused_by_their_headers(server, what):
    """Also CVE-2026-22773 (1x1), CVE-2026-40192 (FITS), vLLM's pixel bombs: 400, naming the place, in few words."""
    content = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": BOMBS[what]}}]
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=chat([{"role": "user", "content": content}]))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].startswith("messages[0].content[1]"), error
    assert "text only" not in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize("size", [(1, 1), (4000, 4000)])
def test_a_whole_image_reaches_no_decoder_where_the_model_has_no_eyes(server, size):
    picture = url("png", png_header(*size))
    content = [{"type": "image_url", "image_url": {"url": picture, "detail": "low"}}, {"type": "text", "text": "see"}]
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=chat([{"role": "user", "content": content}]))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages[0].content[0]"
        assert "text only" in answer.json()["error"]["message"]
        most = [{"type": "image_url", "image_url": {"url": picture}}] * LIMITS.images
        answer = client.post("/v1/chat/completions", json=chat([{"role": "user", "content": most}]))
        assert "text only" in answer.json()["error"]["message"]
        many = [{"type": "image_url", "image_url": {"url": picture}}] * (LIMITS.images + 1)
        answer = client.post("/v1/chat/completions", json=chat([{"role": "user", "content": many}]))
        assert answer.status_code == 400
        assert f"at most {LIMITS.images}" in answer.json()["error"]["message"]
    for file in Path(hasten.serve.__file__).parent.rglob("*.py"):
        assert "PIL" not in file.read_text(encoding="utf-8")
