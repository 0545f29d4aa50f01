"""Learn2PD's filter against one token per step and the plain threshold; its cuts, eager and careful; with a dual cache."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hasten.bench.canvases import conclude, open_mini, trial
from hasten.bench.report import Progress, Reproduction

claim_checked = (
    "On mini-dlm, the trained filter and its cut at the end of text take at most 60% of the reference sampler's forwards, "
    "within two points of its right answers; beside it the threshold, whose confidence is all that the filter reads."
)


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of Learn2PD (2509.25188) on this machine."""
    started = time.perf_counter()
    llm = open_mini(progress)
    arms: dict[str, Sequence[str]] = {
        "reference": ("reference",),
        "threshold": ("threshold",),
        "learn2pd": ("learn2pd",),
    }
    if not quick:
        arms |= {
            "dual cache + threshold": ("threshold", "canvas-cache"),
            "learn2pd, no cut": ("learn2pd:eotp=off",),
            "learn2pd, eager cut": ("learn2pd:eotp=eager",),
            "dual cache + learn2pd": ("learn2pd", "canvas-cache"),
            "learn2pd at 0.9": ("learn2pd:tau=0.9",),
        }
    done = trial(llm, arms, quick=quick, progress=progress)
    fewer = done.nfe("learn2pd").median <= 0.6 * done.nfe("reference").median
    kept = done.accuracy("learn2pd").median >= done.accuracy("reference").median - 2
    return conclude(
        "learn2pd", done, "learn2pd", fewer and kept, started, quick=quick,
        over_threshold=done.speedup("learn2pd", "threshold").to_dict(),
    )  # fmt: skip
