"""Any model source -> a loaded stack: catalog name, directory, hub id, .gguf or .safetensors file.

hasten's own families run on the native stack where its library is there and computes all of them, else on torch; both
from the same weights. `Loaded.model.name` says which it is.
"""

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
from hasten.kernels.library import ACTIVATIONS, KV_TYPES, available, missing
from hasten.kernels.weights import KINDS
from hasten.models import catalog
from hasten.models.checkpoint import Checkpoint, checkpoint_files
from hasten.models.compressed import CompressedCheckpoint
from hasten.models.config import AdaptedConfig, ModelConfig
from hasten.models.families import config_from_hf, state_from_hf
from hasten.models.gguf import open_gguf
from hasten.models.memory import available_bytes
from hasten.models.packing import Weights, cached, from_compressed, from_gguf, from_state, gap
from hasten.models.scheme import Quantisation, quantisation
from hasten.models.tokenizer import Tokenizer, read_json
from hasten.models.transformer import Transformer

if TYPE_CHECKING:
    from hasten.models.diffusion_gemma import DiffusionGemma
    from hasten.models.hf import HFBackbone
    from hasten.models.native import NativeStack

Progress = Callable[[str, int, int], None]
BACKBONES = ("auto", "native", "torch")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(slots=True)
class Loaded:
    """A model in memory: the stack, its tokenizer (None for a bare weight file), where it came from, bytes of weights."""

    model: Transformer | NativeStack | HFBackbone | DiffusionGemma
    tokenizer: Tokenizer | None
    config: ModelConfig | AdaptedConfig
    source: str
    dtype: torch.dtype
    bytes: int


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is loaded; checked on construction, raises ConfigError naming the field.

    dtype: of the weights - auto (as stored; on torch, GGUF and float16 files become float32), float32 or bfloat16.
    backbone: auto (native where it can be), native or torch. The rest is for the native stack, and lossy when it is not the
    default: activations exact or int8 (inputs of quantised matrices rounded to 8 bits), cache float32, bfloat16 or int8,
    weights stored, int8, int4 or int4-min (rounded to nearest, 32 columns a scale; embeddings to int8).
    force: load although the memory check says it will not fit.
    """

    dtype: str = "auto"
    backbone: str = "auto"
    activations: str = "exact"
    cache: str = "float32"
    weights: str = "stored"
    force: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *_DTYPES):
            hint = "float16 is slow and loses range on CPUs" if self.dtype == "float16" else ""
            raise out_of_range("dtype", self.dtype, "auto, float32 or bfloat16", hint)
        for name, allowed in (
            ("backbone", BACKBONES),
            ("activations", ACTIVATIONS),
            ("cache", KV_TYPES),
            ("weights", ("stored", *KINDS)),
        ):
            if getattr(self, name) not in allowed:
                raise out_of_range(name, getattr(self, name), ", ".join(allowed))
        if not self.native:
            reason = "it was switched off" if self.backbone == "torch" else missing()
            for name, default in (("activations", "exact"), ("cache", "float32"), ("weights", "stored")):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name} = {getattr(self, name)!r} needs the native stack; {reason}",
                        hint=f"use {name}={default!r}",
                        field=name,
                    )
            if self.backbone == "native":
                raise ConfigError(f"backbone = 'native': {reason}", hint="use backbone='torch'", field="backbone")

    @property
    def native(self) -> bool:
        """Whether hasten's own families run on the native stack."""
        return self.backbone != "torch" and available()

    @property
    def kind(self) -> torch.dtype | None:
        """The dtype asked for, None for that of the file."""
        return _DTYPES.get(self.dtype)


def load(source: str | Path, *, progress: Progress | None = None, **how: Any) -> Loaded:
    """Load `source` (see module); keywords are the fields of Options. Refuses what would not fit into memory.

    Raises UnknownNameError, DownloadError, FormatError, UnsupportedError, MemoryFitError, ConfigError.
    """
    options = Options(**how)
    path = resolve(source, progress)
    if path.is_dir():
        return _directory(path, options, progress)
    if path.suffix == ".gguf":
        return _gguf(path, options, progress)
    if path.suffix == ".safetensors":
        return _directory(path.parent, options, progress, [path])
    raise FormatError("is neither a directory, a .gguf nor a .safetensors file", path=str(path))


