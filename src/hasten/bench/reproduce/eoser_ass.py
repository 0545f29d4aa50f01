"""EOSER and ASS in log2 L steps against even steps, as many and half as many as tokens; and each of the two alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hasten.bench.canvases import conclude, open_mini, trial
from hasten.bench.report import Progress, Reproduction

claim_checked = (
    "On mini-dlm without blocks, ascending steps that hold back end tokens (6 forwards for 64 tokens) give within five "
    "points as many right answers as 32 even steps, and at least as many as 6 even ones."
)
WHOLE = "reference:block=64"


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of EOSER and ASS (2509.23924) on this machine."""
    started = time.perf_counter()
    llm = open_mini(progress)
    arms: dict[str, Sequence[str]] = {
        "32 even steps": (f"{WHOLE},steps=32",),
        "6 even steps": (f"{WHOLE},steps=6",),
        "eoser + ass": ("eoser-ass",),
    }
    if not quick:
        arms |= {
            "reference": ("reference",),
            "threshold": ("threshold",),
            "dual cache + threshold": ("threshold", "canvas-cache"),
            "ass": ("eoser-ass:eoser=false",),
            "whole canvas": (WHOLE,),
            "whole canvas + eoser": (WHOLE, "eoser-ass:ass=false"),
            "16 steps, growing by 1.3, + eoser": ("eoser-ass:ratio=1.3,steps=16",),
            "16 even steps": (f"{WHOLE},steps=16",),
        }
    done = trial(llm, arms, quick=quick, progress=progress)
    right = {name: done.accuracy(name).median for name in done.arms}
    holds = right["eoser + ass"] >= right["32 even steps"] - 5 and right["eoser + ass"] >= right["6 even steps"]
    return conclude(
        "eoser-ass", done, "eoser + ass", holds, started, quick=quick, over="32 even steps", right_answers=right
    )
