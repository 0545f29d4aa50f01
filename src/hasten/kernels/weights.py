"""Packed weights: from stored rows to the layouts of `native/layout.h`, and what can be done with one matrix alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.errors import out_of_range
from hasten.kernels import library
from hasten.kernels.library import ACTIVATIONS, BF16, F32, Q4_0, Q4_1, Q8_0, Matrix, check, native

ALIGN = 64
KINDS = ("int8", "int4", "int4-min")
_BLOCK = 32


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised bytes that start on a cache line."""
    raw = np.empty(nbytes + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + nbytes]


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [rows, cols] in a packed `layout`; `data` uint8 holds it (its own, or a part of a mapped file)."""

    layout: int
    rows: int
    cols: int
    data: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self.data.nbytes

    def ref(self) -> Matrix:
        """The matrix as the library sees it; `self` must outlive it."""
        return Matrix(self.layout, self.rows, self.cols, self.data.ctypes.data, self.data.nbytes)

    def unpack(self, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Rows [len(ids), cols] as float32, exactly the values the kernels multiply with."""
        wanted = np.ascontiguousarray(ids, np.int32)
        out = np.empty((len(wanted), self.cols), np.float32)
        check(native().hasten_unpack_rows(library.matrix_ref(self.ref()), wanted.ctypes.data, len(wanted), out.ctypes.data))
        return out

    def multiply(self, x: NDArray[np.float32], activations: str = "exact") -> NDArray[np.float32]:
        """y [T, rows] = x [T, cols] W^T with these activations: exact (float32) or int8 (one scale per 32)."""
        if activations not in ACTIVATIONS:
            raise out_of_range("activations", activations, " or ".join(ACTIVATIONS))
        if x.ndim != 2 or x.shape[1] != self.cols:
            raise out_of_range("x", x.shape, f"of shape [tokens, {self.cols}]")
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty((len(x), self.rows), np.float32)
        mode = ACTIVATIONS.index(activations)
        check(native().hasten_linear(library.matrix_ref(self.ref()), x.ctypes.data, len(x), mode, y.ctypes.data))
        return y


def packed_bytes(source: int, rows: int, cols: int) -> int:
    """Bytes that a stored type takes when it is packed; raises HastenError for a shape it cannot have."""
    return check(native().hasten_packed_bytes(native().hasten_layout_of(source), rows, cols))


