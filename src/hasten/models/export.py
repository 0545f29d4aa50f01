"""Writing a model as a compressed checkpoint: a directory that hasten, vLLM and transformers load.

The matrices of the layers are rounded (models/rounding.py). Embeddings and output layer stay as they are unless asked for:
only recent versions of vLLM read rounded embeddings, and transformers 5.23 does not where they are tied. Norms and biases
stay.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.errors import ConfigError, FormatError, UnsupportedError, out_of_range
from hasten.kernels.weights import KINDS
from hasten.models.checkpoint import Checkpoint, checkpoint_files
from hasten.models.config import ModelConfig
from hasten.models.families import config_from_hf, state_from_hf
from hasten.models.gguf import open_gguf
from hasten.models.load import resolve
from hasten.models.rounding import Rounding, Shape
from hasten.models.scheme import METHOD, quantisation
from hasten.models.tokenizer import Tokenizer, read_json

Progress = Callable[[str, int, int], None]
GROUPS = ("32", "64", "128", "channel")
EMBEDDINGS = ("kept", "int8")
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "generation_config.json", "card.json"),
)
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
_LAYER = {
    "attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a source: released `name`, dtype and shape, its part (layer, embed, head or other), how to read it."""

    name: str
    dtype: str
    shape: Shape
    part: str
    read: Callable[[], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Source:
    """A model to be written: config.json, tensors, other files to copy or write, bytes of its weight files."""

    config: dict[str, Any]
    tensors: list[Stored]
    files: Callable[[Path], None]
    nbytes: int


def compress(
    model: str | Path,
    out: str | Path,
    *,
    weights: str = "int8",
    group: str | int = "32",
    embeddings: str = "kept",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Round a model's weights to nearest and write it to the new directory `out`, at once or not at all.

    `group` columns share a scale: 32, 64, 128, or "channel" for a whole row. `embeddings`: kept, or int8 for the input and
    output embeddings too. The source is all that `load` takes, of hasten's own families; a GGUF file's values are rounded
    anew. Returns facts: path, bytes before and after, parameters, bits per weight, error (root mean square of the rounded
    weights' errors over that of the weights). Raises ConfigError, FormatError, UnsupportedError.
    """
    out = Path(out)
    if weights not in KINDS:
        raise out_of_range("weights", weights, ", ".join(KINDS))
    if str(group) not in GROUPS:
        raise out_of_range("group", group, ", ".join(GROUPS))
    if embeddings not in EMBEDDINGS:
        raise out_of_range("embeddings", embeddings, " or ".join(EMBEDDINGS))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already", hint="name a directory that is not, or an empty one", field="out")
    how = Rounding(weights, None if group == "channel" else int(group))
    path = resolve(model, progress)
    source = _gguf(path) if path.suffix == ".gguf" and path.is_file() else _directory(path)
    plan = [(one, _rounding(one, how, embeddings)) for one in source.tensors]
    _check_groups(plan)
    part = out.parent / f".{out.name}.{os.getpid()}.part"
    part.mkdir(parents=True)
    try:
        error = _weights(part / "model.safetensors", plan, progress)
        config = {**source.config, "quantization_config": _section(plan, how)}
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        source.files(part)
        if out.is_dir():
            out.rmdir()
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = (out / "model.safetensors").stat().st_size
    parameters = sum(math.prod(one.shape) for one in source.tensors)
    rounded = sum(math.prod(one.shape) for one, own in plan if own)
    return {
        "path": str(out), "weights": weights, "group": "channel" if how.group is None else how.group,
        "embeddings": embeddings, "bytes_before": source.nbytes, "bytes": size, "parameters": parameters,
        "rounded_parameters": rounded, "bits_per_weight": 8 * size / parameters, "error": error,
    }  # fmt: skip


def _rounding(one: Stored, how: Rounding, embeddings: str) -> Rounding | None:
    """How a tensor is rounded, None for one that stays."""
    if one.part == "layer":
        return how
    return Rounding("int8", how.group) if one.part in ("embed", "head") and embeddings == "int8" else None


def _check_groups(plan: list[tuple[Stored, Rounding | None]]) -> None:
    for one, own in plan:
        if own is not None and own.group is not None and one.shape[1] % own.group:
            fits = [g for g in GROUPS if g == "channel" or one.shape[1] % int(g) == 0]
            raise out_of_range("group", own.group, " or ".join(fits), f"{one.name} has {one.shape[1]} columns")


def _section(plan: list[tuple[Stored, Rounding | None]], how: Rounding) -> dict[str, Any]:
    """The quantization_config of what was rounded; embeddings by their names, since they are no Linear."""
    groups = {"group_0": how.scheme(["Linear"])}
    ends = [(one.name.removesuffix(".weight"), own) for one, own in plan if one.part in ("embed", "head")]
    named = [module for module, own in ends if own]
    if named:
        groups["group_1"] = Rounding("int8", how.group).scheme(named)
    heads = [one.name.removesuffix(".weight") for one, _ in plan if one.part == "head"] or ["lm_head"]
    return {
        "quant_method": METHOD, "format": "pack-quantized", "quantization_status": "compressed", "config_groups": groups,
        "ignore": [head for head in heads if head not in named], "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def _weights(path: Path, plan: list[tuple[Stored, Rounding | None]], progress: Progress | None) -> float:
    """Write the safetensors file, one source tensor in memory at a time; the relative error of what was rounded."""
    entries: list[tuple[str, str, Shape]] = []
    for one, own in plan:
        scales = "BF16" if one.dtype == "BF16" else "F16"
        module = one.name.removesuffix(".weight")
        plain = [(one.name, one.dtype, one.shape)]
        entries += plain if own is None else own.tensors(module, (one.shape[0], one.shape[1]), scales)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    total, done = sum(math.prod(one.shape) for one, _ in plan), 0
    wrong = whole = 0.0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one, own in plan:
            values = one.read()
            if own is None:
                file.write(_kept(values, one).tobytes())
            else:
                weight = _floats(values, one.dtype)
                try:
                    tensors, after = own.encode(weight, "BF16" if one.dtype == "BF16" else "F16")
                except FormatError as error:
                    raise FormatError(f"{one.name}: {error.message}", field=one.name) from None
                for tensor in tensors:
                    file.write(tensor.tobytes())
                wrong += float(np.square(after - weight, dtype=np.float32).sum(dtype=np.float64))
                whole += float(np.square(weight, dtype=np.float32).sum(dtype=np.float64))
            done += math.prod(one.shape)
            if progress is not None:
                progress("rounding", done, total)
    return math.sqrt(wrong / whole) if whole else 0.0


def _kept(values: NDArray[Any], one: Stored) -> NDArray[Any]:
    """A tensor that stays, in the type it is stored in: that of the source, float16 for values out of a GGUF file."""
    if one.dtype != "F16" or values.dtype == np.float16:
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise FormatError(f"{one.name} holds values beyond float16", field=one.name)
    return narrow


def _floats(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values as float32; bfloat16 comes as uint16."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


# --- from a directory ---


def _directory(path: Path) -> Source:
    files = None
    if path.is_file():
        path, files = path.parent, [path]
    raw = read_json(path / "config.json")
    if not raw:
        raise FormatError("holds no config.json", path=str(path))
    if quantisation(raw) is not None:
        raise UnsupportedError(f"{path.name} is compressed already", hint="take the model it was made from", field="model")
    tokenizer = Tokenizer.from_dir(path) if (path / "tokenizer.json").is_file() else None
    config = config_from_hf(raw, tokenizer)
    if config.experts is not None:
        raise UnsupportedError(f"{path.name}: models with experts ({config.family}) are not written", field="model")
    files = files or checkpoint_files(path)
    stored = Checkpoint(files)
    parts = _parts(config, stored)

    tensors = [Stored(name, *stored.shapes[name], part, partial(_raw, stored, name)) for name, part in parts.items()]

    def others(out: Path) -> None:
        for name in _COPIED:
            if (path / name).is_file():
                shutil.copyfile(path / name, out / name)

    return Source(raw, tensors, others, sum(file.stat().st_size for file in files))


def _raw(stored: Checkpoint, name: str) -> NDArray[Any]:
    """One tensor as stored, bfloat16 as uint16."""
    tensor = stored.read(name)
    return np.asarray((tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy())


def _parts(config: ModelConfig, stored: Checkpoint) -> dict[str, str]:
    """Stored name -> what it is in the model; names that the model has no use for are left out."""
    names, parts = stored.names, dict[str, str]()
    index = {name: i for i, name in enumerate(names)}

    def number(name: str) -> torch.Tensor:
        shape = stored.shapes[name][1]
        if len(shape) not in (1, 2):
            raise FormatError(f"tensor {name} has shape {shape}", field=name)
        return torch.full((shape[0], 1) if len(shape) == 2 else shape, index[name])

    used: dict[str, torch.Tensor] = {}
    for own, tensor in state_from_hf(config, names, lambda name: used.setdefault(name, number(name))):
        first = own.partition(".")[0]
        for i in sorted(set(tensor.reshape(-1).tolist())) if tensor.ndim == 2 else ():
            parts[names[int(i)]] = "layer" if first == "layers" else first
    return {name: parts.get(name, "other") for name in names if name in used}


# --- from a GGUF file ---


def _gguf(path: Path) -> Source:
    file = open_gguf(path)
    config, tokenizer = file.config(), file.tokenizer()
    raw = _released_config(config, tokenizer, path)
    tensors = []
    for own, stored in file.places(config).items():
        *before, last, leaf = own.split(".")
        for name, kind in zip(stored, {"qkv": "qkv", "gate_up": ("gate", "up")}.get(last, (last,)), strict=True):
            if len(before) == 2:
                released, part = f"model.layers.{before[1]}.{_LAYER[kind]}.{leaf}", "layer"
            else:
                released = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[kind] + ".weight"
                part = kind
            shape = file.tensors[name].shape if name in file.tensors else ()
            part = part if len(shape) == 2 else "other"
            read = partial(file.parameter, (name,), config)
            tensors.append(Stored(released, "F16", shape, part, read))

    def others(out: Path) -> None:
        tokenizer.save(out)
        ends = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids), "pad_token_id": config.pad_id}
        known = {name: value for name, value in ends.items() if value not in (None, [])}
        (out / "generation_config.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

    return Source(raw, tensors, others, path.stat().st_size)


def _released_config(config: ModelConfig, tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """The config.json that describes a GGUF file's stack, checked by reading it back.

    Raises UnsupportedError for a family or a field that cannot be written.
    """
    c = config
    architectures = {
        "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
        "smollm3": "SmolLM3ForCausalLM",
    }  # fmt: skip
    if c.family not in architectures:
        raise UnsupportedError(
            f"{path.name}: GGUF files of {c.family} are not written as a directory; {', '.join(architectures)} are",
            hint="compress the model's released directory",
            field="model",
        )
    rope = c.ropes[0]
    raw = {
        "architectures": [architectures[c.family]], "model_type": c.family, "vocab_size": c.vocab_size,
        "hidden_size": c.hidden, "intermediate_size": c.ffn, "num_hidden_layers": len(c.layers),
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "max_position_embeddings": c.max_len, "rms_norm_eps": c.norm_eps, "rope_theta": rope.theta, "hidden_act": "silu",
        "tie_word_embeddings": c.tied, "torch_dtype": "float16", "bos_token_id": c.bos_id, "eos_token_id": list(c.eos_ids),
        "pad_token_id": c.pad_id, "attention_bias": c.family != "qwen2" and c.qkv_bias,
    }  # fmt: skip
    if rope.kind == "linear":
        raw["rope_scaling"] = {"rope_type": "linear", "factor": rope.factor}
    if c.family == "llama":
        raw["mlp_bias"] = c.ffn_bias
    if c.family == "smollm3":
        raw["no_rope_layers"] = [int(layer.rope is not None) for layer in c.layers]
    if c.family in ("qwen2", "qwen3", "smollm3"):
        raw["use_sliding_window"] = False
    again = config_from_hf(raw, tokenizer)
    differ = [name for name in c.__slots__ if getattr(c, name) != getattr(again, name)]
    if differ:
        raise UnsupportedError(
            f"{path.name}: {differ[0]} = {getattr(c, differ[0])!r:.80} has no place in the config.json of {c.family}",
            hint="compress the model's released directory",
            field=differ[0],
        )
    return raw
