"""Compressed checkpoints: directories in the layout of compressed-tensors, which vLLM and transformers load too.

config.json says in `quantization_config` how the weights were rounded; a rounded matrix X [rows, cols] is stored as

    X.weight_packed      int32 [rows, cols * bits / 32]   codes q + 2^(bits - 1) from the lowest bits of a word up
    X.weight_scale       float [rows, groups]             one group per row (strategy channel) or per `group_size` columns
    X.weight_shape       int64 [2]                        rows and columns
    X.weight_zero_point  int32 [rows * bits / 32, groups] asymmetric ones only, packed along the rows
    X.weight_g_idx       int32 [cols]                     group of every column; only the plain order is read

and stands for scale * (q - zero point). The formats int-quantized and naive-quantized store q as int8 in X.weight and zero
points unpacked. Source: compressed-tensors 0.20.1, with whose compressor and decompressor this file was compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import FormatError, UnsupportedError
from hasten.kernels.library import Q4_0, Q4_1, Q8_0
from hasten.models.checkpoint import Checkpoint
from hasten.models.scheme import Quantisation, Scheme

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_FLOATS = ("F16", "BF16", "F32")
_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Rounded:
    """A rounded matrix [rows, cols] as it is stored: `codes` uint8 [rows, bytes of a row], `scale` float32 [rows, groups].

    `zero` int16 [rows, groups] are the zero points of asymmetric ones. Values are scale * (code - zero).
    """

    scheme: Scheme
    cols: int
    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.int16] | None

    def take(self, rows: NDArray[np.int64]) -> Rounded:
        """These rows, in this order; nothing is copied when they are all of them as they stand."""
        if len(rows) == len(self.codes) and (rows == np.arange(len(rows))).all():
            return self
        zero = None if self.zero is None else self.zero[rows]
        return Rounded(self.scheme, self.cols, self.codes[rows], self.scale[rows], zero)

    def integers(self) -> NDArray[np.int16]:
        """Codes minus zero points [rows, cols]: what the scales multiply."""
        q: NDArray[Any]
        if self.scheme.bits == 4:
            pairs = np.stack((self.codes & 15, self.codes >> 4), -1).reshape(len(self.codes), -1)
            q = pairs[:, : self.cols].astype(np.int16) - 8
        elif self.scheme.packed:
            q = self.codes[:, : self.cols].astype(np.int16) - 128
        else:
            q = self.codes.view(np.int8).astype(np.int16)
        if self.zero is not None:
            groups = self.zero.shape[1]
            q = (q.reshape(len(q), groups, -1) - self.zero[:, :, None]).reshape(len(q), self.cols)
        return np.asarray(q, np.int16)

    def decode(self) -> NDArray[np.float32]:
        """The values float32 [rows, cols], each product rounded once."""
        groups = self.scale.shape[1]
        whole = self.integers().reshape(len(self.codes), groups, -1).astype(np.float32)
        with np.errstate(over="ignore"):
            whole *= self.scale[:, :, None]
        return whole.reshape(len(self.codes), self.cols)

    def blocks(self) -> tuple[int, NDArray[np.uint8]] | None:
        """(stored type, bytes) for `kernels.weights.pack` with the same values; None where no block type has them.

        Blocks are of 32 columns with a scale in float16, so every scale must be one. Symmetric 4 bits become Q4_0, 8 bits
        Q8_0. Asymmetric 4 bits become Q4_1, whose minimum is -scale * zero point in float16 - or Q8_0 with the integers
        code - zero point, where a minimum is no float16. Asymmetric 8 bits have none: their integers need 9 bits.
        """
        groups = self.scale.shape[1]
        width = self.cols // groups
        if width % _BLOCK or (self.scheme.bits == 8 and self.zero is not None):
            return None
        scale = _half(self.scale)
        if scale is None:
            return None
        rows, count = len(self.codes), self.cols // _BLOCK
        parts: list[NDArray[np.float16]] = [scale]
        source, least = Q4_0, None if self.zero is None else _half(-self.scale * (self.zero + 8))
        if self.scheme.bits == 4 and least is not None:
            source, parts = Q4_1, [scale, least]
        if self.scheme.bits == 4 and (self.zero is None or least is not None):
            quants = _halves(self.codes.reshape(rows, count, _BLOCK // 2))
        else:
            source = Q8_0
            packed = self.scheme.bits == 8 and self.scheme.packed
            signed = self.codes[:, : self.cols] ^ 128 if packed else self.integers().astype(np.int8)
            quants = np.ascontiguousarray(signed).view(np.uint16).reshape(rows, count, _BLOCK // 2)
        out = np.empty((rows, count, len(parts) + quants.shape[2]), np.uint16)
        for i, part in enumerate(parts):
            out[:, :, i] = np.repeat(part.view(np.uint16), width // _BLOCK, 1)
        out[:, :, len(parts) :] = quants
        return source, out.reshape(rows, -1).view(np.uint8)


def _half(values: NDArray[np.float32]) -> NDArray[np.float16] | None:
    """The same numbers in float16, None unless it has all of them."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    return narrow if np.array_equal(narrow.astype(np.float32), values) else None


