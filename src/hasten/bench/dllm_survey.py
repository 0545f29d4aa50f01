"""The families of diffusion language models (2506.13759): what is known of each, and what it can be combined with.

Facts are data, each with its source (families.json); None is unknown, and a fact whose value is None is known to be absent.
Nothing else is listed by hand: what hasten loads is read from its loaders, and which parts are legal is asked of the parts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any, Literal, NamedTuple, cast

from hasten import registry
from hasten.combine import combine
from hasten.engine.contracts import Backbone, Capabilities, MethodContext
from hasten.engine.masks import ALL_VISIBILITIES
from hasten.errors import ConfigError, HastenError, IncompatibleError, UnsupportedError, out_of_range, unknown_name
from hasten.models.hf import CANVASES
from hasten.models.load import load
from hasten.models.masked import MASKED
from hasten.pass_cost import PassCost
from hasten.types import MethodCard

card = MethodCard(
    slug="dllm-survey",
    title="Discrete Diffusion in Large Language and Multimodal Models: A Survey",
    paper="2506.13759",
    date="2025-06",
    plugs_into="bench",
    exactness="model",
    claim="One vocabulary of noise, attention, objective and caching describes every diffusion language model.",
    no_help="Questions of quality and speed: it says what can be combined, not what is worth it.",
)

_STORED = json.loads((resources.files("hasten.bench") / "families.json").read_text(encoding="utf-8"))
AXES: Mapping[str, Mapping[str, str]] = _STORED["axes"]  # the words of the taxonomy by field, and what each means
NUMBERS = ("shift", "mask_id", "block", "vocab_size", "max_len", "params", "active")  # params and active in 10^9
FACTS = (*(axis for axis in AXES if axis not in ("cache", "loads")), *NUMBERS, "eos_ids", "sampler", "license")
COLUMNS = ("family", "year", "noise", "attention", "block", "shift", "mask_id", "objective", "cache", "loads", "weights")
_SOURCE = re.compile(r"\d{4}\.\d{5}|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|web:\S+|transformers:\w+|hasten:\S+")
_WEIGHTS = {"name": 30, "title": 10, "aliases": 10, **dict.fromkeys(("paper", "year", "model_type", "released"), 10)}
_SEARCHED = {**_WEIGHTS, **dict.fromkeys(FACTS, 5), "cache": 5, "loads": 5, "note": 3, "meaning": 1, "sources": 1}
_SIGHT: Mapping[str, frozenset[str]] = {"prefix-lm": frozenset({"prefix_lm"}), "encoder-canvas": frozenset({"full"})}


class Fact(NamedTuple):
    """A value (None: known to be absent) and where it is from: arXiv id, released config (org/name), class or address."""

    value: Any
    source: str


@dataclass(frozen=True)
class Family:
    """One family of diffusion models: checked on construction, raises ConfigError naming `family.field`.

    `facts` maps each of FACTS to a Fact or None (unknown). `released` are hub names; `model_type` is that of config.json.
    """

    name: str
    title: str
    year: int
    paper: str | None
    model_type: str | None
    released: tuple[str, ...]
    aliases: tuple[str, ...]
    note: str
    facts: Mapping[str, Fact | None]

    def __post_init__(self) -> None:
        for field in sorted(set(FACTS) ^ set(self.facts)):
            known = field in FACTS
            raise out_of_range(f"{self.name}.{field}", "(missing)" if known else "(unknown)", f"one of {', '.join(FACTS)}")
        for field, fact in self.facts.items():
            if fact is not None:
                self._check_fact(field, fact)
        say = self._say
        mask, noise, block, attention = (self.facts[field] for field in ("mask_id", "noise", "block", "attention"))
        if noise and mask and noise.value == "absorbing" and mask.value is None:
            raise say("mask_id", None, "a token id: absorbing noise is made of masks")
        if noise and mask and noise.value == "uniform" and mask.value is not None:
            raise say("mask_id", mask.value, "null: uniform noise has no mask token")
        if attention and block and (attention.value in ("block-causal", "encoder-canvas")) == (block.value is None):
            with_blocks = "a size" if block.value is None else "null, as there are no blocks"
            raise say("block", block.value, f"{with_blocks} with {attention.value} attention")
        if self.known("weights") == "closed" and self.released:
            raise say("released", self.released, "empty: the weights are closed")
        if (size := self.known("vocab_size")) is not None:
            for field in ("mask_id", "eos_ids"):
                value = self.known(field)
                if value is not None and max(value if isinstance(value, list) else [value]) >= size:
                    raise say(field, value, f"below the vocabulary of {size}")
        if self.loads != "no":
            for field in ("noise", "attention", "shift", "mask_id", "block"):
                if self.facts[field] is None:
                    raise say(field, None, f"known: hasten loads model type {self.model_type}")

    def _say(self, field: str, value: object, allowed: str) -> ConfigError:
        return out_of_range(f"{self.name}.{field}", value, allowed)

    def _check_fact(self, field: str, fact: Fact) -> None:
        """One fact is of its kind, and its source can be found."""
        if not isinstance(fact.source, str) or not _SOURCE.fullmatch(fact.source):
            raise self._say(field, fact.source, "followed by its source: arXiv id, org/name, address, transformers:Class")
        value = fact.value
        if field in AXES:
            if value not in AXES[field]:
                raise self._say(field, value, ", ".join(AXES[field]))
        elif field == "eos_ids":
            if not isinstance(value, list) or not value or not all(type(one) is int and one >= 0 for one in value):
                raise self._say(field, value, "a list of token ids")
        elif field in NUMBERS:
            kinds = (int, float) if field in ("params", "active") else (int,)
            least = 0 if field in ("shift", "mask_id") else 1e-6
            if value is None and field in ("mask_id", "block"):
                return
            if type(value) not in kinds or not least <= value < math.inf or (field == "shift" and value > 1):
                raise self._say(
                    field, value, "0 or 1" if field == "shift" else "a number, and null only where one is absent"
                )
        elif not isinstance(value, str) or not value:
            raise self._say(field, value, "a text")

    def known(self, field: str) -> Any:
        """The value of a fact; None where it is unknown or absent."""
        fact = self.facts[field]
        return None if fact is None else fact.value

    @property
    def loads(self) -> Literal["hasten", "transformers", "no"]:
        """Which loader of hasten takes the family's config.json, from the loaders' own tables."""
        return "hasten" if self.model_type in MASKED else "transformers" if self.model_type in CANVASES else "no"

    @property
    def cache(self) -> Literal["exact", "approximate"] | None:
        """Whether keys of committed text stay valid; None where the attention is unknown."""
        attention = self.known("attention")
        return None if attention is None else "approximate" if attention == "full" else "exact"

    @cached_property
    def capabilities(self) -> Capabilities | None:
        """What a model of this family declares; None where hasten's models have no words for it, or it is unknown.

        Those are: other noise than masks and uniform tokens, a network that is told the noise level, and predictions other
        than clean tokens. Numbers that are unknown are stood in for: which parts are legal depends on their being there.
        """
        noise, attention = self.known("noise"), self.known("attention")
        told = self.known("time") in ("discrete", "continuous") or self.known("prediction") in ("score", "reverse", "rates")
        if attention is None or not (noise == "uniform" or (noise == "absorbing" and not told)):
            return None
        return Capabilities(
            kind="masked",
            vocab_size=self.known("vocab_size") or 1 << 18,
            max_len=self.known("max_len") or 4096,
            layers=1,
            hidden=1,
            visibilities=_SIGHT.get(attention, ALL_VISIBILITIES),
            cache_exact=frozenset({"block_causal"} if attention == "block-causal" else ()),
            hidden_states=True,
            embeds=True,
            self_conditioning=attention == "encoder-canvas",
            logit_shift=self.known("shift") or 0,
            mask_id=(self.known("mask_id") or 0) if noise == "absorbing" else None,
            eos_ids=tuple(self.known("eos_ids") or (1,)),
            block=None if attention in ("full", "prefix-lm") else self.known("block") or 32,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values: the facts with their sources, then what is derived."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "facts"}
        facts = {field: None if fact is None else fact._asdict() for field, fact in self.facts.items()}
        lists = {"released": list(self.released), "aliases": list(self.aliases)}
        return {**out, **lists, **facts, "cache": self.cache, "loads": self.loads}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What parts say to a family: legal, lacks (legal with what `reason` says is missing), refused, or unknown."""

    state: Literal["legal", "lacks", "refused", "unknown"]
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        """{"state", "reason"}."""
        return {"state": self.state, "reason": self.reason}


