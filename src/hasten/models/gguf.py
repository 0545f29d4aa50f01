"""GGUF files: a strict reader that trusts no length, exact dequantisation, and the way to our config and weights.

Layout: magic, version, tensor count, metadata count; key/value pairs; tensor infos (name, dims, type, offset); padding to
`general.alignment`; tensor data. Every count, length, offset and product is checked against the file before anything of
that size is allocated. Block formats are dequantised by the `gguf` package.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

from hasten.engine.limits import LIMITS
from hasten.errors import FormatError, HastenError, UnsupportedError
from hasten.models.config import Layer, ModelConfig, Rope

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_KNOWN = ("llama", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3")
_INTERLEAVED = ("llama", "smollm3")  # these files store q and k rows for interleaved rotary embeddings
_PER_LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn_output.weight": "out.weight",
    "attn_output.bias": "out.bias",
    "attn_q_norm.weight": "q_norm.weight",
    "attn_k_norm.weight": "k_norm.weight",
    "ffn_down.weight": "down.weight",
}
_ALWAYS = ("attn_norm.weight", "ffn_norm.weight", "attn_output.weight", "ffn_down.weight")
_SANDWICH = {"post_attention_norm.weight": "post_attn_norm.weight", "post_ffw_norm.weight": "post_ffn_norm.weight"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: `shape` as torch sees it (rows first), GGML `type`, absolute `offset` and size in bytes."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


class _Reader:
    """A cursor over the file that refuses to read past its end, naming what it was reading."""

    def __init__(self, data: mmap.mmap | bytes, path: str) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def fail(self, what: str, problem: str) -> FormatError:
        return FormatError(f"{what} {problem} (at byte {self.at} of {self.size})", path=self.path, field=what)

    def scalar(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        if self.at + size > self.size:
            raise self.fail(what, "lies past the end of the file")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def string(self, what: str) -> str:
        length = self.scalar("<Q", f"length of {what}")
        if length > LIMITS.string_bytes or self.at + length > self.size:
            raise self.fail(what, f"claims {length} bytes")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("utf-8", errors="replace")  # token texts of some files are not valid UTF-8

    def array(self, what: str) -> list[Any]:
        kind, count = self.scalar("<I", f"type of {what}"), self.scalar("<Q", f"length of {what}")
        least = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind]) if kind in _SCALARS else 0
        if not least:
            raise self.fail(what, f"has unknown or nested element type {kind}")
        if count > LIMITS.array_items or self.at + count * least > self.size:
            raise self.fail(what, f"claims {count} items")
        if kind == _STRING:
            return [self.string(what) for _ in range(count)]
        values = np.frombuffer(self.data, np.dtype(_SCALARS[kind].replace("?", "u1")), count, self.at)
        self.at += count * least
        return [bool(v) for v in values] if kind == 7 else values.tolist()

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.fail(what, f"has unknown value type {kind}")
        return self.scalar(_SCALARS[kind], what)


class GGUFFile:
    """An open GGUF file: `metadata` (key -> value), `tensors` (name -> TensorInfo), config, tokenizer and weights."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path = path
        self._data = data
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read()

    def _read(self) -> None:
        r = _Reader(self._data, str(self.path))
        if bytes(self._data[:4]) != b"GGUF":
            raise r.fail("magic", "is not GGUF")
        r.at = 4
        version = r.scalar("<I", "version")
        if version not in (2, 3):
            hint = "big-endian files are not read" if version > 2**16 else "convert it with a current tool"
            raise UnsupportedError(f"{self.path}: GGUF version {version}; 2 and 3 are read", hint=hint, field="version")
        count, pairs = r.scalar("<Q", "tensor count"), r.scalar("<Q", "metadata count")
        if count > LIMITS.tensors or count * 24 > r.size:
            raise r.fail("tensor count", f"claims {count}")
        if pairs * 12 > r.size:
            raise r.fail("metadata count", f"claims {pairs}")
        for _ in range(pairs):
            key = r.string("metadata key")
            if key in self.metadata:
                raise r.fail(key, "appears twice")
            self.metadata[key] = r.value(r.scalar("<I", f"type of {key}"), key)
            if r.at > LIMITS.header_bytes:
                raise r.fail("metadata", f"exceeds {LIMITS.header_bytes} bytes")
        infos = [self._info(r) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 2**20:
            raise r.fail("general.alignment", f"is {alignment!r}")
        start = -(-r.at // alignment) * alignment
        end = 0
        for name, shape, kind, offset, nbytes in sorted(infos, key=lambda info: info[3]):
            if offset % alignment or offset < end or start + offset + nbytes > r.size:
                raise r.fail(name, f"claims bytes {offset}..{offset + nbytes} of the data, which do not fit the file")
            end = offset + nbytes
            if name in self.tensors:
                raise r.fail(name, "appears twice")
            self.tensors[name] = TensorInfo(name, shape, kind, start + offset, nbytes)

    @staticmethod
    def _info(r: _Reader) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int, int]:
        name = r.string("tensor name")
        rank = r.scalar("<I", f"rank of {name}")
        if not 1 <= rank <= LIMITS.tensor_dims:
            raise r.fail(name, f"has {rank} dimensions")
        dims = [r.scalar("<Q", f"shape of {name}") for _ in range(rank)]
        number, offset = r.scalar("<I", f"type of {name}"), r.scalar("<Q", f"offset of {name}")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UnsupportedError(f"{r.path}: tensor {name} has unknown type {number}", field=name) from None
        elements = 1
        for dim in dims:
            if not 1 <= dim <= 2**40:
                raise r.fail(name, f"has dimension {dim}")
            elements *= dim
        if dims[0] % block:
            raise r.fail(name, f"has rows of {dims[0]}, not a multiple of the {kind.name} block of {block}")
        return name, tuple(reversed(dims)), kind, offset, elements // block * size

    def dequantize(self, name: str) -> np.ndarray:
        """The tensor as float32 in its own shape; raises FormatError for an unknown name, UnsupportedError for a type."""
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"tensor {name} is missing", path=str(self.path), field=name)
        raw = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)
        if info.type == gguf.GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(info.shape)
        if info.type == gguf.GGMLQuantizationType.F16:
            return raw.view("<f2").reshape(info.shape).astype(np.float32)
        try:
            return gguf.quants.dequantize(raw.reshape(*info.shape[:-1], -1), info.type).reshape(info.shape)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.path}: tensor {name} has type {info.type.name}, which cannot be dequantised", field=name
            ) from None

    # --- config ---

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        """Metadata value `arch.key` (or `key` itself when it has the arch already), checked for its type."""
        value = self.metadata.get(key, default)
        if value is None and default is None:
            raise FormatError(f"metadata {key} is missing", path=str(self.path), field=key)
        if value is default:
            return value
        good = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        if not good:
            raise FormatError(
                f"metadata {key} is {value!r:.60}, not of type {kind.__name__}", path=str(self.path), field=key
            )
        return kind(value)

    def config(self) -> ModelConfig:
        """The stack this file describes; raises UnsupportedError for other architectures, FormatError naming a field."""
        arch = self._get("general.architecture", str)
        if arch not in _KNOWN:
            raise UnsupportedError(
                f"{self.path}: architecture {arch!r} is not read; known: {', '.join(_KNOWN)}",
                field="general.architecture",
            )
        hidden, heads = self._get(f"{arch}.embedding_length", int), self._get(f"{arch}.attention.head_count", int)
        if heads < 1:
            raise FormatError(f"metadata {arch}.attention.head_count is {heads}", path=str(self.path))
        head_dim = self._get(f"{arch}.attention.key_length", int, hidden // heads)
        count = self._get(f"{arch}.block_count", int)
        if not 1 <= count <= 1024:
            raise FormatError(f"metadata {arch}.block_count is {count}", path=str(self.path), field="block_count")
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise FormatError("tensor token_embd.weight is missing or not a matrix", path=str(self.path))
        layers, ropes = self._layers(arch, count, head_dim)
        gemma = arch.startswith("gemma")
        scalar = hidden // heads if (arch, count) in (("gemma2", 46), ("gemma3", 62)) else head_dim
        from hasten.models.tokenizer import end_ids_from_gguf

        try:
            return ModelConfig(
                family="gemma3_text" if arch == "gemma3" else arch,
                vocab_size=embedding.shape[0],
                hidden=hidden,
                heads=heads,
                kv_heads=self._get(f"{arch}.attention.head_count_kv", int, heads),
                head_dim=head_dim,
                ffn=self._get(f"{arch}.feed_forward_length", int),
                max_len=self._get(f"{arch}.context_length", int),
                layers=layers,
                ropes=ropes,
                norm_eps=self._get(f"{arch}.attention.layer_norm_rms_epsilon", float),
                qk_norm="blk.0.attn_q_norm.weight" in self.tensors,
                sandwich_norms=gemma,
                qkv_bias="blk.0.attn_q.bias" in self.tensors,
                out_bias="blk.0.attn_output.bias" in self.tensors,
                activation="gelu_tanh" if gemma else "silu",
                tied="output.weight" not in self.tensors,
                embed_scale=hidden**0.5 if gemma else 1.0,
                attn_scale=scalar**-0.5,
                attn_softcap=self._get(f"{arch}.attn_logit_softcapping", float, 50.0) if arch == "gemma2" else None,
                logit_softcap=self._get(f"{arch}.final_logit_softcapping", float, 30.0) if arch == "gemma2" else None,
                bos_id=self.metadata.get("tokenizer.ggml.bos_token_id"),
                eos_ids=tuple(i for i in end_ids_from_gguf(self.metadata) if i < embedding.shape[0]),
                pad_id=self.metadata.get("tokenizer.ggml.padding_token_id"),
            )
        except (ValueError, TypeError) as error:
            if isinstance(error, HastenError):
                raise FormatError(error.message, path=str(self.path), field=error.field) from None
            raise FormatError(f"metadata does not describe a model: {error}", path=str(self.path)) from None

    def _layers(self, arch: str, count: int, head_dim: int) -> tuple[tuple[Layer, ...], tuple[Rope, ...]]:
        """Windows and rotary embeddings per layer, by the conventions of each architecture."""
        theta = self._get(f"{arch}.rope.freq_base", float, 10_000.0)
        partial = self._get(f"{arch}.rope.dimension_count", int, head_dim) / head_dim
        kind = self._get(f"{arch}.rope.scaling.type", str, "none")
        rope = Rope(theta=theta, partial=partial)
        if "rope_freqs.weight" in self.tensors:
            factors = tuple(float(f) for f in self.dequantize("rope_freqs.weight").reshape(-1))
            rope = Rope(theta=theta, partial=partial, kind="factors", factors=factors)
        elif kind == "linear":
            rope = Rope(theta=theta, partial=partial, kind="linear", factor=self._get(f"{arch}.rope.scaling.factor", float))
        elif kind != "none":
            raise UnsupportedError(f"{self.path}: rope scaling {kind!r} is not supported", field="rope.scaling.type")
        window = self._get(f"{arch}.attention.sliding_window", int, 0) or None
        if arch == "gemma2":
            return tuple(Layer(window=window if i % 2 == 0 else None) for i in range(count)), (rope,)
        if arch == "gemma3":
            local = Rope(theta=10_000.0, partial=partial)
            layers = tuple(Layer(None, 0) if (i + 1) % 6 == 0 else Layer(window, 1) for i in range(count))
            return layers, (rope, local)
        if arch == "smollm3":
            return tuple(Layer(rope=None if (i + 1) % 4 == 0 else 0) for i in range(count)), (rope,)
        return tuple(Layer(window=window) for _ in range(count)), (rope,)

    # --- weights ---

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8."""
        info = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)

    def places(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """Our parameter names (models/config.py) -> the stored tensors whose rows they are made of, in order.

        Raises FormatError when the file holds a tensor that has no place.
        """
        places: dict[str, tuple[str, ...]] = {
            "embed.weight": ("token_embd.weight",),
            "norm.weight": ("output_norm.weight",),
        }
        if not config.tied:
            places["head.weight"] = ("output.weight",)
        for i in range(len(config.layers)):
            blk, ours = f"blk.{i}.", f"layers.{i}."
            for part in ("weight", "bias") if config.qkv_bias else ("weight",):
                places[f"{ours}qkv.{part}"] = tuple(f"{blk}attn_{x}.{part}" for x in "qkv")
            places[f"{ours}gate_up.weight"] = (f"{blk}ffn_gate.weight", f"{blk}ffn_up.weight")
            for theirs, name in {**_PER_LAYER, **(_SANDWICH if config.sandwich_norms else {})}.items():
                if theirs in _ALWAYS or theirs in _SANDWICH or blk + theirs in self.tensors:
                    places[ours + name] = (blk + theirs,)
        used = {name for names in places.values() for name in names} | {"rope_freqs.weight"}
        left = sorted(set(self.tensors) - used)
        if left:
            raise FormatError(f"tensors without a place in the model: {', '.join(left[:6])}", path=str(self.path))
        return places

    def row_order(self, name: str, config: ModelConfig) -> np.ndarray | None:
        """int32 [rows]: which stored row stands where, for q and k rows stored for interleaved rotary embeddings.

        None where rows stay in place. Raises FormatError for a number of rows that no heads have.
        """
        kind = name.split(".")[-2]
        if kind not in ("attn_q", "attn_k") or self._get("general.architecture", str) not in _INTERLEAVED:
            return None
        rows, heads = self.tensors[name].shape[0], config.heads if kind == "attn_q" else config.kv_heads
        if rows % (2 * heads):
            raise FormatError(f"tensor {name} has {rows} rows", path=str(self.path), field=name)
        pairs = np.arange(rows, dtype=np.int32).reshape(heads, rows // heads // 2, 2)
        return pairs.swapaxes(1, 2).reshape(rows)

    def parameter(self, parts: tuple[str, ...], config: ModelConfig) -> np.ndarray:
        """A parameter float32, from the stored tensors that `places` names."""
        values = []
        for name in parts:
            one = self.dequantize(name)
            order = self.row_order(name, config)
            values.append(one if order is None else one[order])
        if len({one.shape[1:] for one in values}) != 1:
            raise FormatError("projections of one layer have different widths", path=str(self.path))
        return np.array(values[0] if len(values) == 1 else np.concatenate(values), dtype=np.float32, order="C")

    def state(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Our parameter names and tensors, one at a time, q/k/v and gate/up fused, cast to `dtype`."""
        config = self.config()
        for name, parts in self.places(config).items():
            yield name, torch.from_numpy(self.parameter(parts, config)).to(dtype)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer described by this file's metadata."""
        from hasten.models.tokenizer import Tokenizer

        return Tokenizer.from_gguf(self.metadata)


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file (memory-mapped); raises FormatError when it is damaged, UnsupportedError for other versions."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            data: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from None
    return GGUFFile(path, data)


def metadata_of(path: str | Path) -> Mapping[str, Any]:
    """The metadata of a GGUF file."""
    return open_gguf(path).metadata