def _halves(codes: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """[rows, blocks, 8]: from nibbles in pairs (columns 2 j, 2 j + 1 share a byte) to halves (columns j, 16 + j do)."""
    words = np.ascontiguousarray(codes).view(np.uint64)
    first, second = words[:, :, 0], words[:, :, 1]
    low, high, four = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(4)
    even = (first & low) | ((second & low) << four)
    odd = ((first & high) >> four) | (second & high)
    out = odd.view(np.uint8).astype(np.uint16)
    out <<= 8
    out |= even.view(np.uint8)
    return out.reshape(*even.shape, 8)


def _unpack(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.int16]:
    """Signed integers [lines, count] from packed 32-bit words [lines, words]."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if bits == 4:
        raw = np.stack((raw & 15, raw >> 4), -1).reshape(len(words), -1)
    return raw[:, :count].astype(np.int16) - (1 << (bits - 1))


# --- the files ---


class CompressedCheckpoint:
    """The weight files of a compressed checkpoint: `names` as in a plain one, and matrices rounded or decoded.

    Every claim of the headers and of `quantization_config` is checked before a weight is read. Raises FormatError naming
    the tensor, UnsupportedError for what is not read.
    """

    def __init__(self, files: Iterable[Path], how: Quantisation) -> None:
        self._stored = Checkpoint(files, integers=True)
        shapes = self._stored.shapes
        self._rounded: dict[str, tuple[Scheme, int, int]] = {}  # weight's name -> scheme, rows, cols
        parts = {name for name in shapes if name.rpartition(".")[2] in _PARTS}
        for name, (dtype, shape) in shapes.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight_packed" or (leaf == "weight" and dtype == "I8"):
                self._rounded[f"{module}.weight"] = self._module(module, leaf, shape, how.scheme_of(module))
                parts -= {f"{module}.{part}" for part in _PARTS}
        if parts:
            raise FormatError(f"tensor {min(parts)} belongs to no compressed weight", field=min(parts))
        self._names = [name for name in shapes if name.rpartition(".")[2] not in _PARTS]
        self._names += [name for name in self._rounded if name not in shapes]
        for name in self._names:
            dtype = shapes[name][0] if name in shapes else "I8"
            if name not in self._rounded and dtype not in (*_FLOATS, "F64"):
                raise UnsupportedError(f"tensor {name} has type {dtype}, and is no compressed weight", field=name)
        self._index = {name: i for i, name in enumerate(self._names)}

    def _module(self, module: str, leaf: str, shape: tuple[int, ...], scheme: Scheme) -> tuple[Scheme, int, int]:
        """Check the tensors of one rounded matrix; (scheme, rows, cols)."""
        shapes = self._stored.shapes

        def part(name: str, types: tuple[str, ...], allowed: tuple[tuple[int, ...], ...]) -> None:
            full = f"{module}.{name}"
            if full not in shapes:
                raise FormatError(f"tensor {full} is missing", field=full)
            dtype, found = shapes[full]
            if dtype not in types or found not in allowed:
                known = " or ".join(map(str, allowed))
                raise FormatError(
                    f"tensor {full} is {dtype} {found}, not {' or '.join(types)} of shape {known}", field=full
                )

        full = f"{module}.{leaf}"
        if scheme.packed != (leaf == "weight_packed"):
            raise FormatError(f"tensor {full} does not go with the format that quantization_config names", field=full)
        if len(shape) != 2 or 0 in shape:
            raise FormatError(f"tensor {full} has shape {shape}, not rows and columns", field=full)
        rows, cols = shape
        if scheme.packed:
            if f"{module}.weight" in shapes:
                raise FormatError(f"{module} is stored twice, plain and compressed", field=f"{module}.weight")
            part("weight_shape", ("I64", "I32"), ((2,),))
            claimed = self._stored.read(f"{module}.weight_shape").tolist()
            words = -(-claimed[1] * scheme.bits // 32)
            if shapes[full] != ("I32", (claimed[0], words)) or claimed[1] < 1:
                raise FormatError(f"tensor {full} is {shapes[full]}, which does not hold a matrix {claimed}", field=full)
            cols = claimed[1]
        groups = 1 if scheme.group is None else cols // scheme.group
        if scheme.group is not None and cols % scheme.group:
            raise FormatError(f"{module} has {cols} columns, no multiple of group_size {scheme.group}", field="group_size")
        one: tuple[tuple[int, ...], ...] = ((rows, groups), (rows,)) if groups == 1 else ((rows, groups),)
        if scheme.whole:
            one = ((), (1,), (1, 1))
        part("weight_scale", _FLOATS, one)
        if not scheme.symmetric or f"{module}.weight_zero_point" in shapes:
            packed = (-(-rows * scheme.bits // 32), groups)
            if scheme.packed and not scheme.whole and shapes.get(f"{module}.weight_zero_point", ("",))[0] == "I32":
                part("weight_zero_point", ("I32",), (packed,))
            else:
                part("weight_zero_point", ("I8",), one)
        if f"{module}.weight_g_idx" in shapes:
            part("weight_g_idx", ("I32", "I64"), ((cols,),))
        return scheme, rows, cols

    @property
    def names(self) -> list[str]:
        """Names of the weights as in a plain checkpoint."""
        return self._names

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as the native stack keeps them, at least: 4 a weight where no block type can have them."""
        total = 0.0
        for name in self._names:
            if name not in self._rounded:
                dtype, shape = self._stored.shapes[name]
                total += math.prod(shape) * (2 if dtype == "BF16" else 4)
                continue
            scheme, rows, cols = self._rounded[name]
            wide = (scheme.group or cols) % _BLOCK or (scheme.bits == 8 and not scheme.symmetric)
            total += rows * cols * 4 if wide else rows * cols * (4.5 if scheme.bits == 4 else 8.5) // 8
        return int(total)

    @property
    def largest(self) -> int:
        """Number of weights of the largest tensor."""
        sizes = [rows * cols for _, rows, cols in self._rounded.values()]
        return max(sizes + [math.prod(shape) for _, shape in self._stored.shapes.values()], default=0)

    def read(self, name: str) -> Tensor:
        """One weight as values: rounded ones decoded to float32, others as stored."""
        matrix = self.matrix(name)
        return self._stored.read(name) if matrix is None else torch.from_numpy(matrix.decode())

    def matrix(self, name: str) -> Rounded | None:
        """One rounded matrix; None for a weight that is stored plain. Raises FormatError for scales that are no numbers."""
        if name not in self._rounded:
            return None
        scheme, rows, cols = self._rounded[name]
        module = name.removesuffix(".weight")
        scale = self._stored.read(f"{module}.weight_scale").float().numpy()
        groups = 1 if scheme.group is None else cols // scheme.group
        if not np.isfinite(scale).all():
            raise FormatError(f"tensor {module}.weight_scale holds numbers that are not finite", field="weight_scale")
        scale = np.ascontiguousarray(np.broadcast_to(scale.reshape(-1, groups), (rows, groups)))
        codes = self._stored.read(f"{module}.weight_packed" if scheme.packed else name).numpy()
        self._plain_order(module, cols, scheme)
        zero = self._zero(module, rows, groups, scheme)
        return Rounded(scheme, cols, np.ascontiguousarray(codes).view(np.uint8).reshape(rows, -1), scale, zero)

    def _zero(self, module: str, rows: int, groups: int, scheme: Scheme) -> NDArray[np.int16] | None:
        name = f"{module}.weight_zero_point"
        if name not in self._stored.shapes:
            return None
        words = self._stored.read(name).numpy()
        if words.dtype == np.int32:
            zero = np.ascontiguousarray(_unpack(np.ascontiguousarray(words.T), scheme.bits, rows).T)
        else:
            zero = np.ascontiguousarray(np.broadcast_to(words.reshape(-1, groups), (rows, groups))).astype(np.int16)
        if scheme.symmetric:
            if zero.any():
                raise FormatError(f"tensor {name} is not zero, but quantization_config says symmetric", field=name)
            return None
        half = 1 << (scheme.bits - 1)
        if zero.min() < -half or zero.max() >= half:
            raise FormatError(f"tensor {name} holds values outside {scheme.bits} bits", field=name)
        return zero

    def _plain_order(self, module: str, cols: int, scheme: Scheme) -> None:
        """Refuse columns whose groups are not one after another; an order of -1 is one that was never set."""
        name = f"{module}.weight_g_idx"
        if name in self._stored.shapes:
            order = self._stored.read(name).numpy()
            if not (np.array_equal(order, np.arange(cols) // (scheme.group or cols)) or (order == -1).all()):
                raise UnsupportedError(
                    f"tensor {name} gives columns an order of their own, which is not read",
                    hint="round the model again without activation ordering, or with actorder='weight'",
                    field="weight_g_idx",
                )

    # --- where the rows of a model's own matrices lie ---

    def rows(self, name: str) -> Tensor:
        """In place of a matrix [rows, cols] its row ids int64 [rows, 1], which can be joined and cut; vectors as stored."""
        shape = self._rounded[name][1:] if name in self._rounded else self._stored.shapes[name][1]
        if len(shape) == 1:
            return self._stored.read(name)
        if len(shape) != 2:
            raise FormatError(f"tensor {name} has shape {shape}", field=name)
        return (torch.arange(shape[0]) + (self._index[name] << 32))[:, None]

    def find(self, ids: Tensor) -> tuple[str, NDArray[np.int64], int]:
        """(name of a weight, its rows in order, its columns) for row ids of one weight; raises FormatError for several."""
        flat = ids.reshape(-1).numpy()
        names = set((flat >> 32).tolist()) if len(flat) else set()
        if len(names) != 1:
            raise FormatError(f"rows of {len(names)} weights stand in for one matrix", field="weights")
        name = self._names[names.pop()]
        cols = self._rounded[name][2] if name in self._rounded else self._stored.shapes[name][1][1]
        return name, flat & 0xFFFFFFFF, cols
