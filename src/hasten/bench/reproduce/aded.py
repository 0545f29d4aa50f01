"""ADED against plain decoding and prompt lookup, with its adaptation and its counted table each taken away."""

from __future__ import annotations

import time

from hasten.bench.drafters import all_same, conclude, faster_in_every_seed, open_target, trial
from hasten.bench.report import Progress, Reproduction

claim_checked = (
    "Greedy decoding of smollm2-135m with ADED takes less time than plain decoding in each of three draws of prompts, with "
    "the same texts, and statistics that adapt to the text commit more tokens per pass than the same ones left alone; "
    "beside it prompt lookup, no counted table, and the published search of 150 walks."
)

METHODS = {
    "aded": "aded",
    "no adaptation": "aded:step=0,learn_prompt=false",
    "no counted table": "aded:table=none",
    "published search": "aded:nodes=64,iterations=150,learn_prompt=false",
}


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of ADED (2407.12021) on this machine."""
    started = time.perf_counter()
    llm = open_target(progress)
    chosen = {name: METHODS[name] for name in list(METHODS)[: 2 if quick else None]}
    done = trial(llm, chosen, quick, progress)
    adapted, alone = done.tokens_per_pass("aded"), done.tokens_per_pass("no adaptation")
    return conclude(
        "aded",
        done,
        "aded",
        faster_in_every_seed(done, "aded") and adapted.median > alone.median and all_same(done, list(chosen)),
        started,
        quick=quick,
        over_prompt_lookup=done.speedup("aded", "prompt-lookup").to_dict(),
        tokens_per_pass_with_adaptation=adapted.to_dict(),
        tokens_per_pass_without=alone.to_dict(),
        adaptation_pays_in_time=done.speedup("aded", "no adaptation").to_dict(),
    )