def resolve(source: str | Path, progress: Progress | None = None) -> Path:
    """The local path of a source, fetched when it is a catalog name or a hub id; raises as `load` does."""
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
    return _room(parameters * dtype.itemsize, largest, str(dtype).removeprefix("torch."), parameters, path, force)


def _room(weights: int, largest: int, what: str, parameters: int, path: Path, force: bool) -> int:
    """`weights` bytes; raises MemoryFitError when they and the `largest` temporary exceed what is free."""
    free = available_bytes()
    if weights + largest > free and not force:
        raise MemoryFitError(
            f"{path.name} needs {(weights + largest) / 1e9:.1f} GB ({parameters / 1e9:.2f} billion weights in "
            f"{what}); {free / 1e9:.1f} GB are free",
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


def _gguf(path: Path, options: Options, progress: Progress | None) -> Loaded:
    file = open_gguf(path)
    config = file.config()
    kind = options.kind or torch.float32

    def stack(dtype: torch.dtype) -> Transformer:
        state = ((name, tensor.to(kind)) for name, tensor in file.state())
        return Transformer.from_state(config, _counted(state, config, path.name, progress), dtype)

    if options.native:

        def make() -> Weights:
            return from_gguf(file, config, options.kind, options.weights, progress)

        size = (
            sum(info.nbytes for info in file.tensors.values()) if options.kind != torch.bfloat16 else 2 * config.parameters
        )
        _room(size, 0, f"{size / max(1, config.parameters):.1f} bytes each", config.parameters, path, options.force)
        model = _native(config, options, path, make, lambda: stack(torch.float32))
        if progress is not None:
            progress(f"loading {path.name}", config.parameters, config.parameters)
        return Loaded(model, file.tokenizer(), config, str(path), kind, model.weights.nbytes)
    size = _fit(config, kind, path, options.force)
    return Loaded(stack(kind), file.tokenizer(), config, str(path), kind, size)


def _native(
    config: ModelConfig,
    options: Options,
    path: Path,
    make: Callable[[], Weights],
    oracle: Callable[[], Transformer],
    how: str = "",
) -> NativeStack:
    """The native stack of a model; `how` says more of how its weights are packed than `options` do."""
    from hasten.models.native import NativeStack

    weights = cached(path, f"{how or options.dtype} {options.weights}", make, config)
    own = None if options.weights != "stored" else lambda: oracle().pack()
    return NativeStack(config, weights, activations=options.activations, cache=options.cache, oracle=own)


def _directory(path: Path, options: Options, progress: Progress | None, files: list[Path] | None = None) -> Loaded:
    raw = read_json(path / "config.json")
    if not raw:
        raise FormatError("holds no config.json", path=str(path))
    rounded = quantisation(raw)
    generation = read_json(path / "generation_config.json")
    tokenizer = Tokenizer.from_dir(path) if (path / "tokenizer.json").is_file() else None
    try:
        config = config_from_hf(_with_generation(raw, generation), tokenizer)
    except UnsupportedError as error:
        if error.field != "model_type" or not isinstance(raw.get("model_type"), str):
            raise
        if rounded is not None:
            raise UnsupportedError(
                f"{path.name}: compressed weights of model type {raw['model_type']!r}, which runs through transformers, "
                "are not read",
                hint="take the model's plain weights",
                field="quantization_config",
            ) from None
        return _adapted(path, raw, options, files, tokenizer)
    lacking = gap(config)
    if lacking:
        _torch_only(options, f"{path.name}: the native stack has no {lacking}, so that this model runs on torch")
    files = files or checkpoint_files(path)
    if rounded is not None:
        return _compressed(path, config, tokenizer, options, progress, files, rounded)
    stored = Checkpoint(files)
    kind = options.kind or (torch.float32 if stored.dtype == torch.float16 else stored.dtype)

    def state() -> Iterator[tuple[str, Tensor]]:
        return _counted(state_from_hf(config, stored.names, stored.read), config, path.name, progress)

    size = _fit(config, kind, path, options.force)
    if options.native and not lacking:

        def oracle() -> Transformer:
            return Transformer.from_state(config, ((name, tensor.to(kind)) for name, tensor in state()), torch.float32)

        weights_file = files[0] if len(files) == 1 else path
        model = _native(config, options, weights_file, lambda: from_state(config, state(), kind, options.weights), oracle)
        if progress is not None:
            progress(f"loading {path.name}", config.parameters, config.parameters)
        return Loaded(model, tokenizer, config, str(path), kind, model.weights.nbytes)
    return Loaded(Transformer.from_state(config, state(), kind), tokenizer, config, str(path), kind, size)


def _compressed(
    path: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    options: Options,
    progress: Progress | None,
    files: list[Path],
    rounded: Quantisation,
) -> Loaded:
    """A checkpoint with rounded weights: the same values on both stacks, as they are stored on the native one."""
    stored = CompressedCheckpoint(files, rounded)
    kind = options.kind or torch.float32  # what codes and scales stand for needs it

    def state() -> Iterator[tuple[str, Tensor]]:
        values = state_from_hf(config, stored.names, stored.read)
        return _counted(((name, tensor.to(kind)) for name, tensor in values), config, path.name, progress)

    if not options.native or gap(config):
        size = _fits(config.parameters, 8 * stored.largest, kind, path, options.force)
        return Loaded(Transformer.from_state(config, state(), kind), tokenizer, config, str(path), kind, size)

    def make() -> Weights:
        places = state_from_hf(config, stored.names, stored.rows)
        return from_compressed(config, places, stored, options.kind, options.weights, progress)

    size = stored.nbytes if options.kind != torch.bfloat16 else 2 * config.parameters
    each = f"{size / max(1, config.parameters):.1f} bytes each"
    _room(size, 8 * stored.largest, each, config.parameters, path, options.force)
    weights_file = files[0] if len(files) == 1 else path
    own = f"{options.dtype} {rounded.digest}"

    def oracle() -> Transformer:
        return Transformer.from_state(config, state(), torch.float32)

    model = _native(config, options, weights_file, make, oracle, own)
    if progress is not None:
        progress(f"loading {path.name}", config.parameters, config.parameters)
    return Loaded(model, tokenizer, config, str(path), kind, model.weights.nbytes)


def _torch_only(options: Options, reason: str) -> None:
    """Refuse what only the native stack could do for a model that does not run there."""
    if options.backbone == "native" or (options.activations, options.cache, options.weights) != (
        "exact",
        "float32",
        "stored",
    ):
        raise UnsupportedError(reason, hint="use backbone='auto' and none of the native stack's options", field="backbone")


def _adapted(
    path: Path, raw: dict[str, Any], options: Options, files: list[Path] | None, tokenizer: Tokenizer | None
) -> Loaded:
    """A family that only transformers knows, through the adapter; the weight files pass the same checks first."""
    from hasten.models.hf import load_adapted

    kind_of = raw.get("model_type")
    _torch_only(options, f"{path.name}: model type {kind_of!r} runs through transformers, not on the native stack")
    stored = Checkpoint(files or checkpoint_files(path))
    kind = options.kind or (torch.float32 if stored.dtype == torch.float16 else stored.dtype)
    sizes = [math.prod(shape) for _, shape in stored.shapes.values()]
    size = _fits(sum(sizes), 4 * max(sizes, default=0), kind, path, options.force)
    model = load_adapted(path, raw, kind, sum(sizes))
    return Loaded(model, tokenizer, model.config, str(path), kind, size)


def _with_generation(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """The config with the end tokens of both files, and the length of an answer.

    Instruct models often list their ends only in generation_config.
    """
    length = generation.get("max_new_tokens")
    config = config if length is None else {**config, "max_new_tokens": length}
    ends: list[Any] = []
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        ends += value if isinstance(value, list) else [] if value is None else [value]
    return {**config, "eos_token_id": list(dict.fromkeys(ends))} if all(isinstance(e, int) for e in ends) else config
