"""The record of a measurement: what was compared, what came out, on which machine; as JSON that is checked when read."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hasten.errors import FormatError, out_of_range

Progress = Callable[[str, int, int], None]

_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
_FEATURES_ARM = ("asimddp", "bf16", "i8mm", "sve", "sve2")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_MACHINE = ("cpu", "cpu_features", "threads", "memory_gb", "python", "torch", "hasten")


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure measured several times: its median, least and greatest value."""

    median: float
    min: float
    max: float

    def __post_init__(self) -> None:
        for name in ("median", "min", "max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise out_of_range(f"spread.{name}", value, "a finite number")
        if not self.min <= self.median <= self.max:
            raise out_of_range("spread", (self.min, self.median, self.max), "min <= median <= max")

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 3) -> Spread:
        """The spread of `values`, rounded to `digits`; raises ConfigError when there are none."""
        if not values:
            raise out_of_range("values", values, "at least one number")
        return cls(*(round(value, digits) for value in (statistics.median(values), min(values), max(values))))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f}-{self.max:.2f})"

    def to_dict(self) -> dict[str, float]:
        """{"median", "min", "max"}."""
        return {"median": self.median, "min": self.min, "max": self.max}


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What trying the claim of one work on this machine gave.

    `slug` and `claim` are the work's. `direction_holds`: whether the comparison came out the way the work says.
    `speedup`: the baseline's time divided by the method's, one value per seed; None where nothing was timed. `quality`:
    what "baseline" and "method" reached on the same measure (for exact methods: texts equal to plain decoding's).
    `extra`: further figures, JSON-ready. `no_help`: where it did not help, as measured here. `machine`: `machine()`.
    `seeds`: those the prompts, data or weights were drawn by. `seconds`: what all of it took.

    Raises ConfigError naming the field.
    """

    slug: str
    claim: str
    direction_holds: bool
    speedup: Spread | None
    quality: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    no_help: str = ""
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())
    seeds: tuple[int, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.slug, str) or not _SLUG.fullmatch(self.slug):
            raise out_of_range("slug", self.slug, "words of lower-case letters and digits joined by hyphens")
        for name in ("claim", "no_help"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise out_of_range(name, text, "a sentence")
        if not isinstance(self.direction_holds, bool):
            raise out_of_range("direction_holds", self.direction_holds, "true or false")
        if self.speedup is not None and not isinstance(self.speedup, Spread):
            raise out_of_range("speedup", self.speedup, "a Spread, or None where nothing was timed")
        if not isinstance(self.quality, Mapping) or set(self.quality) != {"baseline", "method"}:
            raise out_of_range("quality", self.quality, 'a mapping with "baseline" and "method"')
        if not isinstance(self.machine, Mapping) or not set(_MACHINE) <= set(self.machine):
            raise out_of_range("machine", self.machine, f"a mapping with {', '.join(_MACHINE)}")
        seeds = self.seeds
        if not isinstance(seeds, tuple) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise out_of_range("seeds", seeds, "integers >= 0, at least one")
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not self.seconds >= 0:
            raise out_of_range("seconds", self.seconds, "a number >= 0")
        for name in ("quality", "extra", "machine"):
            try:
                json.dumps(getattr(self, name), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise out_of_range(name, getattr(self, name), f"values that JSON can hold ({error})") from None

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values, in the order of its fields."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        spread = None if self.speedup is None else self.speedup.to_dict()
        return {**out, "speedup": spread, "seeds": list(self.seeds)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reproduction:
        """The record `to_dict` gave; raises ConfigError naming a field that is missing, unknown or wrong."""
        names = {f.name for f in fields(cls)}
        for name in sorted(names ^ set(values)):
            raise out_of_range(
                name, "(missing)" if name in names else "(unknown)", f"one of exactly {', '.join(sorted(names))}"
            )
        made: dict[str, Any] = dict(values)
        if isinstance(made["speedup"], Mapping):
            if set(made["speedup"]) != {"median", "min", "max"}:
                raise out_of_range("speedup", made["speedup"], "a mapping with median, min and max, or null")
            made["speedup"] = Spread(**made["speedup"])
        if isinstance(made["seeds"], list):
            made["seeds"] = tuple(made["seeds"])
        return cls(**made)


def write(result: Reproduction, folder: Path) -> Path:
    """Write `<slug>.json` into `folder`, which is made if need be, and return its path; never leaves half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.slug}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read(path: Path) -> Reproduction:
    """The record in a file that `write` made; raises FormatError naming the file and what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise out_of_range("the file", values, "a JSON object")
        result = Reproduction.from_dict(values)
    except (OSError, ValueError) as error:
        raise FormatError(str(error), path=str(path), hint="`hasten reproduce` makes it anew") from None
    if path.stem != result.slug:
        raise FormatError(f"it holds the result of {result.slug!r}", path=str(path), hint="name it after its method")
    return result


def processor() -> tuple[str, str]:
    """Name of the CPU and the features that matter for speed, as the system reports them; "unknown" where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), "unknown"
    entries = dict(reversed([line.split(":", 1) for line in text.splitlines() if ":" in line]))  # the first core's win
    facts = {name.strip(): value.strip() for name, value in entries.items()}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    found = [name for name in (*_FEATURES, *_FEATURES_ARM) if name in flags]
    return facts.get("model name") or platform.machine(), " ".join(found) or "none of those that matter"


def _memory_gb() -> float:
    """Physical memory in 10^9 bytes; 0 where the system does not say."""
    ask = getattr(os, "sysconf", lambda name: 0)
    return round(max(0, ask("SC_PHYS_PAGES")) * max(0, ask("SC_PAGE_SIZE")) / 1e9, 1)


def commit(folder: Path | None = None) -> str:
    """The commit of the git tree that holds this package, with "+" for changes since; "" outside of one.

    A package installed inside somebody else's tree, as in its .venv, is not of that tree.
    """
    folder = folder or Path(__file__).parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(  # noqa: S603 - fixed words
                ["git", *words],  # noqa: S607 - whichever git the person uses
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    head = git("rev-parse", "--short", "HEAD")
    return head + ("+" if git("status", "--porcelain", ".") else "") if head else ""


def machine(*libraries: str) -> dict[str, Any]:
    """What figures depend on: processor, threads, memory, versions (python, torch, hasten, `libraries`), commit and date.

    Raises PackageNotFoundError for a library that is not installed.
    """
    from importlib import metadata

    import torch

    from hasten import __version__

    cpu, features = processor()
    return {
        "cpu": cpu,
        "cpu_features": features,
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in libraries},
        "hasten": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
