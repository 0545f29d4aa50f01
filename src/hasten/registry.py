"""Slug -> module, found by file name; nothing is registered by hand.

A method lives in one file of a method folder: `draft/prompt_lookup.py` is the method `prompt-lookup`. The file holds
`card` (a MethodCard), `Config` (a frozen dataclass) and one class, named by `method`, built as `method(config, context)`.
Third parties add methods through entry points of the group "hasten.methods" (name = slug, value = module).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import metadata, resources
from types import ModuleType
from typing import Any

from hasten.errors import ConfigError, UnsupportedError, out_of_range, unknown_name
from hasten.types import MethodCard

FOLDERS = ("draft", "unmask", "logits", "compress", "reduce", "arch", "embed", "privacy")
_GROUP = "hasten.methods"
PRESETS: Mapping[str, tuple[str, ...]] = {
    "auto": ("reference", "freedave:d=0"),
    "plain": ("reference",),
    "exact": ("reference", "freedave:d=0"),
    "fast": ("factor:f=0.5", "canvas-cache"),
    "few-step": ("eoser-ass",),
}  # what the names stand for on a model that fills canvases


@dataclass(frozen=True, slots=True)
class Work:
    """One of the 54 published works of hasten's list; `state` is "works" once its method has landed, else "planned"."""

    slug: str
    title: str
    paper: str
    date: str
    venue: str
    folder: str
    plugs_into: str
    exactness: str
    claim: str
    show: str
    state: str

    def to_dict(self) -> dict[str, str]:
        """The work as JSON-ready values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@lru_cache(maxsize=1)
def modules() -> Mapping[str, str]:
    """Slug -> dotted module of every method that can be used, without importing any of them."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        root = resources.files("hasten") / folder
        if not root.is_dir():
            continue
        for entry in root.iterdir():
            stem, _, suffix = entry.name.partition(".")
            if suffix == "py" and not stem.startswith("_"):
                found[stem.replace("_", "-")] = f"hasten.{folder}.{stem}"
    for point in metadata.entry_points(group=_GROUP):
        found.setdefault(point.name, point.value)
    return dict(sorted(found.items()))


def module(slug: str) -> ModuleType:
    """The module of a method.

    Raises UnsupportedError for a work that is planned but not in this version, UnknownNameError for anything else.
    """
    name = modules().get(slug)
    if name is None:
        planned = {work.slug: work for work in works()}
        if slug in planned:
            raise UnsupportedError(
                f"method {slug!r} ({planned[slug].title}) is planned and not in this version",
                hint="`hasten methods` lists what works",
                field="method",
            )
        raise unknown_name("method", slug, {*modules(), *planned, "auto", "plain"}, "`hasten methods` lists all")
    return importlib.import_module(name)


def card(slug: str) -> MethodCard:
    """The card of a method; raises as `module` does, and ConfigError when the module's card is not its own."""
    found = getattr(module(slug), "card", None)
    if not isinstance(found, MethodCard) or found.slug != slug:
        raise ConfigError(f"module {modules()[slug]} does not declare the card of {slug!r}", field="card")
    return found


def cards() -> list[MethodCard]:
    """The cards of all methods of this version, by slug."""
    return [card(slug) for slug in modules()]


@lru_cache(maxsize=1)
def works() -> tuple[Work, ...]:
    """The 54 works of the list, by slug, with their state in this version."""
    stored = json.loads((resources.files("hasten") / "works.json").read_text(encoding="utf-8"))
    landed = modules()
    return tuple(Work(**{**entry, "state": "works" if entry["slug"] in landed else "planned"}) for entry in stored)


def expand(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names` with each preset of canvas methods replaced by its parts; raises ConfigError for a preset with settings."""
    out: list[str] = []
    for name in names:
        slug, settings = parse(name)
        if slug in PRESETS and settings:
            raise ConfigError(f"{slug!r} is a preset of {', '.join(PRESETS[slug])}; give settings to those", field="method")
        out += PRESETS.get(slug, (name,))
    return tuple(out)


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """Split "slug" or "slug:knob=value,knob=value" into the slug and its settings, as text."""
    slug, _, rest = spec.partition(":")
    settings: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        knob, equals, value = part.partition("=")
        if not equals or not knob:
            raise out_of_range("method", spec, "slug or slug:knob=value,knob=value")
        settings[knob.strip()] = value.strip()
    return slug.strip(), settings


def build(spec: str, context: Any) -> Any:
    """The part named by `spec` ("slug" or "slug:knob=value"), configured and built for `context`.

    Raises ConfigError naming an unknown knob or a value outside its range.
    """
    slug, settings = parse(spec)
    found = module(slug)
    known = {f.name: f for f in fields(found.Config)}
    values: dict[str, Any] = {}
    for knob, text in settings.items():
        if knob not in known:
            raise unknown_name(f"knob of {slug}", knob, known)
        default = known[knob].default
        values[knob] = _value(f"{slug}.{knob}", text, type(default))
    return found.method(found.Config(**values), context)


def _value(name: str, text: str, kind: type) -> Any:
    """`text` as the type of the knob's default."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise out_of_range(name, text, "true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise out_of_range(name, text, "an integer" if kind is int else "a number") from None
    return text