def pack(
    source: int,
    stored: NDArray[np.uint8],
    rows: int,
    cols: int,
    order: NDArray[np.int32] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> Packed:
    """Repack stored rows (bytes of a GGUF tensor, or of float32 / float16 / bfloat16 rows) without changing a value.

    `order` int32 [rows] picks and permutes stored rows. `out` is where to put it (default: new memory).
    """
    size = packed_bytes(source, rows, cols)
    out = aligned(size) if out is None else out
    stored = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    picked = None if order is None else np.ascontiguousarray(order, np.int32)
    code = native().hasten_pack(
        source, stored.ctypes.data, stored.nbytes, rows, cols, None if picked is None else picked.ctypes.data,
        out.ctypes.data, out.nbytes,
    )  # fmt: skip
    check(code)
    return Packed(native().hasten_layout_of(source), rows, cols, out[:size])


def pack_float(weight: NDArray[np.float32], *, bfloat16: bool = False) -> Packed:
    """A float32 matrix [rows, cols], as it is or rounded to bfloat16."""
    rows, cols = weight.shape
    weight = np.ascontiguousarray(weight, np.float32)
    if not bfloat16:
        return pack(F32, weight.view(np.uint8), rows, cols)
    bits = weight.view(np.uint32)
    narrow = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return pack(BF16, narrow.view(np.uint8), rows, cols)


def quantize(weight: NDArray[np.float32], kind: str, group: int = _BLOCK) -> tuple[int, NDArray[np.uint8]]:
    """Round-to-nearest quantisation of `weight` [rows, cols]: (stored type, bytes) for `pack`; lossy.

    `kind`: int8, int4 (symmetric, 8 steps below and 7 above zero) or int4-min (with a minimum). `group` columns share a
    scale, a multiple of 32 that divides `cols`; group = cols is one scale per output channel. Scales are float16.
    Raises ConfigError for other values.
    """
    rows, cols = weight.shape
    if kind not in KINDS:
        raise out_of_range("kind", kind, ", ".join(KINDS))
    if group < _BLOCK or group % _BLOCK or cols % group:
        raise out_of_range("group", group, f"a multiple of {_BLOCK} that divides {cols}")
    grouped = np.ascontiguousarray(weight, np.float32).reshape(rows, cols // group, group)
    low = np.zeros((rows, cols // group, 1), np.float16)
    if kind == "int4-min":
        low = grouped.min(-1, keepdims=True)
        scale = ((grouped.max(-1, keepdims=True) - low) / 15).astype(np.float16)
        low = low.astype(np.float16)
        q = np.rint((grouped - low.astype(np.float32)) / np.where(scale == 0, 1, scale).astype(np.float32)).clip(0, 15)
    else:
        q, scale = nearest(grouped, kind)
        q += 8 if kind == "int4" else 0
    blocks = cols // _BLOCK

    def per_block(values: NDArray[np.float16]) -> NDArray[np.uint8]:
        wide = np.broadcast_to(values, (rows, cols // group, group // _BLOCK))
        return np.ascontiguousarray(wide.reshape(rows, blocks, 1)).view(np.uint8)

    if kind == "int8":
        return Q8_0, np.concatenate((per_block(scale), q.reshape(rows, blocks, _BLOCK).astype(np.int8).view(np.uint8)), -1)
    half = q.reshape(rows, blocks, 2, _BLOCK // 2).astype(np.uint8)
    nibbles = half[:, :, 0] | (half[:, :, 1] << 4)
    if kind == "int4":
        return Q4_0, np.concatenate((per_block(scale), nibbles), -1)
    return Q4_1, np.concatenate((per_block(scale), per_block(low), nibbles), -1)


def nearest(
    grouped: NDArray[np.float32], kind: str, narrow: Callable[[NDArray[np.float16]], NDArray[np.float16]] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """(whole numbers float32 [rows, groups, n], scales [rows, groups, 1]) of symmetric int8 or int4, rounded to nearest.

    A scale maps the largest magnitude of its group to 127, or to -8: the end of 4 bits that has one more step. `narrow`
    rounds scales further than to float16.
    """
    if kind == "int4":
        wide = np.take_along_axis(grouped, np.abs(grouped).argmax(-1, keepdims=True), -1) / -8
        least, most = -8, 7
    else:
        wide = np.abs(grouped).max(-1, keepdims=True) / 127
        least, most = -127, 127
    scale = wide.astype(np.float16)
    scale = scale if narrow is None else narrow(scale)
    q = np.rint(grouped / np.where(scale == 0, 1, scale).astype(np.float32)).clip(least, most)
    return q, scale


def pack_rounded(weight: NDArray[np.float32], kind: str) -> Packed:
    """A float32 matrix [rows, cols] rounded to nearest as `quantize` does, one scale per 32 columns; lossy.

    A matrix whose columns are no multiple of 32 stays float32.
    """
    rows, cols = weight.shape
    if cols % _BLOCK:
        return pack_float(weight)
    source, stored = quantize(weight, kind)
    return pack(source, stored, rows, cols)


def read_bandwidth(nbytes: int = 256 << 20, times: int = 5) -> float:
    """Bytes per second at which all threads together read memory, the best of `times` tries."""
    data = aligned(nbytes)
    data[:] = 1
    seconds = native().hasten_read_bytes(data.ctypes.data, data.nbytes, times)
    return nbytes / max(seconds, 1e-9)


__all__ = ["F32", "Packed", "aligned", "nearest", "pack", "pack_float", "packed_bytes", "quantize", "read_bandwidth"]
