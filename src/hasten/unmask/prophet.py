"""Prophet (2508.19982): when the model is sure of its answer, all masks that remain are filled at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import SLOT, CanvasRow, PartRange, StopAction, View
from hasten.errors import ConfigError, IncompatibleError, out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

MODES = ("masked", "answer", "block")
PROGRESS = ("committed", "steps")

card = MethodCard(
    slug="prophet",
    title="Diffusion Language Models Know the Answer Before Decoding",
    paper="2508.19982",
    date="2025-08",
    plugs_into="unmask",
    exactness="lossy",
    claim="LLaDA-8B and Dream-7B: up to 3.4 times fewer steps with the quality kept.",
    no_help="Long texts, where the gaps say little about the end, and a dual cache, which shows all masks once per block.",
    knobs={
        "mode": "whose gaps count: masked (all open positions), answer (a region) or block (and only it is filled)",
        "early": "mean gap between the two best logits that is enough in the first third of the steps (inf: never)",
        "middle": "the gap that is enough in the second third (at most early)",
        "late": "the gap that is enough in the last third (at most middle)",
        "progress": "steps (done of those planned), or committed (the larger of that and the share of slots filled)",
        "least": "steps that are taken in any case",
        "template": "text fixed in the canvas before decoding, _ for every space, as in _The_answer_is",
        "at": "offset of that text in the canvas",
        "start": "answer: offset where the region begins (-1: one position after the template)",
        "length": "answer: positions of the region",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of Prophet; the published ladder is for the scale of LLaDA's logits, its region for mode answer."""

    mode: str = "masked"
    early: float = 7.5
    middle: float = 5.0
    late: float = 2.5
    progress: str = "committed"
    least: int = 0
    template: str = ""
    at: int = 0
    start: int = -1
    length: int = 5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise out_of_range("prophet.mode", self.mode, ", ".join(MODES))
        if self.progress not in PROGRESS:
            raise out_of_range("prophet.progress", self.progress, ", ".join(PROGRESS))
        for name, above in (("middle", self.early), ("late", self.middle)):
            if not getattr(self, name) <= above:
                raise out_of_range(f"prophet.{name}", getattr(self, name), f"at most {above:g}, the one before it")
        for name, lowest in (("least", 0), ("at", 0), ("start", -1), ("length", 1)):
            if getattr(self, name) < lowest:
                raise out_of_range(f"prophet.{name}", getattr(self, name), f"at least {lowest}")
        if self.mode == "answer" and self.start < 0 and not self.template:
            raise ConfigError(
                "prophet.mode = 'answer' without a region; prophet.start must be the offset where the answer begins",
                hint="give start, or a template that the answer follows",
                field="prophet.start",
            )

    def limit(self, progress: float) -> float:
        """The gap that is enough after this share of the steps."""
        return self.early if progress < 0.33 else self.middle if progress < 0.67 else self.late


class Prophet:
    """Fills everything when the mean gap of the raw logits in the region reaches the limit of the moment.

    Mode answer counts its whole region, as published, as far as a forward shows it. The others leave out positions that
    would become end tokens, unless all would: padding is always sure. Nothing is decided on a forward that hides masks.
    """

    name = "prophet"
    range: PartRange = "all_masked"
    memoryless = True
    lossless = False
    mutates_committed = False
    when: Literal["before", "after"] = "before"

    def __init__(self, config: Config, context: MethodContext) -> None:
        caps = context.capabilities
        if caps.block is not None and config.mode != "block":
            raise IncompatibleError(
                f"method 'prophet' in mode {config.mode!r} reads the whole canvas; model {context.model!r} never sees it",
                hint="use prophet:mode=block",
                field="prophet.mode",
            )
        self.config = config
        if config.mode == "block":
            self.range = "block"
        self.ends = torch.tensor(caps.eos_ids, dtype=torch.int64)
        fixed = _template(config, context)
        self.policy = Policy(stops=(self,), pins=dict(enumerate(fixed, config.at)))
        self.start = config.start if config.start >= 0 else config.at + len(fixed) + 1

    def admit(self, row: CanvasRow) -> None:
        """Refuse a canvas that has no slot in the region; raises ConfigError."""
        if self.config.mode == "answer":
            low, high = self._region(row)
            if not bool((row.provenance[low:high] == SLOT).any()):
                raise out_of_range(
                    "prophet.start", self.start, f"the offset of a slot, below the {row.end - row.prompt_len} of the canvas"
                )

    def check(self, view: View, row: CanvasRow, chosen: Tensor) -> tuple[StopAction, int]:
        """("fill_all", -1) or ("continue", -1)."""
        gap = self.gap(view, row) if row.global_step >= self.config.least else math.nan
        return ("fill_all", -1) if gap >= self.config.limit(self.progress(row)) else ("continue", -1)

    def gap(self, view: View, row: CanvasRow) -> float:
        """The mean gap of the region; nan where the forward shows none of it."""
        best = view.logits[self._counted(view, row)].topk(2).values
        return float((best[:, 0] - best[:, 1]).mean())

    def _counted(self, view: View, row: CanvasRow) -> Tensor:
        """bool [P]: the positions whose gaps count."""
        mode = self.config.mode
        if mode != "block" and int(view.masked.sum()) < int(row.masked.sum()):
            return torch.zeros_like(view.masked)
        if mode == "answer":
            low, high = self._region(row)
            slot = row.provenance[view.positions] == SLOT
            return slot & (view.positions >= low) & (view.positions < high)
        open_ = view.masked & view.inside if mode == "block" else view.masked
        text = open_ & ~torch.isin(view.x0, self.ends)
        return text if bool(text.any()) else open_

    def _region(self, row: CanvasRow) -> tuple[int, int]:
        low = min(row.prompt_len + self.start, row.end)
        return low, min(low + self.config.length, row.end)

    def progress(self, row: CanvasRow) -> float:
        """The share of the decoding that is over, this step counted."""
        steps = (row.global_step + 1) / row.planned
        if self.config.progress == "steps":
            return steps
        slots = row.provenance[: row.end] == SLOT
        return max(steps, float((slots & row.accepted[: row.end]).sum()) / max(1, int(slots.sum())))


def _template(config: Config, context: MethodContext) -> list[int]:
    """The ids of the template's text."""
    if not config.template:
        return []
    if context.tokenizer is None:
        raise ConfigError(
            f"prophet.template needs a tokenizer, which model {context.model!r} has not",
            hint="fix tokens through the request's template",
            field="prophet.template",
        )
    found: list[int] = context.tokenizer.encode(config.template.replace("_", " "), bos=False)
    return found


method = Prophet
