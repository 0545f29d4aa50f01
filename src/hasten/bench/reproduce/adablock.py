"""AdaBlock against blocks of one size, both with threshold and dual cache; where its blocks end, and what they force."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hasten.bench.canvases import WORLDS, conclude, open_mini, tasks, trial
from hasten.bench.report import Progress, Reproduction
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.llm import LLM

claim_checked = (
    "With threshold and dual cache on mini-dlm, blocks that end at the surest separator of the text give at least as "
    "many right answers as blocks of 32, in at most a tenth more time."
)
SEPARATORS = " ;,]\n"  # answers of the worlds are single lines, so that the published newline alone would end no block
FAST = ("threshold", "canvas-cache")


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of AdaBlock (2509.26432) on this machine."""
    started = time.perf_counter()
    llm = open_mini(progress)
    ada = f"adablock:ids={'.'.join(map(str, separators(llm)))}"
    arms: dict[str, Sequence[str]] = {
        "reference": ("reference",),
        "dual cache + threshold": FAST,
        "adablock + dual cache + threshold": (ada, *FAST),
    }
    if not quick:
        arms |= {
            "threshold": ("threshold",),
            "adablock + threshold": (ada, "threshold"),
            "dual cache + threshold, blocks of 16": ("reference:block=16", *FAST),
            "adablock of 16 + dual cache + threshold": (f"{ada},block=16", *FAST),
        }
    done = trial(llm, arms, quick=quick, progress=progress)
    main, base = "adablock + dual cache + threshold", "dual cache + threshold"
    better = done.accuracy(main).median >= done.accuracy(base).median
    return conclude(
        "adablock",
        done,
        main,
        better and done.speedup(main, base).median >= 0.9,
        started,
        over=base,
        quick=quick,
        blocks={name: blocks(llm, arms[name], done.canvas, 1 if quick else 3) for name in (base, main)},
    )


def separators(llm: LLM) -> list[int]:
    """Ids of the characters that part the items of an answer, as far as the tokenizer has them."""
    found: list[int] = []
    for character in SEPARATORS:
        try:
            ids = llm.encode(character)
        except ConfigError:
            continue
        found += ids[-1:]
    return sorted(set(found))


def blocks(llm: LLM, methods: Sequence[str], canvas: int, per_world: int) -> dict[str, Any]:
    """Lengths of the blocks of some answers, how many end on a separator, and the share of commits forced below 0.9."""
    marks, lengths, at_mark, forced, commits = set(separators(llm)), [], 0, 0, 0
    for task in tasks(WORLDS, canvas, per_world, (0,)):
        tokens: dict[int, int] = {}
        ends: list[int] = []
        for event in llm.stream(task.sample.prompt, method=list(methods), max_tokens=canvas):
            if event.kind == "block":
                lengths.append(event.total - event.position)
                ends.append(event.total - 1)
            elif event.kind == "commit":
                tokens[event.position] = event.token
                commits += 1
                forced += event.confidence < 0.9
        at_mark += sum(tokens.get(end) in marks for end in ends)
    return {
        "blocks": len(lengths),
        "mean_length": round(sum(lengths) / max(1, len(lengths)), 1),
        "end_on_separator": round(at_mark / max(1, len(lengths)), 3),
        "forced_commits": round(forced / max(1, commits), 3),
    }
