"""Prophet with limits measured on other tasks: fewer forwards at equal accuracy; and how early answers are final."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from torch import Tensor

from hasten import registry
from hasten.bench.canvases import WORLDS, conclude, open_mini, trial
from hasten.bench.report import Progress, Reproduction
from hasten.engine.contracts import MethodContext
from hasten.engine.engine import Parts
from hasten.engine.parts import SLOT, CanvasRow, StopAction, View
from hasten.policy import Policy
from hasten.types import Request, SamplingParams
from hasten.unmask.prophet import Config, Prophet
from hasten.worlds import WORLDS as CATALOG
from hasten.worlds import split_of

if TYPE_CHECKING:
    from hasten.llm import LLM

claim_checked = (
    "On mini-dlm, filling all masks once the gap between the two best logits passes limits measured on other tasks "
    "takes at most two thirds of the reference sampler's forwards, within a point of its right answers."
)
Note = tuple[float, float, bool]  # progress, gap, and whether filling now would have given the final answer


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of Prophet (2508.19982) on this machine."""
    started = time.perf_counter()
    llm = open_mini(progress)
    notes = calibrate(llm, prompts(2 if quick else 8), 64, progress)
    limits = ladder(notes)
    knobs = ",".join(f"{name}={value}" for name, value in zip(("early", "middle", "late"), limits, strict=True))
    arms: dict[str, Sequence[str]] = {"reference": ("reference",), "prophet": (f"prophet:{knobs}",)}
    if not quick:
        arms |= {
            "threshold": ("threshold",),
            "dual cache + threshold": ("threshold", "canvas-cache"),
            "prophet + threshold": (f"prophet:{knobs}", "threshold"),
            "prophet in blocks": (f"prophet:mode=block,{knobs}",),
            "prophet, published limits": ("prophet",),
        }
    done = trial(llm, arms, quick=quick, progress=progress)
    fewer = done.nfe("prophet").median <= done.nfe("reference").median * 2 / 3
    kept = done.accuracy("prophet").median >= done.accuracy("reference").median - 1
    return conclude(
        "prophet", done, "prophet", fewer and kept, started, quick=quick,
        limits=[None if math.isinf(limit) else limit for limit in limits],
        final_at_progress=emergence(notes),
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Fill:
    """What filling would write at one moment."""

    progress: float
    gap: float
    tokens: list[int]


class Recorder(Prophet):
    """Never stops; notes gap, progress and what a fill would write."""

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__(config, context)
        self.name = "recorder"
        self.fills: list[_Fill] = []

    def check(self, view: View, row: CanvasRow, chosen: Tensor) -> tuple[StopAction, int]:
        """("continue", -1)."""
        tokens = row.tokens.index_copy(0, view.positions[view.masked], view.x0[view.masked])
        slots = row.provenance[row.prompt_len : row.end] == SLOT
        self.fills.append(_Fill(self.progress(row), self.gap(view, row), tokens[row.prompt_len : row.end][slots].tolist()))
        return "continue", -1


def calibrate(llm: LLM, given: Sequence[str], canvas: int, progress: Progress) -> list[Note]:
    """Decode prompts to the end with the reference sampler and compare every moment's fill with the final answer."""
    context = MethodContext(llm.name, llm.model, llm.tokenizer)
    base = registry.build("reference", context)
    notes: list[Note] = []
    for i, prompt in enumerate(given):
        progress("measuring gaps", i, len(given))
        recorder = Recorder(Config(), context)
        policy = Policy(stops=(recorder,)).over(base.policy).over(base.rest).check(context.capabilities)
        request = Request(tuple(llm.encode(prompt)), SamplingParams(max_tokens=canvas, seed=0))
        out = llm.engine.run([(request, Parts(canvas=policy))])[0][0]
        n = len(out.tokens)
        notes += [(one.progress, one.gap, tuple(one.tokens[:n]) == out.tokens) for one in recorder.fills]
    progress("measuring gaps", len(given), len(given))
    return notes


def ladder(notes: Sequence[Note], share: float = 0.99) -> tuple[float, float, float]:
    """The least limits (early, middle, late; never rising) above which this share of fills is the final answer."""

    def least(low: float, high: float) -> float:
        found = sorted(((gap, same) for at, gap, same in notes if low <= at < high), reverse=True)
        limit, right = math.inf, 0
        for i, (gap, same) in enumerate(found, 1):
            right += same
            if right >= share * i and (i == len(found) or found[i][0] < gap):
                limit = gap
        return limit if math.isinf(limit) else math.ceil(limit * 100) / 100

    late = least(0.67, math.inf)
    middle = max(least(0.33, 0.67), late)
    return max(least(-math.inf, 0.33), middle), middle, late


def emergence(notes: Sequence[Note]) -> dict[str, float]:
    """Tenth of the decoding -> share of moments whose fill is the final answer already."""
    tenths: dict[int, list[bool]] = {}
    for at, _, same in notes:
        tenths.setdefault(min(9, int(at * 10)), []).append(same)
    return {f"{tenth / 10:.1f}": round(sum(same) / len(same), 3) for tenth, same in sorted(tenths.items())}


def prompts(per_world: int) -> list[str]:
    """Tasks of the development split, which no comparison uses."""
    found: list[str] = []
    for name in WORLDS:
        world, rng, count = CATALOG[name], Random(f"prophet {name}"), 0  # noqa: S311 - tasks, not secrets
        sizes = world.fitting(64)
        while count < per_world:
            prompt = world.generate(rng, world.difficulty(rng.choice(sizes))).prompt
            if split_of(prompt) == "dev":
                found.append(prompt)
                count += 1
    return found