@lru_cache(maxsize=1)
def _all() -> Mapping[str, Family]:
    return {one["name"]: read(one) for one in _STORED["families"]}


def read(stored: Mapping[str, Any]) -> Family:
    """The family of one entry of families.json; raises ConfigError naming what is wrong with it."""
    facts = {field: None if fact is None else Fact(*fact) for field, fact in stored["facts"].items()}
    lists = {"released": tuple(stored["released"]), "aliases": tuple(stored["aliases"])}
    return Family(**{**stored, **lists, "facts": facts})


def family(name: str) -> Family:
    """The family of this name; raises UnknownNameError with the nearest names."""
    if name not in _all():
        raise unknown_name("family", name, _all(), "`hasten methods --families` lists all")
    return _all()[name]


def families(query: str = "") -> list[Family]:
    """The families in which every word of `query` is found, best first; all in order of the list without one.

    `field=value` asks for one: a fact (`noise=uniform`, `mask_id=none`), `cache=exact` (which allow an exact prefix cache),
    `loads=hasten`, `allows=freedave` (which parts are legal). Raises UnknownNameError for fields and words of the taxonomy
    that there are not.
    """
    words = query.split()
    for word in words:
        field, equals, value = word.lower().partition("=")
        if equals and field in AXES and value not in (*AXES[field], "none"):
            raise unknown_name(field, value, AXES[field])
        if equals and field == "allows" and value not in registry.PRESETS:
            registry.module(value)
    found = registry.search(_entries(any(word.lower().startswith("allows=") for word in words)), words, _SEARCHED)
    return [_all()[entry["name"]] for entry in found]


