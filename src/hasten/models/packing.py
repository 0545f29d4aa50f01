"""Weights for the native stack: packed from a GGUF file, a compressed checkpoint or tensors; kept on disk, mapped, for the
next time.

A packed file: magic, length of the header, header (JSON: what it was made from, then name, kind, shape, offset and bytes
of every entry), then the entries, each on a cache line. Matrices are in the layouts of `kernels/native/layout.h`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import FormatError, HastenError
from hasten.kernels.library import ABI, BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_0, Q6_K, Q8_0
from hasten.kernels.weights import ALIGN, Packed, pack, pack_float, pack_rounded
from hasten.models.compressed import CompressedCheckpoint
from hasten.models.config import ModelConfig
from hasten.models.fetch import cache_dir
from hasten.models.gguf import GGUFFile

_MAGIC = b"hastenpk"
_HEADER = 1 << 24  # bytes a header may have at most
WORTH = 8 << 20  # bytes of a model from which keeping its packed form pays
_STORED = {"F32": F32, "F16": F16, "Q4_0": Q4_0, "Q4_1": Q4_1, "Q5_0": Q5_0, "Q8_0": Q8_0, "Q4_K": Q4_K, "Q6_K": Q6_K}
_PLAIN = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Weights:
    """What a native stack multiplies with: packed `matrices` and float32 `vectors`, by the names of `matrix_shapes`."""

    matrices: dict[str, Packed] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    keep: Any = None  # the mapped file that the arrays are views of

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, a shared embedding counted once."""
        distinct = {one.data.ctypes.data: one.nbytes for one in self.matrices.values()}
        return sum(distinct.values()) + sum(one.nbytes for one in self.vectors.values())


def gap(config: ModelConfig) -> str | None:
    """What of a config the native stack does not compute, in words; None when it runs the whole of it."""
    if config.experts is not None and config.experts.first < len(config.layers):
        return "layers with experts"
    if config.qk_norm_whole:
        return "norms over all heads of q and k together"
    return "bias in the output layer" if config.head_bias else None


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> (rows, columns) of every matrix of a stack."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = {"embed": (c.vocab_size, c.hidden), "head": (c.vocab_size, c.hidden)}
    per_layer = {
        "q": (q, c.hidden), "k": (kv, c.hidden), "v": (kv, c.hidden), "out": (c.hidden, q),
        "gate": (c.ffn, c.hidden), "up": (c.ffn, c.hidden), "down": (c.hidden, c.ffn),
    }  # fmt: skip
    return shapes | {f"layers.{i}.{name}": shape for i in range(len(c.layers)) for name, shape in per_layer.items()}


# --- from a GGUF file, without changing a value ---

_FUSED = {"qkv.weight": ("q", "k", "v"), "gate_up.weight": ("gate", "up")}


def from_gguf(
    file: GGUFFile,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    rounded: str = "stored",
    progress: Progress | None = None,
) -> Weights:
    """Packed weights of a GGUF file as they are stored, or rounded to bfloat16 (`dtype`) or as `rounded` says.

    Types that have no layout are expanded to float32. Raises FormatError as `GGUFFile.state` does.
    """
    done = Weights()
    shapes, lengths = matrix_shapes(config), vector_shapes(config)
    total, read = config.parameters, 0
    for name, parts in file.places(config).items():
        if name in lengths:
            values = file.parameter(parts, config)
            if values.shape != lengths[name]:
                raise FormatError(f"tensor {parts[0]} has shape {values.shape}", path=str(file.path), field=parts[0])
            done.vectors[name] = values
            continue
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        for stored, own in zip(parts, _FUSED.get(f"{last}.weight", (last,)), strict=True):
            place = f"{prefix}.{own}" if prefix else own
            done.matrices[place] = _pack_stored(file, stored, place, shapes[place], config, dtype, rounded)
            read += shapes[place][0] * shapes[place][1]
        if progress is not None:
            progress(f"packing {file.path.name}", min(read, total), total)
    if config.tied:
        done.matrices["head"] = done.matrices["embed"]
    return done


