"""Any model source -> a loaded stack: catalog name, directory, hub id, .gguf or .safetensors file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.errors import (
    ConfigError,
    DownloadError,
    FormatError,
    MemoryFitError,
    UnsupportedError,
    out_of_range,
    unknown_name,
)
from hasten.models import catalog
from hasten.models.checkpoint import Checkpoint, checkpoint_files
from hasten.models.config import ModelConfig
from hasten.models.families import config_from_hf, state_from_hf
from hasten.models.gguf import open_gguf
from hasten.models.memory import available_bytes
from hasten.models.tokenizer import Tokenizer, read_json
from hasten.models.transformer import Transformer

if TYPE_CHECKING:
    from hasten.models.hf import AdaptedConfig, HFBackbone

Progress = Callable[[str, int, int], None]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(slots=True)
class Loaded:
    """A model in memory: the stack, its tokenizer (None for a bare weight file), where it came from, bytes of weights."""

    model: Transformer | HFBackbone
    tokenizer: Tokenizer | None
    config: ModelConfig | AdaptedConfig
    source: str
    dtype: torch.dtype
    bytes: int


def load(source: str | Path, *, dtype: str = "auto", force: bool = False, progress: Progress | None = None) -> Loaded:
    """Load `source` (see module) in `dtype`: auto (as stored; GGUF and float16 files: float32), float32 or bfloat16.

    Refuses what would not fit into memory unless `force`. Raises UnknownNameError, DownloadError, FormatError,
    UnsupportedError, MemoryFitError, ConfigError.
    """
    if dtype not in ("auto", *_DTYPES):
        hint = "float16 is slow and loses range on CPUs" if dtype == "float16" else ""
        raise out_of_range("dtype", dtype, "auto, float32 or bfloat16", hint)
    path = _resolve(source, progress)
    if path.is_dir():
        return _directory(path, dtype, force, progress)
    if path.suffix == ".gguf":
        return _gguf(path, dtype, force, progress)
    if path.suffix == ".safetensors":
        return _directory(path.parent, dtype, force, progress, [path])
    raise FormatError("is neither a directory, a .gguf nor a .safetensors file", path=str(path))


def _resolve(source: str | Path, progress: Progress | None) -> Path:
    """The local path of a source, fetched when it is a catalog name or a hub id."""
    text = str(source)
    if not text:
        raise ConfigError("model is empty; model must be a name, a path or a hub id", field="model")
    path = Path(source)
    if path.exists():
        return path
    if text in catalog.names():
        return catalog.pull(text, progress=progress)
    if isinstance(source, str) and _HUB.fullmatch(text) and path.suffix not in (".gguf", ".safetensors"):
        return _hub(text)
    raise unknown_name("model", text, catalog.names(), "no such file; a hub id has the form org/name")


def _hub(name: str) -> Path:
    """A snapshot of a hub repository: JSON, templates and safetensors only."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.jinja"], ignore_patterns=["*/*"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DownloadError(
            f"model {name!r} could not be fetched from the hub: {str(error).splitlines()[0][:200]}",
            hint="check the name and the network, or give a local directory",
        ) from None


def _fit(config: ModelConfig, dtype: torch.dtype, path: Path, force: bool) -> int:
    """Bytes of weights; raises MemoryFitError when they and the largest temporary exceed what is free."""
    return _fits(config.parameters, 4 * config.vocab_size * config.hidden, dtype, path, force)


def _fits(parameters: int, largest: int, dtype: torch.dtype, path: Path, force: bool) -> int:
    weights = parameters * dtype.itemsize
    free = available_bytes()
    if weights + largest > free and not force:
        raise MemoryFitError(
            f"{path.name} needs {(weights + largest) / 1e9:.1f} GB ({parameters / 1e9:.2f} billion weights in "
            f"{str(dtype).removeprefix('torch.')}); {free / 1e9:.1f} GB are free",
            hint="close something, use dtype bfloat16, or override with force=True (--force)",
            field="model",
        )
    return weights


def _counted(
    state: Iterator[tuple[str, Tensor]], config: ModelConfig, what: str, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, reporting parameters read of all."""
    done = 0
    for name, tensor in state:
        yield name, tensor
        done += tensor.numel()
        if progress is not None:
            progress(f"loading {what}", min(done, config.parameters), config.parameters)


def _gguf(path: Path, dtype: str, force: bool, progress: Progress | None) -> Loaded:
    file = open_gguf(path)
    config = file.config()
    kind = _DTYPES.get(dtype, torch.float32)
    size = _fit(config, kind, path, force)
    model = Transformer.from_state(config, _counted(file.state(kind), config, path.name, progress), kind)
    return Loaded(model, file.tokenizer(), config, str(path), kind, size)


def _directory(path: Path, dtype: str, force: bool, progress: Progress | None, files: list[Path] | None = None) -> Loaded:
    raw = read_json(path / "config.json")
    if not raw:
        raise FormatError("holds no config.json", path=str(path))
    generation = read_json(path / "generation_config.json")
    try:
        config = config_from_hf(_with_ends(raw, generation))
    except UnsupportedError as error:
        if error.field != "model_type" or not isinstance(raw.get("model_type"), str):
            raise
        return _adapted(path, raw, dtype, force, files)
    stored = Checkpoint(files or checkpoint_files(path))
    kind = _DTYPES.get(dtype) or (torch.float32 if stored.dtype == torch.float16 else stored.dtype)
    size = _fit(config, kind, path, force)
    state = state_from_hf(config, stored.names, stored.read)
    model = Transformer.from_state(config, _counted(state, config, path.name, progress), kind)
    tokenizer = Tokenizer.from_dir(path) if (path / "tokenizer.json").is_file() else None
    return Loaded(model, tokenizer, config, str(path), kind, size)


def _adapted(path: Path, raw: dict[str, Any], dtype: str, force: bool, files: list[Path] | None) -> Loaded:
    """A family that only transformers knows, through the adapter; the weight files pass the same checks first."""
    from hasten.models.hf import load_adapted

    stored = Checkpoint(files or checkpoint_files(path))
    kind = _DTYPES.get(dtype) or (torch.float32 if stored.dtype == torch.float16 else stored.dtype)
    sizes = [math.prod(shape) for _, shape in stored.shapes.values()]
    size = _fits(sum(sizes), 4 * max(sizes, default=0), kind, path, force)
    model = load_adapted(path, raw, kind, sum(sizes))
    tokenizer = Tokenizer.from_dir(path) if (path / "tokenizer.json").is_file() else None
    return Loaded(model, tokenizer, model.config, str(path), kind, size)


def _with_ends(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """The config with the end tokens of both files: instruct models often list theirs only in generation_config."""
    ends: list[Any] = []
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        ends += value if isinstance(value, list) else [] if value is None else [value]
    return {**config, "eos_token_id": list(dict.fromkeys(ends))} if all(isinstance(e, int) for e in ends) else config
