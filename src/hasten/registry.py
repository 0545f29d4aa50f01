"""Slug -> module, found by file name; nothing is registered by hand.

A method lives in one file of a method folder: `draft/prompt_lookup.py` is the method `prompt-lookup`. The file holds
`card` (a MethodCard), `Config` (a frozen dataclass) and one class, named by `method`, built as `method(config, context)`.
Third parties add methods through entry points of the group "hasten.methods" (name = slug, value = module).
`bench` holds more than methods: there, a file is one when a work of the list has its name.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from importlib import metadata, resources
from types import ModuleType
from typing import Any

from hasten.errors import ConfigError, UnsupportedError, out_of_range, unknown_name
from hasten.types import MethodCard

FOLDERS = ("draft", "unmask", "logits", "compress", "reduce", "arch", "embed", "privacy")
MIXED = ("bench",)  # folders in which only files named after a work of theirs are methods
SEARCHED: Mapping[str, int] = {
    "slug": 30,
    **dict.fromkeys(("title", "state", "exactness", "paper", "date", "venue", "folder"), 10),
    **dict.fromkeys(("plugs_into", "claim", "does"), 5),
    **dict.fromkeys(("no_help", "needs", "conflicts", "knobs"), 2),
    **dict.fromkeys(("show", "file"), 1),
}  # the fields of a catalog entry, and what a hit of a search in each is worth
_GROUP = "hasten.methods"
PRESETS: Mapping[str, tuple[str, ...]] = {
    "auto": ("reference", "freedave:d=0"),
    "plain": ("reference",),
    "exact": ("reference", "freedave:d=0"),
    "fast": ("threshold", "canvas-cache"),
    "few-step": ("eoser-ass",),
}  # what the names stand for on a model that fills canvases mask by mask
UNIFORM: Mapping[str, tuple[str, ...]] = {
    **PRESETS,
    **dict.fromkeys(("auto", "plain", "exact"), ("diffusion-gemma",)),
}  # and on one without a mask token, whose canvas holds random ids
BLOCKS: Mapping[str, tuple[str, ...]] = {
    **PRESETS,
    "fast": ("factor:f=0.5",),
}  # and on one that is causal from block to block, whose cache is there anyhow and exact


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
    named = {(work["folder"], work["slug"]) for work in _stored()}
    for folder in (*FOLDERS, *MIXED):
        root = resources.files("hasten") / folder
        if not root.is_dir():
            continue
        for entry in root.iterdir():
            stem, _, suffix = entry.name.partition(".")
            slug = stem.replace("_", "-")
            if suffix == "py" and not stem.startswith("_") and (folder in FOLDERS or (folder, slug) in named):
                found[slug] = f"hasten.{folder}.{stem}"
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
        raise unknown_name("method", slug, {*modules(), *planned, "auto", "plain", "tuned"}, "`hasten methods` lists all")
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
def _stored() -> list[dict[str, str]]:
    listed: list[dict[str, str]] = json.loads((resources.files("hasten") / "works.json").read_text(encoding="utf-8"))
    return listed


@lru_cache(maxsize=1)
def works() -> tuple[Work, ...]:
    """The 54 works of the list, by slug, with their state in this version."""
    landed = modules()
    return tuple(Work(**{**entry, "state": "works" if entry["slug"] in landed else "planned"}) for entry in _stored())


def catalog() -> list[dict[str, Any]]:
    """Every method of this version and every planned work as one JSON-ready entry of the same fields, what works first.

    `claim` is the card's where there is one; `does` is what the list says of a work, "" for baselines, which are not on it.
    """
    found: dict[str, dict[str, Any]] = {}
    blank = {"no_help": "", "needs": (), "conflicts": (), "knobs": {}, "file": ""}
    for work in works():
        found[work.slug] = {**work.to_dict(), "does": work.claim, **blank}
    for slug, name in modules().items():
        own = card(slug).to_dict()
        listed = found.get(slug, {"venue": "", "show": "", "does": "", "folder": own["plugs_into"]})
        found[slug] = {**listed, **own, "state": "works", "file": f"{name.replace('.', '/')}.py"}
    entries = [{field: entry[field] for field in SEARCHED} for entry in found.values()]
    return sorted(entries, key=lambda entry: (entry["state"] != "works", entry["slug"]))


def served() -> dict[str, Any]:
    """What a page needs to show and to search the catalog as `hasten methods` does, JSON-ready."""
    presets = {name: list(parts) for name, parts in PRESETS.items()}
    return {"methods": catalog(), "searched": dict(SEARCHED), "presets": presets}


def search(
    entries: Iterable[Mapping[str, Any]], query: Sequence[str], weights: Mapping[str, int]
) -> list[Mapping[str, Any]]:
    """The entries in which every word of `query` is found, best first; in their own order where equally good.

    A word is looked for in the fields that `weights` names, without regard to case; `field=value` asks for a field that is,
    or a list that holds, exactly this (none: nothing). Whole words count twice, whole texts three times.

    Raises UnknownNameError for a field that entries do not have.
    """
    words = [word.lower() for word in query]
    scored = []
    for entry in entries:
        hits = [_hit(entry, word, weights) for word in words]
        if all(hits):
            scored.append((sum(hits), entry))
    return [entry for _, entry in sorted(scored, key=lambda pair: -pair[0])]


def near(entries: Iterable[Mapping[str, Any]], query: Sequence[str], weights: Mapping[str, int]) -> list[str]:
    """Words of the entries that are spelt like those words of `query` that no entry has; at most three."""
    texts = [text for entry in entries for field in weights for text in _texts(entry[field])]
    known = {word for text in texts for word in (text, *re.findall(r"[a-z0-9][a-z0-9.+-]*", text)) if len(word) <= 40}
    lost = [word.lower() for word in query if "=" not in word and not any(word.lower() in text for text in texts)]
    return [word for one in lost for word in get_close_matches(one, known, n=3, cutoff=0.7)][:3]


def _texts(value: Any) -> list[str]:
    """The texts that a field holds, in lower case."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for one in pair for text in _texts(one)]
    if isinstance(value, (tuple, list)):
        return [text for one in value for text in _texts(one)]
    return [] if value is None or value == "" else [str(value).lower()]