def _pack_stored(
    file: GGUFFile,
    name: str,
    place: str,
    shape: tuple[int, int],
    config: ModelConfig,
    dtype: torch.dtype | None,
    rounded: str,
) -> Packed:
    info = file.tensors.get(name)
    if info is None or info.shape != shape:
        found = "missing" if info is None else f"of shape {info.shape}"
        raise FormatError(f"tensor {name} is {found}, not {shape}", path=str(file.path), field=name)
    source, order = _STORED.get(info.type.name), file.row_order(name, config)
    if source is not None and dtype != torch.bfloat16 and rounded == "stored":
        return pack(source, file.raw(name), *shape, order)
    values = file.dequantize(name).astype(np.float32, copy=False)
    return _pack_values(place, values if order is None else values[order], dtype, rounded)


def _pack_values(place: str, values: NDArray[np.float32], dtype: torch.dtype | None, rounded: str) -> Packed:
    """A float matrix in `dtype`, or rounded; embeddings and output rows keep 8 bits."""
    if rounded == "stored":
        return pack_float(values, bfloat16=dtype == torch.bfloat16)
    return pack_rounded(values, "int8" if place in ("embed", "head") else rounded)


# --- from tensors under hasten's own names (models/config.py) ---


def from_state(
    config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, rounded: str = "stored"
) -> Weights:
    """Packed weights of float tensors in `dtype` (float32 or bfloat16), or rounded as told, one tensor at a time.

    Raises FormatError naming every missing, unexpected or wrongly shaped tensor.
    """
    done, problems = Weights(), _Problems(config)
    for name, tensor in tensors:
        values = tensor.detach().float().numpy()
        if _vector(done, problems, name, values):
            continue
        for own, at in _pieces(config, name, len(values)):
            if problems.fits(own, name, values[at].shape):
                done.matrices[own] = _pack_values(own, values[at], dtype, rounded)
    return _whole(done, problems)


def from_compressed(
    config: ModelConfig,
    places: Iterable[tuple[str, Tensor]],
    stored: CompressedCheckpoint,
    dtype: torch.dtype | None = None,
    rounded: str = "stored",
    progress: Progress | None = None,
) -> Weights:
    """Packed weights of a compressed checkpoint: its blocks as they are, or rounded as `from_gguf` does.

    `places` are our names with row ids in place of matrices (`CompressedCheckpoint.rows`). What no block type can hold
    exactly becomes float32. Raises FormatError as `from_state` does.
    """
    done, problems, read = Weights(), _Problems(config), 0
    for name, tensor in places:
        if _vector(done, problems, name, tensor if tensor.dtype == torch.int64 else tensor.detach().float().numpy()):
            continue
        if tensor.ndim != 2:
            problems.found.append(f"{name} has shape {tuple(tensor.shape)}")
            continue
        for own, at in _pieces(config, name, len(tensor)):
            source, rows, cols = stored.find(tensor[at])
            if problems.fits(own, name, (len(rows), cols)):
                done.matrices[own] = _pack_compressed(own, stored, source, rows, dtype, rounded)
                read += len(rows) * cols
        if progress is not None:
            progress("packing", min(read, config.parameters), config.parameters)
    return _whole(done, problems)


def _pack_compressed(
    place: str,
    stored: CompressedCheckpoint,
    name: str,
    rows: NDArray[np.int64],
    dtype: torch.dtype | None,
    rounded: str,
) -> Packed:
    matrix = stored.matrix(name)
    if matrix is None:
        values = stored.read(name)
        if len(rows) != len(values) or (rows != np.arange(len(rows))).any():
            values = values[torch.from_numpy(rows)]
        source = _PLAIN.get(values.dtype)
        if source is not None and rounded == "stored" and dtype != torch.bfloat16 and (dtype is None or source != BF16):
            return pack(source, values.contiguous().view(torch.uint8).numpy(), *values.shape)
        return _pack_values(place, values.float().numpy(), dtype, rounded)
    matrix = matrix.take(rows)
    blocks = matrix.blocks() if dtype != torch.bfloat16 and rounded == "stored" else None
    if blocks is not None:
        return pack(*blocks, len(rows), matrix.cols)
    return _pack_values(place, matrix.decode(), dtype, rounded)


