"""What `hasten tune` found for one model on one machine: a profile in the cache folder, which method "tuned" reads.

A profile belongs to a model (a hash of its sizes and of samples of all its weights), a processor, a number of threads and
the way the model was loaded; with any of them another, it is not used. It is one JSON file, written at once or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from hasten import registry
from hasten.engine.contracts import Backbone
from hasten.errors import ConfigError, FormatError, out_of_range
from hasten.models.cost import machine_key, processor
from hasten.models.feature import identity
from hasten.models.fetch import cache_dir
from hasten.models.native import NativeStack

VERSION = 1
_SAMPLE = 4096  # bytes of every matrix that enter the hash
_BYTES = 1 << 20  # a profile's size at most
_NAMES = 16  # methods of a combination at most


@dataclass(frozen=True, slots=True)
class Profile:
    """The fastest combination found: its `method` names, for the model and machine that these two say.

    `name` is what the model was called, `baseline` what it was measured against, `speedup` {median, min, max} of the
    baseline's time over its own, `exact` whether its text is the baseline's, else `max_quality_loss` (a share) is the
    budget it kept. `why` says it in words, `measured` holds further figures. Raises ConfigError naming the field.
    """

    model: str
    machine: str
    name: str
    method: tuple[str, ...]
    baseline: str
    exact: bool
    max_quality_loss: float
    speedup: Mapping[str, float]
    why: str
    hasten: str
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in ("model", "machine", "name", "baseline", "why", "hasten", "date"):
            if not isinstance(getattr(self, one), str) or not getattr(self, one):
                raise out_of_range(one, getattr(self, one), "a text")
        names = self.method
        if (
            not isinstance(names, tuple)
            or not 1 <= len(names) <= _NAMES
            or not all(isinstance(n, str) and n for n in names)
        ):
            raise out_of_range("method", names, f"1 to {_NAMES} method names")
        if any(registry.parse(one)[0] == "tuned" for one in names):
            raise out_of_range("method", names, "methods other than tuned itself")
        if not isinstance(self.exact, bool):
            raise out_of_range("exact", self.exact, "true or false")
        if type(self.max_quality_loss) not in (int, float) or not 0 <= self.max_quality_loss < 1:
            raise out_of_range("max_quality_loss", self.max_quality_loss, "a share in [0, 1)")
        if not self.exact and not self.max_quality_loss:
            raise out_of_range("exact", self.exact, "true without a budget for quality")
        figures = self.speedup
        if not isinstance(figures, Mapping) or set(figures) != {"median", "min", "max"}:
            raise out_of_range("speedup", figures, "a mapping with median, min and max")
        if not all(type(one) in (int, float) and 0 < one < 1e9 for one in figures.values()):
            raise out_of_range("speedup", figures, "numbers above 0")
        if not isinstance(self.measured, Mapping):
            raise out_of_range("measured", self.measured, "a mapping")


def fingerprint(model: Backbone, name: str) -> str:
    """What tells this model from any other: its `identity`, and a hash of a piece of each of its weights.

    Models outside hasten's own stack go by `name`.
    """
    digest = hashlib.sha256()
    if isinstance(model, NativeStack):
        for key, matrix in sorted(model.weights.matrices.items()):
            digest.update(key.encode() + matrix.data.reshape(-1)[:_SAMPLE].tobytes())
        for key, vector in sorted(model.weights.vectors.items()):
            digest.update(key.encode() + vector.reshape(-1)[:_SAMPLE].tobytes())
    elif isinstance(model, torch.nn.Module):
        for key, tensor in sorted(model.named_parameters()):
            piece = tensor.detach().flatten()[: _SAMPLE // 4].to(torch.float32)
            digest.update(key.encode() + piece.numpy().tobytes())
    return f"{identity(model, name)}-{digest.hexdigest()[:16]}"


def machine(model: Backbone) -> str:
    """The processor, its threads and how the model was loaded: what a measured speed holds for, in words."""
    if isinstance(model, NativeStack):
        return machine_key(model)
    return f"{processor()}, {torch.get_num_threads()} threads, {model.name}, {getattr(model, 'dtype', 'no dtype')}"


def place(model: Backbone, name: str) -> Path:
    """Where the profile of this model on this machine lies, whether it is there or not."""
    key = f"{fingerprint(model, name)}\n{machine(model)}"
    return cache_dir() / "tuned" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def prepare(model: Backbone, name: str) -> None:
    """Make the folder of profiles; raises ConfigError where nothing can be written there."""
    folder = place(model, name).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"a profile cannot be stored in {folder} ({error.strerror or error})",
            hint="set HASTEN_HOME to a folder that can be written",
            field="HASTEN_HOME",
        ) from None


def write(profile: Profile, model: Backbone, name: str) -> Path:
    """Store a profile in place of the one before, and return its path; never leaves half a file."""
    path = place(model, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    text = json.dumps({"version": VERSION, **asdict(profile)}, indent=1, ensure_ascii=False, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read(model: Backbone, name: str) -> Profile:
    """The profile of this model on this machine.

    Raises ConfigError when there is none, FormatError when its file is damaged, of another version, or says that it belongs
    to another model or machine; all of them name the command that makes one.
    """
    path, anew = place(model, name), f"hasten tune {name}"
    try:
        with path.open("rb") as file:
            raw = file.read(_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"method 'tuned': nothing was tuned for model {name!r} on this machine as it is loaded now ({machine(model)})",
            hint=f"run `{anew}` first, with the same threads and loading options",
            field="method",
        ) from None
    except OSError as error:
        raise FormatError(f"it cannot be read ({error.strerror or error})", path=str(path), hint=f"`{anew}`") from None
    try:
        if len(raw) > _BYTES:
            raise out_of_range("the file", f"over {_BYTES} bytes", "a profile")
        values = json.loads(raw.decode("utf-8"))
        if not isinstance(values, dict):
            raise out_of_range("the file", values, "a JSON object")
        version = values.pop("version", None)
        if version != VERSION:
            raise out_of_range("version", version, f"{VERSION}, which this version of hasten reads")
        wrong = sorted({f.name for f in fields(Profile)} ^ set(values))
        if wrong:
            raise out_of_range(wrong[0], "(missing or unknown)", "one of a profile's fields, each once")
        if isinstance(values["method"], list):
            values["method"] = tuple(values["method"])
        profile = Profile(**values)
        for one, own in (("model", fingerprint(model, name)), ("machine", machine(model))):
            if getattr(profile, one) != own:
                raise out_of_range(one, getattr(profile, one), f"{own!r}, the one in use")
    except (ValueError, RecursionError) as error:
        raise FormatError(str(error), path=str(path), hint=f"`{anew}` makes it anew", field="method") from None
    return profile
