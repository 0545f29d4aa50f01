"""Matrices rounded to nearest, as the tensors of a compressed checkpoint: the baseline other compressions are measured by.

int8 and int4 follow the rule of loading with `weights=` (kernels/weights.py `nearest`); scales of int4 may be negative.
int4-min has a whole number as its zero point, as the layout wants it, where loading has a free minimum; its scales keep 7
significant bits, so that scale times zero point is a float16 too and the native stack multiplies the 4-bit blocks as they
stand. Scales are float16; beside weights in bfloat16 they are rounded to that as well, since readers cast them to the
model's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import FormatError
from hasten.kernels.weights import nearest

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How matrices are rounded: `kind` int8, int4 or int4-min; `group` columns share a scale, None for a whole row."""

    kind: str
    group: int | None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.kind == "int8" else 4

    def scheme(self, targets: list[str]) -> dict[str, Any]:
        """The group of `quantization_config` for these targets."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.kind != "int4-min", "dynamic": False,
            "strategy": "channel" if self.group is None else "group", "group_size": self.group,
        }  # fmt: skip
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}

    def tensors(self, module: str, shape: tuple[int, int], scales: str) -> list[tuple[str, str, Shape]]:
        """(name, dtype, shape) of what `encode` gives for a matrix of this shape; `scales` is F16 or BF16."""
        rows, cols = shape
        groups = 1 if self.group is None else cols // self.group
        found: list[tuple[str, str, Shape]] = [
            (f"{module}.weight_packed", "I32", (rows, -(-cols * self.bits // 32))),
            (f"{module}.weight_scale", scales, (rows, groups)),
            (f"{module}.weight_shape", "I64", (2,)),
        ]
        if self.kind == "int4-min":
            found.append((f"{module}.weight_zero_point", "I32", (-(-rows * 4 // 32), groups)))
        return found

    def encode(self, weight: NDArray[np.float32], scales: str) -> tuple[list[NDArray[Any]], NDArray[np.float32]]:
        """(the tensors that `tensors` names, bfloat16 as uint16; the values they stand for float32 [rows, cols]).

        Raises FormatError for weights that are not finite or lie beyond float16.
        """
        rows, cols = weight.shape
        groups = 1 if self.group is None else cols // self.group
        grouped = np.ascontiguousarray(weight, np.float32).reshape(rows, groups, cols // groups)
        zero: NDArray[np.float32] | None = None
        with np.errstate(all="ignore"):
            if self.kind == "int4-min":
                q, scale, zero = _with_zero_point(grouped)
            else:
                q, scale = nearest(grouped, self.kind, _bfloat16 if scales == "BF16" else None)
        if not (np.isfinite(scale).all() and np.isfinite(q).all()):
            raise FormatError("weights are not finite, or beyond float16, and cannot be rounded", field="weights")
        wide = scale.astype(np.float32)
        values = ((q if zero is None else q - zero) * wide).reshape(rows, cols)
        half = 1 << (self.bits - 1)
        codes = (q if zero is not None else q + half).reshape(rows, cols).astype(np.uint8)
        stored = scale if scales == "F16" else (wide.view(np.uint32) >> 16).astype(np.uint16)
        out: list[NDArray[Any]] = [
            _pack(codes, self.bits), stored.reshape(rows, groups), np.array([rows, cols], np.int64)
        ]  # fmt: skip
        if zero is not None:
            points = zero.reshape(rows, groups).astype(np.uint8)
            out.append(np.ascontiguousarray(_pack(np.ascontiguousarray(points.T), 4).T))
        return out, values


def _with_zero_point(
    grouped: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float16], NDArray[np.float32]]:
    """(codes 0..15 [rows, groups, n], scales, zero points 0..15 [rows, groups, 1]); zero itself is always a value."""
    low = np.minimum(grouped.min(-1, keepdims=True), 0)
    high = np.maximum(grouped.max(-1, keepdims=True), 0)
    fraction, exponent = np.frexp(((high - low) / 15).astype(np.float16))
    # up, so that no end of the range is cut off
    scale = np.ldexp(np.ceil(fraction.astype(np.float32) * 128) / 128, exponent).astype(np.float16)
    step = np.where(scale == 0, 1, scale).astype(np.float32)
    zero = np.rint(-low / step).clip(0, 15)
    return (np.rint(grouped / step) + zero).clip(0, 15), scale, zero


def _bfloat16(scale: NDArray[np.float16]) -> NDArray[np.float16]:
    """Rounded to bfloat16's 8 significant bits; float16 has all of these numbers."""
    bits = scale.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float16)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Codes [lines, count] in 32-bit words from the lowest bits up, lines filled up with zeros."""
    lines, count = codes.shape
    each = 32 // bits
    wide = np.zeros((lines, -(-count // each) * each), np.uint8)
    wide[:, :count] = codes
    if bits == 4:
        wide = wide[:, 0::2] | (wide[:, 1::2] << 4)
    return np.ascontiguousarray(wide).view(np.int32)