class _Problems:
    """What does not fit while the weights of a stack are gathered."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.found = config, list[str]()
        self.matrices, self.vectors = matrix_shapes(config), vector_shapes(config)

    def fits(self, own: str, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a matrix of this shape has a place."""
        if self.matrices.get(own) != shape:
            self.found.append(f"{name} has shape {shape}" if own in self.matrices else f"unexpected {name}")
            return False
        return True


def _vector(done: Weights, problems: _Problems, name: str, values: Any) -> bool:
    """Take up a norm or a bias; False for a matrix."""
    expected = problems.vectors
    if not name.endswith(".bias") and name not in expected:
        return False
    if expected.get(name) != tuple(values.shape):
        problems.found.append(f"{name} has shape {tuple(values.shape)}, not {expected.get(name)}")
    done.vectors[name] = np.ascontiguousarray(values)
    return True


def _pieces(config: ModelConfig, name: str, rows: int) -> Iterator[tuple[str, slice]]:
    """The matrices that a parameter of ours is made of, and which of its rows each has."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    fused = {"qkv": (("q", q), ("k", kv), ("v", kv)), "gate_up": (("gate", c.ffn), ("up", c.ffn))}
    prefix, _, last = name.rpartition(".")[0].rpartition(".")
    at = 0
    for part, size in fused.get(last, ((last, rows),)):
        yield f"{prefix}.{part}" if prefix else part, slice(at, at + size)
        at += size


def _whole(done: Weights, problems: _Problems) -> Weights:
    """The weights, if nothing is missing or wrong; raises FormatError."""
    if problems.config.tied and "embed" in done.matrices:
        done.matrices["head"] = done.matrices["embed"]
    found = problems.found + [
        f"missing {name}"
        for name in (*problems.matrices, *problems.vectors)
        if name not in done.matrices and name not in done.vectors
    ]
    if found:
        shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
        raise FormatError(f"weights do not fit a {problems.config.family} model: {shown}", field="weights")
    return done


def vector_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Name (as in models/config.py) -> (length,) of every norm and bias of a stack."""
    c = config
    shapes: dict[str, tuple[int]] = {"norm.weight": (c.hidden,)}
    for i in range(len(c.layers)):
        own = {"attn_norm.weight": c.hidden, "ffn_norm.weight": c.hidden}
        if c.sandwich_norms:
            own |= {"post_attn_norm.weight": c.hidden, "post_ffn_norm.weight": c.hidden}
        if c.qk_norm:
            own |= {"q_norm.weight": c.head_dim, "k_norm.weight": c.head_dim}
        if c.qkv_bias:
            own["qkv.bias"] = (c.heads + 2 * c.kv_heads) * c.head_dim
        if c.out_bias:
            own["out.bias"] = c.hidden
        if c.ffn_bias:
            own |= {"gate_up.bias": 2 * c.ffn, "down.bias": c.hidden}
        shapes |= {f"layers.{i}.{name}": (size,) for name, size in own.items()}
    return shapes


# --- packed files ---


def cached(path: Path, how: str, make: Callable[[], Weights], config: ModelConfig) -> Weights:
    """The packed weights of the model file or folder `path`, mapped from the cache folder, made and written at first use.

    They are found by the SHA-256 of the weight files and `how` they were packed, so a changed file is packed anew. A cache
    that cannot be written or read is no error: the weights are then made in memory.
    """
    parts = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if sum(part.stat().st_size for part in parts) < WORTH:
        return make()
    digest = hashlib.sha256(f"{ABI} {how}".encode())
    for part in parts:
        with part.open("rb") as file:
            digest.update(_digest(file))
    place = cache_dir() / "packed" / f"{digest.hexdigest()[:32]}.hpk"
    if place.is_file():
        try:
            return read(place, config)
        except (FormatError, OSError):
            place.unlink(missing_ok=True)
    weights = make()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write(weights, place)
        return read(place, config)
    except (OSError, HastenError):
        return weights


