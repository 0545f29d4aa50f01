"""The combinations that `hasten tune` tries on a model: methods that can be chosen per request, with their settings.

Every candidate is legal: its parts were built for the model before it is listed. What could not be built alone (weights
that were not trained, a draft model that was not named) is told with its reason.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from hasten import registry
from hasten.combine import presets
from hasten.engine.contracts import MethodContext
from hasten.errors import HastenError, out_of_range
from hasten.policy import Policy

if TYPE_CHECKING:
    from hasten.llm import LLM

EXACT_LAWS = (None, "greedy", "match", "rejection")
# Settings to try besides a method's own defaults (""); a method that is not listed is tried as it is.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "prompt-lookup": ("", "nodes=8", "max_ngram=4,nodes=12", "min_ngram=2", "pick=first"),
    "token-recycling": ("", "nodes=8", "nodes=48", "learn_prompt=true", "table=row"),
    "aded": ("", "nodes=8", "iterations=80", "depth=5", "learn_prompt=false"),
    "eagle": ("", "nodes=8", "depth=2", "depth=6", "floor=0.2"),
    "fspad": ("", "nodes=8", "depth=2", "depth=6", "floor=0.2"),
    "medusa": ("", "nodes=8", "ranks=5", "floor=0.05"),
    "hidden-transfer": ("", "nodes=4", "ranks=1", "mode=fused"),
    "lud": ("", "beta=0.5", "places=all", "mode=trust,beta=0.9"),
    "tvdpp": ("", "nodes=2", "nodes=5"),
    "freedave": ("d=0", "d=2", "d=4", "d=8"),
    "threshold": ("", "tau=0.95", "tau=0.8", "tau=0.7"),
    "factor": ("", "f=0.5", "f=0.25", "f=2"),
    "hierarchy": ("", "tau=0.95", "low=0.6"),
    "entropy-bound": ("", "bound=0.05", "bound=0.3"),
    "localleap": ("", "tau=0.85", "kappa=0.95,tau=0.85", "radius=8"),
    "learn2pd": ("", "tau=0.9"),
    "dparallel": ("", "tau=0.3", "tau=0.8"),
    "canvas-cache": ("", "policy=prefix", "policy=vicinity", "refresh=4"),
    "adablock": ("", "block=16", "block=64"),
    "prophet": ("", "early=10,middle=7.5,late=5"),
    "creditdecoding": ("", "fusion=0.4"),
    "eoser-ass": ("", "ass=false"),
    "edit": ("",),
    "remask": ("",),
}
# Not ways to be faster: the baselines of canvases, which others are measured against, and a second forward per step.
_SAMPLERS = ("reference", "dream", "guidance")
_TRIES = 60  # draws per candidate that is wanted, until there is nothing new
MOST = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """A combination of methods, by names with settings; `exact` when its parts promise the baseline's own text."""

    methods: tuple[str, ...]
    exact: bool

    def __str__(self) -> str:
        return " + ".join(self.methods)


@dataclass(frozen=True, slots=True)
class Space:
    """The candidates in the order they are tried, the baseline, and method -> why it could not be tried alone."""

    baseline: Candidate
    candidates: tuple[Candidate, ...]
    left_out: Mapping[str, str]


def space(llm: LLM, *, lossy: bool, seed: int = 0, most: int = 24) -> Space:
    """At most `most` candidates for a model: presets and single methods, then combinations drawn by `seed`.

    Without `lossy` only those whose parts promise the baseline's text. The same seed, model and version give the same ones.
    Raises ConfigError for a number outside [1, 256].
    """
    if not 1 <= most <= MOST:
        raise out_of_range("candidates", most, f"in [1, {MOST}]")
    rng = random.Random(f"{seed} candidates")  # noqa: S311 - an order of trials, not a secret
    masked = llm.model.capabilities.kind == "masked"
    usable, left_out = _usable(llm, lossy)
    baseline = Candidate(("reference",) if llm.model.capabilities.mask_id is not None else ("plain",), True)
    found: dict[frozenset[str], Candidate] = {frozenset(baseline.methods) - {"reference"}: baseline}

    def offer(names: Sequence[str]) -> None:
        key = frozenset(registry.expand(tuple(names)) if masked else names) - {"reference"}
        if key in found or len(found) > most:
            return
        one = candidate(llm, tuple(names))
        if one is not None and (lossy or one.exact):
            found[key] = one

    offer(("auto",))
    if lossy and masked:
        for preset in ("fast", "few-step"):
            offer(presets(llm.model.capabilities)[preset])
    singles = [options[0] for options in usable.values()]
    rng.shuffle(singles)
    for spec in singles:
        offer((spec,))
    for _ in range(_TRIES * most):
        if len(found) > most:
            break
        offer(_draw(rng, usable, llm, masked))
    return Space(baseline, tuple(one for one in found.values() if one is not baseline), left_out)