def near(query: str) -> list[str]:
    """Words of the registry that are spelt like those of `query` which no family has."""
    return registry.near(_entries(False), query.split(), _SEARCHED)


def _entries(allowed: bool) -> list[dict[str, Any]]:
    """The families as flat entries to search in; with `allowed` also what is legal on each."""
    out = []
    for one in _all().values():
        values = {field: one.known(field) for field in FACTS}
        entry = {**{name: getattr(one, name) for name in (*_WEIGHTS, "note", "cache", "loads")}, **values}
        entry["meaning"] = [AXES[axis][entry[axis]] for axis in AXES if entry[axis] is not None]
        entry["sources"] = sorted({fact.source for fact in one.facts.values() if fact is not None})
        entry["allows"] = []
        if allowed:
            slugs = (*registry.PRESETS, *registry.modules())
            entry["allows"] = [slug for slug in slugs if compatible(one.name, slug).state in ("legal", "lacks")]
        out.append(entry)
    return out


class _Described:
    """A model that is only described: what it declares, and no weights."""

    name = "described"

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities


class _Words:
    """A tokenizer of which no more is known than that one of its tokens breaks the line."""

    special_ids = range(1, 1 << 62)

    def token_bytes(self, token: int) -> bytes:
        """The line break of token 0."""
        return b"\n"


