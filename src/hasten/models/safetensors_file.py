"""Reading safetensors checkpoints, single or sharded: every number of a header is checked before anything is allocated.

Format: 8 bytes little-endian header length N, N bytes of JSON (name -> dtype, shape, data_offsets), then the data, which
the tensors cover without gap or overlap. Tensors are read one at a time when asked for, straight into their own memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.engine.limits import LIMITS
from hasten.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

# safetensors name -> (torch name, bytes per element)
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = "model.safetensors.index.json"
CONVERT_HINT = (
    "hasten reads safetensors and GGUF only; convert once, where you trust the file, with transformers: "
    "AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: torch dtype name, shape, first byte in `path` and number of bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key appears twice")
    return out


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `data`; raises FormatError naming `path` unless it is UTF-8 JSON whose keys are unique."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise FormatError("JSON is nested too deeply", path=str(path), hint="the file is damaged") from None
    except ValueError as error:  # bad UTF-8, bad JSON, repeated keys, numbers of thousands of digits
        raise FormatError(
            f"not valid JSON: {_shown(str(error))}", path=str(path), hint="fetch the file again"
        ) from None
    if not isinstance(value, dict):
        raise FormatError(f"JSON holds a {type(value).__name__}, not an object", path=str(path))
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a config file; raises FormatError when it is missing, larger than `limits.config_bytes` or bad."""
    try:
        if not path.is_file():
            raise FormatError("file not found", path=str(path), hint="a model directory needs config.json")
        with path.open("rb") as file:
            data = file.read(LIMITS.config_bytes + 1)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from None
    if len(data) > LIMITS.config_bytes:
        raise FormatError(f"is larger than {LIMITS.config_bytes} bytes", path=str(path), field="limits.config_bytes")
    return parse_json(data, path)


def _natural(value: object) -> bool:
    # the upper bound keeps products of sizes printable; no file is that large
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**48


