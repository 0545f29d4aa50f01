"""Images of requests, as far as their headers: format and size are known before a byte of the picture is decoded.

Only `data:` URLs of PNG, JPEG and WebP; no other URL is followed. Sizes stand where the formats' specifications put them:
PNG in IHDR (ISO 15948, 11.2.2), JPEG in the first SOF segment (ITU-T T.81, B.2.2), WebP in VP8, VP8L or VP8X (RFC 9649, 2).
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from hasten.engine.limits import LIMITS

_URL = re.compile(r"data:image/(png|jpeg|webp);base64,")
_FORMATS = "a data: URL of a PNG, JPEG or WebP image in base64 (data:image/png;base64,...); no other URL is followed"
_STANDALONE = {0x01, *range(0xD0, 0xD8)}  # JPEG markers without a length
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # frames; the three are tables and an extension


@dataclass(frozen=True, slots=True)
class Picture:
    """An image whose header was read: `kind` png, jpeg or webp, `width` and `height` in pixels, and its bytes."""

    kind: str
    width: int
    height: int
    data: bytes


def read(url: str) -> Picture:
    """The image of a data: URL; raises ValueError for other URLs, broken headers and sizes beyond the limits."""
    match = _URL.match(url)
    if match is None:
        raise ValueError(f"The image must be {_FORMATS}")
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("The image is not base64") from None
    kind = match[1]
    size = {"png": _png, "jpeg": _jpeg, "webp": _webp}[kind](data)
    if size is None:
        raise ValueError(f"The image does not begin as a {kind.upper()} does")
    width, height = size
    if not width or not height or width * height > LIMITS.image_pixels:
        raise ValueError(f"The image has {width} x {height} pixels; 1 to {LIMITS.image_pixels} are allowed")
    return Picture(kind, width, height, data)


def _png(data: bytes) -> tuple[int, int] | None:
    if len(data) < 33 or data[:16] != b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR":
        return None
    if binascii.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return None
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _jpeg(data: bytes) -> tuple[int, int] | None:
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _STANDALONE:  # fill bytes; markers of their own
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _SOF:
            if length < 8 or at + 2 + length > len(data):
                return None
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        if length < 2 or marker in (0xD9, 0xDA):  # the end, or pixels without a frame before them
            return None
        at += 2 + length
    return None


def _webp(data: bytes) -> tuple[int, int] | None:
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None