@lru_cache(maxsize=64)
def _context(name: str) -> MethodContext | None:
    """What parts are built for: the model itself where it comes with hasten, else its description."""
    one = family(name)
    if one.known("weights") == "bundled":
        loaded = load(name)
        return MethodContext(name, cast(Backbone, loaded.model), loaded.tokenizer)
    if one.capabilities is None:
        return None
    return MethodContext(name, cast(Backbone, _Described(one.capabilities)), _Words())


@lru_cache(maxsize=4096)
def compatible(name: str, *methods: str) -> Verdict:
    """Whether these methods or presets can be combined on a model of the family, as the parts themselves decide.

    Raises UnknownNameError for a family or method that there is not, UnsupportedError for a planned one.
    """
    if not methods:
        raise out_of_range("methods", methods, "at least one method")
    for method_name in methods:
        if registry.parse(method_name)[0] not in registry.PRESETS:
            registry.module(registry.parse(method_name)[0])
    context = _context(name)
    if context is None:
        return Verdict(
            "unknown", "its noise, time or prediction is unknown, or of a kind that hasten's models do not declare"
        )
    try:
        combine(methods, context, PassCost)
    except (IncompatibleError, UnsupportedError) as error:
        return Verdict("refused", str(error))
    except HastenError as error:
        return Verdict("lacks", str(error))
    return Verdict("legal")


def parts(name: str) -> dict[str, dict[str, str]]:
    """Slug -> verdict of every part of this version that a request can name, for one family."""
    slugs = [one.slug for one in registry.cards() if one.plugs_into in registry.FOLDERS]
    return {slug: compatible(name, slug).to_dict() for slug in slugs}


def grouped(name: str) -> list[tuple[str, list[str], str]]:
    """The verdicts of `parts` with equal reasons together: (state, slugs, reason), legal ones first."""
    found: dict[tuple[str, str], list[str]] = {}
    for slug, verdict in parts(name).items():
        reason = verdict["reason"].removeprefix(f"method {slug!r} ")
        found.setdefault((verdict["state"], reason), []).append(slug)
    order = ("legal", "lacks", "refused", "unknown")
    return [(state, found[state, reason], reason) for state, reason in sorted(found, key=lambda key: order.index(key[0]))]


def checkpoint(name: str) -> str:
    """What `hasten.load` takes for this family: the hub name of its first release.

    Raises UnsupportedError naming `weights` where they are closed or were not released, `model_type` where hasten does not
    load them.
    """
    one = family(name)
    if not one.released:
        why = "are closed" if one.known("weights") == "closed" else "were not released, as far as is known"
        raise UnsupportedError(
            f"the weights of {one.title} {why}", hint="choose a family with loads=hasten", field="weights"
        )
    if one.loads == "no":
        raise UnsupportedError(
            f"hasten does not load {one.title}: none of its loaders knows model type {one.model_type!r}",
            hint="choose a family with loads=hasten",
            field="model_type",
        )
    return one.released[0]


def shown(fact: Fact | None) -> str:
    """A fact as people read it: ? for unknown, none for absent."""
    if fact is None:
        return "?"
    value = fact.value
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def cells(one: Family) -> tuple[str, ...]:
    """The row of a family under COLUMNS."""
    derived = {"family": one.name, "year": str(one.year), "cache": one.cache or "?", "loads": one.loads}
    return tuple(derived.get(name) or shown(one.facts[name]) for name in COLUMNS)


@dataclass(frozen=True, slots=True)
class Config:
    """Nothing to set."""


class Survey:
    """The registry as seen from one model: `families` that share its model type, and what its parts say to each other."""

    def __init__(self, config: Config, context: MethodContext) -> None:
        kind = getattr(getattr(context.backbone, "config", None), "family", None)
        alike = [one for one in _all().values() if one.model_type == kind and kind is not None]
        named = [one for one in alike if context.model in (one.name, *one.released)]
        self.families = tuple(named or [one for one in alike if one.known("weights") != "bundled"])


method = Survey