def _digest(file: Any) -> bytes:
    digest = hashlib.sha256()
    while part := file.read(1 << 22):
        digest.update(part)
    return digest.digest()


def write(weights: Weights, path: Path) -> None:
    """Write a packed file, at once or not at all."""
    entries: list[dict[str, Any]] = []
    places: dict[int, int] = {}
    at = 0
    parts: list[NDArray[np.uint8]] = []

    def place(data: NDArray[Any]) -> int:
        nonlocal at
        key = data.ctypes.data
        if key not in places:
            places[key] = at
            parts.append(data.reshape(-1).view(np.uint8))
            at += -(-data.nbytes // ALIGN) * ALIGN
        return places[key]

    for name, m in weights.matrices.items():
        entries.append(
            {"name": name, "layout": m.layout, "rows": m.rows, "cols": m.cols, "at": place(m.data), "bytes": m.nbytes}
        )
    for name, v in weights.vectors.items():
        entries.append({"name": name, "length": len(v), "at": place(v), "bytes": v.nbytes})
    header = json.dumps({"abi": ABI, "entries": entries}).encode()
    header += b" " * (-(len(_MAGIC) + 8 + len(header)) % ALIGN)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(_MAGIC + struct.pack("<Q", len(header)) + header)
        for data in parts:
            file.write(data.data)
            file.write(b"\0" * (-data.nbytes % ALIGN))
    part.replace(path)


def read(path: Path, config: ModelConfig) -> Weights:
    """Map a packed file; raises FormatError unless it holds exactly the weights that `config` asks for."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise FormatError("is empty", path=str(path))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    whole = np.frombuffer(data, np.uint8)
    start = len(_MAGIC) + 8
    if len(data) < start or data[: len(_MAGIC)] != _MAGIC:
        raise FormatError("is no packed file", path=str(path))
    (length,) = struct.unpack_from("<Q", data, len(_MAGIC))
    if length > _HEADER or start + length > len(data):
        raise FormatError(f"claims a header of {length} bytes", path=str(path))
    try:
        header = json.loads(data[start : start + length])
        entries = {str(one["name"]): one for one in header["entries"]}
        abi = header["abi"]
    except (ValueError, KeyError, TypeError):
        raise FormatError("has a damaged header", path=str(path)) from None
    shapes, vectors = matrix_shapes(config), vector_shapes(config)
    if abi != ABI or set(entries) != {*shapes, *vectors}:
        raise FormatError("holds other weights than the model has", path=str(path))
    done, base = Weights(keep=data), start + length
    for name, one in entries.items():
        numbers = [one.get(key, 0) for key in ("layout", "rows", "cols", "at", "bytes", "length")]
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in numbers):
            raise FormatError(f"entry {name} is damaged", path=str(path))
        layout, rows, cols, at, nbytes, length = numbers
        if at % ALIGN or base + at + nbytes > len(data):
            raise FormatError(f"entry {name} claims bytes {at}..{at + nbytes}", path=str(path))
        view = whole[base + at : base + at + nbytes]
        if name in vectors:
            if (length,) != vectors[name] or nbytes != 4 * length:
                raise FormatError(f"entry {name} has {length} numbers", path=str(path))
            done.vectors[name] = view.view(np.float32)
        else:
            if (rows, cols) != shapes[name]:
                raise FormatError(f"entry {name} is {rows} x {cols}", path=str(path))
            done.matrices[name] = Packed(layout, rows, cols, view)
    return done
