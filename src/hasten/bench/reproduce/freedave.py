"""FreeDave against the sampler it wraps, without a cache and with one: equal text, forwards, and what a pass costs here."""

from __future__ import annotations

import time

from hasten.bench.canvases import conclude, open_mini, trial
from hasten.bench.report import Progress, Reproduction

claim_checked = (
    "On unseen tasks of five procedural worlds mini-dlm with FreeDave (four states per pass) writes the same texts as with "
    "one token per step, in fewer forwards and less time in each of three seeds; so too over a dual cache and a threshold."
)

ARMS = {
    "reference": ("reference",),
    "threshold": ("threshold",),
    "dual cache + threshold": ("threshold", "canvas-cache"),
    "freedave": ("freedave",),
    "freedave, what pays": ("freedave:d=0",),
    "freedave, 8 states": ("freedave:d=8",),
    "dual cache": ("canvas-cache",),
    "dual cache + freedave": ("canvas-cache", "freedave"),
    "dual cache + threshold + freedave": ("threshold", "canvas-cache", "freedave"),
}
PAIRS = {
    "freedave": "reference",
    "freedave, what pays": "reference",
    "freedave, 8 states": "reference",
    "dual cache + freedave": "dual cache",
    "dual cache + threshold + freedave": "dual cache + threshold",
}
QUICK = 4  # arms


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of FreeDave (2510.00294) on this machine."""
    started = time.perf_counter()
    llm = open_mini(progress)
    arms = dict(list(ARMS.items())[: QUICK if quick else None])
    done = trial(llm, arms, quick=quick, progress=progress)
    pairs = {arm: base for arm, base in PAIRS.items() if arm in arms}
    equal = {arm: done.same_text(arm, base) for arm, base in pairs.items()}
    main = "freedave"
    holds = (
        all(same == of for same, of in equal.values())
        and done.nfe(main).max < done.nfe("reference").min
        and done.speedup(main).min > 1
    )
    wrapped = {
        arm: {
            "same_text": list(equal[arm]),
            "forwards": round(done.nfe(arm).median / done.nfe(base).median, 3),
            "computed_tokens": round(done.computed(arm).median / done.computed(base).median, 3),
            "speedup": done.speedup(arm, base).to_dict(),
        }
        for arm, base in pairs.items()
    }
    return conclude("freedave", done, main, holds, started, quick=quick, against_what_it_wraps=wrapped)
