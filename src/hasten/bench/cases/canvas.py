"""Suite `canvas`: procedural worlds at several canvas lengths, every answer verified; any model that was taught them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.bench.canvases import tasks
from hasten.bench.cases import Case, Suite, Verdict
from hasten.errors import out_of_range
from hasten.worlds import WORLDS, Sample

if TYPE_CHECKING:
    from hasten.llm import LLM

FITTING = {32: "copy,reverse,sort", 64: "copy,reverse,sort,close,records", 128: "copy,records,sums", 512: "copy,records"}

suite = Suite(
    name="canvas",
    summary="procedural worlds (copy, sort, records ...) at several canvas lengths, every answer verified",
    quality_is="answers right in full, percent",
    options={"per_group": 2, "canvas": "64,128", "groups": ""},
    methods={"causal": "plain,prompt-lookup,auto", "masked": "plain,exact,threshold,threshold+canvas-cache,fast,few-step"},
)


def judge(world: str, sample: Sample) -> Any:
    """Right in full or not; the note names the share that is right and the right answer."""

    def verdict(text: str) -> Verdict:
        share = WORLDS[world].verify(sample.meta, text)
        return Verdict(1.0) if share == 1 else Verdict(0.0, f"{share:.0%} of it is right; right is {sample.answer}")

    return verdict


def cases(llm: LLM, options: Mapping[str, Any], seeds: Sequence[int]) -> list[Case]:
    """`per_group` unseen samples of each world for each canvas and seed; `canvas` is also the most tokens of an answer."""
    chosen, out = tuple(filter(None, str(options["groups"]).split(","))), []
    for word in str(options["canvas"]).split(","):
        if not word.isdecimal() or not 8 <= int(word) <= 4096:
            raise out_of_range("canvas", word, "lengths in [8, 4096], joined by commas")
        canvas = int(word)
        fits = max((size for size in FITTING if size <= canvas), default=min(FITTING))
        worlds = chosen or tuple(FITTING[fits].split(","))
        if options["per_group"] < 1:
            raise out_of_range("per_group", options["per_group"], "at least 1")
        for task in tasks(worlds, canvas, options["per_group"], seeds):
            ids = tuple(llm.encode(task.sample.prompt))
            name = f"{task.world} {canvas}"
            out.append(Case(task.seed, name, ids, canvas, task.sample.prompt, judge(task.world, task.sample)))
    return sorted(out, key=lambda case: seeds.index(case.seed))  # a seed's cases lie together; the sort is stable