def candidate(llm: LLM, names: tuple[str, ...]) -> Candidate | None:
    """The candidate of these names; None where they cannot be combined on this model."""
    try:
        llm.parts(names)
        return Candidate(names, promises_exact(llm, names))
    except HastenError:
        return None


def promises_exact(llm: LLM, names: Sequence[str]) -> bool:
    """Whether these methods, as they are set, promise the text of the baseline.

    From left to right: every drafter is verified under a law that keeps the model's choice, and no rule changes logits.
    On a canvas: nothing but a lossless stepper or a cache that is exact for the model; another sampler gives another text.
    """
    caps = llm.model.capabilities
    if caps.kind != "masked":
        built = [_build(llm, name) for name in names if name not in ("auto", "plain", "tuned")]
        slugs = [registry.parse(name)[0] for name in names]
        cards = [registry.card(slug) for slug in slugs if slug not in ("auto", "plain", "tuned")]
        return all(one.plugs_into == "draft" and one.exactness in ("exact", "distribution") for one in cards) and all(
            getattr(drafter, "law", None) in EXACT_LAWS for drafter in built
        )
    for name in registry.expand(tuple(names)):
        if name == "reference":
            continue
        policy = _build(llm, name).policy
        if _claims(policy) - {"stepper", "cache"}:
            return False
        if policy.stepper is not None and not policy.stepper.lossless:
            return False
        if policy.cache is not None and not policy.cache.exact(caps):
            return False
    return True


def _build(llm: LLM, spec: str) -> Any:
    return registry.build(spec, MethodContext(llm.name, llm.model, llm.tokenizer))


def _claims(policy: Policy) -> set[str]:
    """The places of a canvas's policy that a method fills."""
    return {f.name for f in fields(policy) if getattr(policy, f.name)}


def _usable(llm: LLM, lossy: bool) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Slug -> specs of every method that works alone on this model, and slug -> why another does not."""
    folder = "unmask" if llm.model.capabilities.kind == "masked" else "draft"
    usable: dict[str, tuple[str, ...]] = {}
    left_out: dict[str, str] = {}
    for card in registry.cards():
        if card.plugs_into != folder or card.slug in _SAMPLERS or (card.exactness == "lossy" and not lossy):
            continue
        specs = []
        for settings in SETTINGS.get(card.slug, ("",)):
            spec = f"{card.slug}:{settings}" if settings else card.slug
            try:
                llm.parts((spec,))
            except HastenError as error:
                left_out.setdefault(card.slug, str(error))
                continue
            if lossy or promises_exact(llm, (spec,)):
                specs.append(spec)
        if specs:
            left_out.pop(card.slug, None)
            usable[card.slug] = tuple(specs)
    return usable, left_out


def _draw(rng: random.Random, usable: Mapping[str, tuple[str, ...]], llm: LLM, masked: bool) -> tuple[str, ...]:
    """One to three methods with settings; on a canvas only such as fill different places."""
    slugs = list(usable)
    rng.shuffle(slugs)
    size = rng.randint(1, 3)
    chosen: list[str] = []
    claimed: set[str] = set()
    for slug in slugs:
        if len(chosen) == size:
            break
        spec = rng.choice(usable[slug])
        claims = _claims(_build(llm, spec).policy) if masked else set()
        if not claims & claimed:
            chosen.append(spec)
            claimed |= claims
    return tuple(sorted(chosen))