def _hit(entry: Mapping[str, Any], word: str, weights: Mapping[str, int]) -> int:
    """What the best place of `word` in the entry is worth, 0 where it is not found."""
    field, equals, value = word.partition("=")
    if equals:
        if field not in entry:
            raise unknown_name("field", field, entry)
        return int(value in (_texts(entry[field]) or ["none"]))
    whole = re.compile(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])")
    return max(
        (
            weight * (3 if text == word else 2 if whole.search(text) else 1)
            for name, weight in weights.items()
            for text in _texts(entry[name])
            if word in text
        ),
        default=0,
    )


def expand(names: tuple[str, ...], presets: Mapping[str, tuple[str, ...]] = PRESETS) -> tuple[str, ...]:
    """`names` with each preset of canvas methods replaced by its parts; raises ConfigError for a preset with settings."""
    out: list[str] = []
    for name in names:
        slug, settings = parse(name)
        if slug in presets and settings:
            raise ConfigError(f"{slug!r} is a preset of {', '.join(presets[slug])}; give settings to those", field="method")
        out += presets.get(slug, (name,))
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


def configure(spec: str) -> Any:
    """The checked Config of the method named by `spec` ("slug" or "slug:knob=value"), without building it.

    Raises as `module` does, and ConfigError naming an unknown knob or a value outside its range.
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
    return found.Config(**values)


def build(spec: str, context: Any) -> Any:
    """The part named by `spec` ("slug" or "slug:knob=value"), configured and built for `context`.

    Raises ConfigError naming an unknown knob or a value outside its range.
    """
    return module(parse(spec)[0]).method(configure(spec), context)


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
