"""Safetensors files: a strict header check before anything is allocated, then tensors one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.engine.limits import LIMITS
from hasten.errors import FormatError, UnsupportedError

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_INTEGERS = {"I64": 8, "I32": 4, "I8": 1}  # what compressed checkpoints store
_OTHER = ("I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")


def check_header(path: Path, integers: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape) of a safetensors file whose every claim fits the file.

    `integers`: whether those that compressed weights are made of may be in it. Raises FormatError naming what does not fit,
    UnsupportedError for other types.
    """
    sizes = {**_SIZES, **(_INTEGERS if integers else {})}

    def fail(field: str, problem: str) -> FormatError:
        return FormatError(f"{field} {problem}", path=str(path), field=field)

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise fail("header", "is cut off")
            (length,) = struct.unpack("<Q", head)
            if length > min(LIMITS.header_bytes, size - 8):
                raise fail("header length", f"claims {length} bytes of a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from None
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise fail("header", "is not JSON") from None
    if not isinstance(header, dict) or len(header) > LIMITS.tensors:
        raise fail("header", "is not an object of tensors")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise fail(name, "lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype in _OTHER and dtype not in sizes:
            raise UnsupportedError(
                f"{path}: tensor {name} has type {dtype}; float weights are read", field=name,
                hint="compressed weights are read where config.json has a quantization_config of compressed-tensors",
            )  # fmt: skip
        if dtype not in sizes or not _integers(shape) or not _integers(offsets) or len(offsets) != 2:
            raise fail(name, "has a malformed dtype, shape or data_offsets")
        elements = 1
        for dim in shape:
            elements *= dim
        begin, end = offsets
        if begin > end or end > size - 8 - length or end - begin != elements * sizes[dtype]:
            raise fail(name, f"claims bytes {begin}..{end}, which do not fit its shape or the file")
        spans.append((begin, end, name))
        out[name] = (dtype, tuple(shape))
    at = 0
    for begin, end, name in sorted(spans):
        if begin < at:
            raise fail(name, "overlaps another tensor")
        at = end
    return out


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**48 for v in value)


class Checkpoint:
    """One or more safetensors files read as one: `names`, `dtypes`, total `nbytes`, and `read(name)`."""

    def __init__(self, files: Iterable[Path], integers: bool = False) -> None:
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in files:
            for name, entry in check_header(path, integers).items():
                if name in self._where:
                    raise FormatError(f"tensor {name} is stored twice", path=str(path), field=name)
                self._where[name], self.shapes[name] = path, entry

    @property
    def names(self) -> list[str]:
        """Stored tensor names."""
        return list(self._where)

    @property
    def dtype(self) -> torch.dtype:
        """The type most weights are stored in."""
        kinds = [dtype for dtype, _ in self.shapes.values()]
        common = max(set(kinds), key=kinds.count) if kinds else "F32"
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(common, torch.float32)

    def read(self, name: str) -> Tensor:
        """One tensor as stored; raises FormatError when the file is damaged."""
        path = self._where[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(str(path), "pt")
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"tensor {name} cannot be read: {str(error)[:200]}", path=str(path), field=name) from None


class Named:
    """Stored tensors by their released names without the wrapper's prefix, and which of them have been used."""

    _PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.")

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._stored = {self._short(name): name for name in names}
        self._used: set[str] = set()

    @classmethod
    def _short(cls, name: str) -> str:
        return next((name[len(prefix) :] for prefix in cls._PREFIXES if name.startswith(prefix)), name)

    def take(self, name: str) -> Tensor:
        """One tensor as stored; raises FormatError when it is missing."""
        if name not in self._stored:
            raise FormatError(f"weights: tensor {name} is missing", field=name)
        self._used.add(name)
        tensor = self._read(self._stored[name])
        if not tensor.ndim:
            raise FormatError(f"weights: tensor {name} is a single number", field=name)
        return tensor

    def fuse(self, *parts: str) -> Tensor:
        """The rows of several tensors, one after another."""
        tensors = [self.take(part) for part in parts]
        if len({tuple(t.shape[1:]) for t in tensors}) != 1:
            raise FormatError(f"weights: {', '.join(parts)} have different widths", field=parts[0])
        return torch.cat(tensors)

    def stack(self, entries: Sequence[Sequence[str]]) -> Tensor:
        """[entries, rows, columns]: every entry is the rows of several tensors; one entry is read at a time."""
        first = self.fuse(*entries[0])
        out = first.new_empty(len(entries), *first.shape)
        for i, parts in enumerate(entries):
            one = first if i == 0 else self.fuse(*parts)
            if one.shape != first.shape:
                raise FormatError(f"weights: {parts[0]} has another shape than {entries[0][0]}", field=parts[0])
            out[i] = one
        return out

    @property
    def names(self) -> Iterable[str]:
        """Released names without the prefix."""
        return self._stored.keys()

    def skip(self, name: str) -> None:
        """Let a tensor be there or not."""
        self._used.add(name)

    def finish(self) -> None:
        """Raise FormatError naming stored tensors that nothing used."""
        left = sorted(set(self._stored) - self._used)
        if left:
            raise FormatError(f"weights: tensors without a place in the model: {', '.join(left[:6])}", field="weights")


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, through its index when there is one.

    Raises FormatError for a broken index, UnsupportedError when there are only pickled weights.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(table.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise FormatError("not an index of weights", path=str(index)) from None
        files = []
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
                raise FormatError(f"names {name!r:.80}, which is not in the directory", path=str(index), field="weight_map")
            files.append(directory / name)
        return files
    if single.is_file():
        return [single]
    pickled = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        raise UnsupportedError(
            f"{directory} holds only pickled weights ({pickled[0]}), which can run code and are never opened",
            hint="convert them: model.save_pretrained(dir) of current transformers writes safetensors",
        )
    raise FormatError("holds no model.safetensors", path=str(directory))