def _entry(name: str, entry: object, path: Path, start: int, available: int) -> TensorInfo:
    """One header entry, checked against the `available` data bytes that begin at file offset `start`."""

    def bad(why: str) -> FormatError:
        return FormatError(f"tensor {_shown(name)}: {why}", path=str(path), hint="the file is damaged; fetch it again")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("its header entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise bad(f"dtype = {_shown(dtype)} is unknown; known: {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > LIMITS.tensor_dims or not all(map(_natural, shape)):
        raise bad(f"shape = {_shown(shape)} must be at most {LIMITS.tensor_dims} sizes >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise bad(f"data_offsets = {_shown(offsets)} must be two offsets >= 0")
    begin, end = offsets
    if not begin <= end <= available:
        raise bad(f"data_offsets = {_shown(offsets)} lie outside the file's {available} data bytes")
    torch_name, size = _DTYPES[dtype]
    for n in shape:
        size *= n
    if size != end - begin:
        raise bad(f"shape {_shown(shape)} of {dtype} needs {size} bytes, data_offsets hold {end - begin}")
    return TensorInfo(name, torch_name, tuple(shape), path, start + begin, size)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of one safetensors file by name; raises FormatError on any inconsistency with the file itself."""
    try:
        if not path.is_file():
            raise FormatError("file not found", path=str(path))
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(LIMITS.header_bytes, total - 8):
                raise FormatError(
                    f"header length {length} does not fit a file of {total} bytes (limit {LIMITS.header_bytes})",
                    path=str(path),
                    hint="not a safetensors file, or cut off; fetch it again",
                )
            data = file.read(length)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from None
    if len(data) != length:
        raise FormatError("the header is cut off", path=str(path), hint="fetch the file again")
    header = parse_json(data, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("__metadata__ must map strings to strings", path=str(path))
    if len(header) > LIMITS.tensors:
        raise FormatError(f"holds {len(header)} tensors, the limit is {LIMITS.tensors}", path=str(path))
    start = 8 + length
    infos = [_entry(name, entry, path, start, total - start) for name, entry in header.items()]
    reached = start
    for info in sorted(infos, key=lambda i: (i.offset, i.nbytes)):
        if info.offset != reached:
            what = "overlaps another tensor" if info.offset < reached else "leaves a gap before it"
            raise FormatError(f"tensor {_shown(info.name)} {what}", path=str(path), hint="the file is damaged")
        reached += info.nbytes
    if reached != total:
        raise FormatError(f"{total - reached} bytes follow the last tensor", path=str(path), hint="the file is damaged")
    return {info.name: info for info in infos}


class Checkpoint(Mapping[str, "Tensor"]):
    """Tensors of one checkpoint by released name; `checkpoint[name]` reads that tensor from disk, anew each time."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self.infos = dict(infos)

    @classmethod
    def from_files(cls, paths: list[Path]) -> Checkpoint:
        """The union of these files; raises FormatError when a name is in two of them."""
        infos: dict[str, TensorInfo] = {}
        for path in paths:
            for name, info in read_header(path).items():
                if name in infos:
                    where = infos[name].path.name
                    raise FormatError(f"tensor {_shown(name)} is also in {where}", path=str(path))
                infos[name] = info
        return cls(infos)

    @classmethod
    def from_dir(cls, path: Path) -> Checkpoint:
        """The checkpoint of a model directory: model.safetensors, else the sharded index, else the one .safetensors file.

        Raises FormatError when there is none (UnsupportedError when there are pickled weights or a bare adapter instead).
        """
        try:
            present = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            raise FormatError(f"cannot be listed: {error.strerror}", path=str(path)) from None
        if "model.safetensors" in present:
            return cls.from_files([path / "model.safetensors"])
        if INDEX in present:
            return cls._sharded(path)
        found = [name for name in present if name.endswith(".safetensors")]
        if "adapter_model.safetensors" in found:
            raise UnsupportedError(
                f"{path}: holds a LoRA adapter, not a model",
                hint="merge it into its base model first (peft: merge_and_unload)",
            )
        if len(found) == 1:
            return cls.from_files([path / found[0]])
        if found:
            raise FormatError(
                f"holds {len(found)} .safetensors files and no {INDEX}", path=str(path), hint="name one file"
            )
        pickled = [name for name in present if name.endswith(_PICKLES)]
        if pickled:
            raise UnsupportedError(f"{path}: holds only pickled weights ({pickled[0]})", hint=CONVERT_HINT)
        raise FormatError("holds no .safetensors file", path=str(path), hint="check the path")

    @classmethod
    def _sharded(cls, path: Path) -> Checkpoint:
        index = path / INDEX
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
            raise FormatError("weight_map must map tensor names to file names", path=str(index), field="weight_map")
        for name in set(places.values()):
            # a plain file name, so that an index cannot point outside its own directory
            if not _SHARD.fullmatch(name):
                raise FormatError(
                    f"weight_map names {_shown(name)}, not a plain .safetensors file name", path=str(index)
                )
        checkpoint = cls.from_files([path / name for name in sorted(set(places.values()))])
        for name, place in places.items():
            info = checkpoint.infos.get(name)
            if info is None or info.path.name != place:
                raise FormatError(
                    f"tensor {_shown(name)} is not in {place}", path=str(index), hint="a shard is damaged"
                )
        return checkpoint

    def __getitem__(self, name: str) -> Tensor:
        import torch

        info = self.infos[name]
        flat = torch.empty(info.nbytes, dtype=torch.uint8)
        try:
            with info.path.open("rb") as file:
                file.seek(info.offset)
                # a large tensor is read by several calls; a short read means that the file was cut since its header
                view, done = memoryview(flat.numpy()), 0
                while done < info.nbytes:
                    got = file.readinto(view[done:])
                    if not got:
                        raise FormatError(f"tensor {_shown(name)} is cut off", path=str(info.path))
                    done += got
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", path=str(info.path)) from None
        return flat.view(getattr(torch, info.dtype)).view(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def nbytes(self) -> int:
        """Stored size of all tensors, in bytes."""
        return sum(info.nbytes for info in self.infos.values())
