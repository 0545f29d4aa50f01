"""Token recycling against plain decoding and prompt lookup; what the shared table adds, and the published tree."""

from __future__ import annotations

import time

from hasten.bench.drafters import all_same, conclude, faster_in_every_seed, open_target, trial
from hasten.bench.report import Progress, Reproduction

claim_checked = (
    "Greedy decoding of smollm2-135m with token recycling takes less time than plain decoding in each of three draws of "
    "prompts, with the same texts; beside it prompt lookup, a table that every request starts anew, and the published tree."
)

METHODS = {
    "token-recycling": "token-recycling",
    "cold table": "token-recycling:table=row",
    "published tree": "token-recycling:nodes=80,tree=2.2.2,adapt=false,fill=zero",
}


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of token recycling (2408.08696) on this machine."""
    started = time.perf_counter()
    llm = open_target(progress)
    chosen = {name: METHODS[name] for name in list(METHODS)[: 1 if quick else None]}
    done = trial(llm, chosen, quick, progress)
    main = "token-recycling"
    extra = {"table_bytes": llm.parts((main,)).drafter.nbytes}  # type: ignore[union-attr]
    if not quick:
        extra["warm_over_cold"] = done.speedup(main, "cold table").to_dict()
        extra["over_published_tree"] = done.speedup(main, "published tree").to_dict()
    return conclude(
        "token-recycling",
        done,
        main,
        faster_in_every_seed(done, main) and all_same(done, list(chosen)),
        started,
        quick=quick,
        over_prompt_lookup=done.speedup(main, "prompt-lookup").to_dict(),
        **extra,
    )
