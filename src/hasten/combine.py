"""From method names to the parts of a request: which belong together, and which pairs are refused, by both names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from hasten import registry
from hasten.engine.contracts import Capabilities, MethodContext
from hasten.engine.engine import PLAIN, Parts
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, IncompatibleError
from hasten.policy import Policy
from hasten.types import MethodCard
from hasten.union import Union

if TYPE_CHECKING:
    from hasten.pass_cost import PassCost

AUTO: tuple[str, ...] = ("prompt-lookup", "token-recycling")  # what "auto" drafts with: exact, untrained, any causal model
TRAINED = ("aded", "fspad")  # and with those of these that were made for the model
# On the native stack only the first of each: beside its short passes the others take longer than they save (bench/spec.py).
LARGE = 200_000_000  # bytes of packed weights that take about 8 ms to read: long beside the 1.3 ms of a draft from a table


def presets(capabilities: Capabilities) -> Mapping[str, tuple[str, ...]]:
    """What the names of presets stand for on a model that fills canvases."""
    if capabilities.mask_id is None:
        return registry.UNIFORM
    return registry.PRESETS if capabilities.block is None else registry.BLOCKS


def combine(names: tuple[str, ...], context: MethodContext, cost: Callable[[], PassCost]) -> Parts:
    """The parts that these methods make together on one model; `cost` tells what its passes cost, where drafts are made.

    "tuned" stands for the combination that `hasten tune` found for this model on this machine.
    Raises UnknownNameError, UnsupportedError (planned), IncompatibleError naming both sides, and as `models.tuned.read`.
    """
    if "tuned" in (given := [registry.parse(name)[0] for name in names]):
        return combine(_tuned(names, given, context), context, cost)
    masked = context.capabilities.kind == "masked"
    if masked:
        names = registry.expand(names, presets(context.capabilities))
    slugs = [registry.parse(name)[0] for name in names]
    if not slugs:
        raise ConfigError("method is empty; method must be 'auto', 'plain' or method names", field="method")
    if any(slug in ("auto", "plain") for slug in slugs):
        if len(slugs) > 1:
            raise IncompatibleError(f"method {slugs[0]!r} cannot be combined with {slugs[1]!r}", field="method")
        if registry.parse(names[0])[1]:
            raise ConfigError(
                f"method {slugs[0]!r} is a preset and has no settings", hint="name a method, and set it", field="method"
            )
        if slugs[0] == "plain":
            return PLAIN
        names = _auto(context)
        slugs = [registry.parse(name)[0] for name in names]
    cards = [registry.card(slug) for slug in slugs]
    for i, one in enumerate(cards):
        _check_needs(one, context.model, context.capabilities)
        for other in cards[:i]:
            if one.slug == other.slug or other.slug in one.conflicts or one.slug in other.conflicts:
                raise IncompatibleError(f"method {one.slug!r} cannot be combined with {other.slug!r}", field="method")
    if masked:
        return Parts(canvas=_canvas(names, context), method=tuple(slugs))
    drafters = [name for name, one in zip(names, cards, strict=True) if one.plugs_into == "draft"]
    rules = [name for name, one in zip(names, cards, strict=True) if one.plugs_into == "logits"]
    if len(drafters) + len(rules) < len(names):
        other = next(one for one in cards if one.plugs_into not in ("draft", "logits"))
        raise IncompatibleError(
            f"method {other.slug!r} plugs into {other.plugs_into!r} and cannot be chosen per request", field="method"
        )
    if "grammar" in slugs:
        raise IncompatibleError(
            "method 'grammar' needs a grammar", hint="give one: grammar=hasten.Grammar.regex('[0-9]+')", field="method"
        )
    spent = cost()
    built = [registry.build(name, context) for name in drafters]
    return Parts(
        drafter=Union(built, spent) if len(built) > 1 else built[0] if built else None,
        rules=tuple(registry.build(name, context) for name in rules),
        budget=LIMITS.draft_budget,
        measured=True,
        method=tuple(slugs),
    )


def _tuned(names: tuple[str, ...], slugs: Sequence[str], context: MethodContext) -> tuple[str, ...]:
    """The methods of the profile; "tuned" goes with no other method, and has no settings."""
    from hasten.models.tuned import read

    if len(names) > 1:
        other = next((slug for slug in slugs if slug != "tuned"), "tuned")
        raise IncompatibleError(f"method 'tuned' cannot be combined with {other!r}", field="method")
    if registry.parse(names[0])[1]:
        raise ConfigError("'tuned' stands for the methods of a profile; give settings to those", field="method")
    return read(context.backbone, context.model).method


def _auto(context: MethodContext) -> tuple[str, ...]:
    """What "auto" drafts with: what needs no training, and what was counted or trained for this model.

    On the native stack, whose passes over a small model take a few milliseconds, prompt lookup by itself.
    """
    from hasten.models.feature import weights_path
    from hasten.models.native import NativeStack
    from hasten.models.stack import DecoderStack

    backbone = context.backbone
    if not isinstance(backbone, DecoderStack):
        return AUTO
    names, trained = list(AUTO), TRAINED
    if isinstance(backbone, NativeStack):
        large = sum(one.nbytes for one in backbone.weights.matrices.values()) >= LARGE
        names, trained = names[:1], TRAINED[:1] if large else ()
    for slug in trained:
        with suppress(ConfigError):  # none was made for this model
            weights_path(slug, context.backbone, context.model)
            names.append(slug)
    return tuple(names)


def _canvas(names: Sequence[str], context: MethodContext) -> Policy:
    """The policy that these methods make together; what they leave open is the reference sampler's.

    A sampler of canvases without masks ("self_conditioning") decides everything itself.
    """
    caps = context.capabilities
    sight = "full" if caps.block is None else "block_causal"
    joined = Policy()
    for name in names:
        alone = "self_conditioning" in registry.card(slug := registry.parse(name)[0]).needs
        if not alone and (caps.mask_id is None or not caps.has(sight)):
            lacks = "mask token" if caps.mask_id is None else f"{sight.replace('_', '-')} attention"
            raise IncompatibleError(
                f"method {slug!r} fills a canvas mask by mask; model {context.model!r} has no {lacks}",
                hint="leave it out, or load LLaDA, Dream, SDAR or LLaDA-2",
                field="method",
            )
        part = registry.build(name, context)
        if not isinstance(getattr(part, "policy", None), Policy):
            raise IncompatibleError(f"method {slug!r} has no part in filling a canvas", field="method")
        joined = joined.join(part.policy)
    if caps.mask_id is None:
        return joined.check(caps)
    base = registry.build("reference", context)
    return joined.over(base.policy).over(base.rest).check(context.capabilities)


def _check_needs(card: MethodCard, model: str, capabilities: Capabilities) -> None:
    """Raise IncompatibleError naming the method and the model unless every need is among its capabilities."""
    for need in card.needs:
        if not capabilities.has(need):
            raise IncompatibleError(
                f"method {card.slug!r} needs {need!r}, which model {model!r} ({capabilities.kind}) does not offer",
                hint="choose another method (`hasten methods`) or another model",
                field="method",
            )
