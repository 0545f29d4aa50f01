"""CreditDecoding against one token per step and, as it should be, against the threshold that it is added to."""

from __future__ import annotations

import time

from hasten.bench.canvases import conclude, open_mini, trial
from hasten.bench.report import Progress, Reproduction

claim_checked = (
    "On unseen tasks of five procedural worlds mini-dlm decodes faster with a threshold of 0.9 and credits than one token "
    "per step in each of three seeds, in fewer forwards than with the threshold alone, and loses at most a point."
)

ARMS = {
    "reference": ("reference",),
    "threshold": ("threshold",),
    "dual cache + threshold": ("threshold", "canvas-cache"),
    "creditdecoding": ("threshold", "creditdecoding"),
    "the paper's credit": ("threshold:tau=0.95", "creditdecoding:exponent=0.5,decay=0.65"),
    "threshold 0.95": ("threshold:tau=0.95",),
    "dual cache + credit": ("threshold", "canvas-cache", "creditdecoding"),
}
QUICK = 4  # arms


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of CreditDecoding (2510.06133) on this machine."""
    started = time.perf_counter()
    llm = open_mini(progress)
    done = trial(llm, dict(list(ARMS.items())[: QUICK if quick else None]), quick=quick, progress=progress)
    main, base = "creditdecoding", "threshold"
    holds = (
        done.speedup(main).min > 1
        and done.nfe(main).median < done.nfe(base).median
        and done.accuracy(main).median >= done.accuracy("reference").median - 1
    )
    return conclude(
        "creditdecoding",
        done,
        main,
        holds,
        started,
        quick=quick,
        over_threshold=done.speedup(main, base).to_dict(),
        forwards_of_threshold=round(done.nfe(main).median / done.nfe(base).median, 3),
        accuracy_of_threshold=done.accuracy(base).median,
    )
