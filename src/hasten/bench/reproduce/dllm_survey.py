"""The registry's verdicts against what happens: every part, and every pair, on a small model of each layout hasten runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from hasten.bench.report import Progress, Reproduction, Spread, machine

if TYPE_CHECKING:
    from hasten.bench.dllm_survey import Family
    from hasten.engine.contracts import MethodContext
    from hasten.policy import Policy

claim_checked = (
    "On small random models laid out as LLaDA, Dream, SDAR and LLaDA-2 every part, and every pair of canvas parts, is "
    "asked for and run: what the registry foretold from its description of the family, against taking every part for "
    "legal; a key cache that it calls exact must leave every text as it is, and one it calls approximate must not."
)

LAYOUTS = ("llada", "dream", "sdar", "llada-2.0")
SEEDS = (0, 1, 2)  # of weights and prompts
CANVAS = 16  # tokens
PROMPTS = 6  # per seed, for the caches


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of the survey (2506.13759) on this machine; `quick` runs parts alone, not in pairs."""
    from hasten.bench.dllm_survey import card, family
    from hasten.registry import FOLDERS, cards

    started = time.perf_counter()
    slugs = [one.slug for one in cards() if one.plugs_into in FOLDERS]
    canvas = [one.slug for one in cards() if one.plugs_into == "unmask"]
    asked: list[tuple[str, ...]] = [(slug,) for slug in slugs]
    asked += [] if quick else list(combinations(canvas, 2))
    total, done = len(LAYOUTS) * len(SEEDS) * len(asked), 0
    rights: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYOUTS}  # (registry, all legal) by seed
    same: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    wrong: list[dict[str, Any]] = []
    for name in LAYOUTS:
        for seed in SEEDS:
            context = model(family(name), seed)
            right = legal = 0
            for methods in asked:
                foretold, came = foresee(name, methods), outcome(context, methods, seed)
                right, legal = right + (foretold == came), legal + (came == "legal")
                if foretold != came:
                    wrong.append({"family": name, "methods": list(methods), "foretold": foretold, "came": came})
                done += 1
                progress("asking for parts", done, total)
            rights[name].append((right / len(asked), legal / len(asked)))
            same[name].append(unchanged(family(name), context, seed))
    exact = {name: family(name).cache == "exact" for name in LAYOUTS}
    caches = all(min(same[name]) == 1.0 if exact[name] else max(same[name]) < 1.0 for name in LAYOUTS)
    method, baseline = (_mean([pair[i] for pairs in rights.values() for pair in pairs]) for i in (0, 1))
    return Reproduction(
        slug="dllm-survey",
        claim=card.claim,
        direction_holds=not wrong and method > baseline and caches,
        speedup=None,
        quality={"baseline": round(100 * baseline, 1), "method": round(100 * method, 1)},
        extra={
            "model": "random stacks of two layers, laid out as each family",
            "quick": quick,
            "quality_is": "requests whose fate was foretold right, percent (baseline: every part is legal)",
            "requests": total,
            "wrong": wrong[:20],
            "bars_of": "texts that a key cache leaves as they are, share",
            "bars": [
                {"label": f"{name}, {family(name).cache}", **Spread.of(values).to_dict()} for name, values in same.items()
            ],
        },
        no_help="No verdict where noise or attention is not published, or of a kind that hasten's models do not declare.",
        machine=machine(),
        seeds=SEEDS,
        seconds=round(time.perf_counter() - started, 1),
    )


def model(one: Family, seed: int) -> MethodContext:
    """A small random model of the family's layout, with the alphabet and special tokens of mini-dlm."""
    import torch

    from hasten.engine.contracts import MethodContext
    from hasten.models.config import Layer, ModelConfig
    from hasten.models.load import load
    from hasten.models.transformer import Transformer

    words = load("mini-dlm")
    assert isinstance(words.config, ModelConfig)  # noqa: S101 - it is hasten's own
    config = ModelConfig(
        family=str(one.model_type), kind="masked", logit_shift=one.known("shift"), block=one.known("block"), max_len=256,
        vocab_size=words.config.vocab_size, mask_id=words.config.mask_id, eos_ids=words.config.eos_ids,
        hidden=48, heads=4, kv_heads=2, head_dim=12, ffn=96, layers=(Layer(), Layer()),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = [(name, tuple(p.shape)) for name, p in Transformer(config).named_parameters()]
    noise = ((name, torch.randn(shape, generator=generator)) for name, shape in shapes)
    state = ((name, 1 + 0.1 * value if "norm" in name else 0.3 * value) for name, value in noise)
    stack = Transformer.from_state(config, state).pack()
    return MethodContext(f"random-{one.name}", stack, words.tokenizer)


def foresee(name: str, methods: Sequence[str]) -> str:
    """The registry's verdict: legal, lacks or refused."""
    from hasten.bench.dllm_survey import compatible

    return compatible(name, *methods).state


def outcome(context: MethodContext, methods: Sequence[str], seed: int) -> str:
    """What comes of a request for these methods on a real model: legal only if it fills its canvas."""
    from hasten.combine import combine
    from hasten.errors import HastenError, IncompatibleError, UnsupportedError
    from hasten.pass_cost import PassCost

    try:
        parts = combine(tuple(methods), context, PassCost)
    except (IncompatibleError, UnsupportedError):
        return "refused"
    except HastenError:
        return "lacks"
    [tokens] = write(context, parts.canvas, [prompt(context, seed, 0)], seed)
    mask = context.capabilities.mask_id
    return "legal" if len(tokens) == CANVAS and mask not in tokens else "left open"


def unchanged(one: Family, context: MethodContext, seed: int) -> float:
    """Share of texts that are the same with a key cache - the blocks' own, or `canvas-cache` - as without any."""
    from hasten.combine import combine
    from hasten.pass_cost import PassCost
    from hasten.unmask.reference import NoCache

    blocks = context.capabilities.block is not None
    cached = combine(("reference:block=8",) if blocks else ("reference:block=8", "canvas-cache"), context, PassCost).canvas
    prompts = [prompt(context, seed, i) for i in range(PROMPTS)]
    with_keys, without = (write(context, policy, prompts, seed) for policy in (cached, replace(cached, cache=NoCache())))
    return sum(a == b for a, b in zip(with_keys, without, strict=True)) / PROMPTS


def prompt(context: MethodContext, seed: int, index: int) -> tuple[int, ...]:
    """Up to 12 random ordinary tokens, the same for every layout."""
    from random import Random

    drawn = Random(f"{seed} {index}")  # noqa: S311 - prompts are no secrets
    special = {context.capabilities.mask_id, *context.capabilities.eos_ids}
    ordinary = [token for token in range(context.capabilities.vocab_size) if token not in special]
    return tuple(drawn.choices(ordinary, k=drawn.randint(1, 12)))


def write(context: MethodContext, policy: Policy, prompts: Sequence[tuple[int, ...]], seed: int) -> list[tuple[int, ...]]:
    """The canvases of a batch of prompts, filled to their last token."""
    from hasten.engine.engine import Engine, Parts
    from hasten.types import Request, SamplingParams

    engine = Engine(context.backbone, cache_bytes=64_000_000)
    sampling = SamplingParams(max_tokens=CANVAS, ignore_eos=True, seed=seed)
    outputs = engine.run([(Request(one, sampling), Parts(canvas=policy)) for one in prompts])
    return [choices[0].tokens for choices in outputs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
