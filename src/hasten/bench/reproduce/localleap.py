"""LocalLeap against one token per step and against both of the thresholds between which it decides."""

from __future__ import annotations

import time

from hasten.bench.canvases import conclude, open_mini, trial
from hasten.bench.report import Progress, Reproduction

claim_checked = (
    "On unseen tasks of five procedural worlds mini-dlm decodes faster with LocalLeap (0.9, and 0.75 within 4 positions) "
    "than one token per step in each of three seeds, in fewer forwards than with a threshold of 0.9, and loses at most a "
    "point of accuracy."
)

ARMS = {
    "reference": ("reference",),
    "threshold": ("threshold",),
    "dual cache + threshold": ("threshold", "canvas-cache"),
    "localleap": ("localleap",),
    "threshold 0.75": ("threshold:tau=0.75",),
    "localleap + credit": ("localleap", "creditdecoding"),
    "dual cache + localleap": ("localleap", "canvas-cache"),
}
QUICK = 4  # arms


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of LocalLeap (2510.07081) on this machine."""
    started = time.perf_counter()
    llm = open_mini(progress)
    done = trial(llm, dict(list(ARMS.items())[: QUICK if quick else None]), quick=quick, progress=progress)
    main, base = "localleap", "threshold"
    holds = (
        done.speedup(main).min > 1
        and done.nfe(main).median < done.nfe(base).median
        and done.accuracy(main).median >= done.accuracy("reference").median - 1
    )
    return conclude(
        "localleap",
        done,
        main,
        holds,
        started,
        quick=quick,
        over_threshold=done.speedup(main, base).to_dict(),
        forwards_of_threshold=round(done.nfe(main).median / done.nfe(base).median, 3),
        forwards_of_one_per_step=round(done.nfe(main).median / done.nfe("reference").median, 3),
        accuracy_of_threshold=done.accuracy(base).median,
    )
