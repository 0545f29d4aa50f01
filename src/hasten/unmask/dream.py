"""Dream's sampler: no blocks, a linear noise schedule, and position scores taken after temperature and cut-offs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import CanvasRow, PartRange, View
from hasten.errors import out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard
from hasten.unmask._noise import gumbel, uniforms
from hasten.unmask.reference import FixedBlocks, Quota

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")

card = MethodCard(
    slug="dream",
    title="Dream's reference sampler",
    paper="2508.15487",
    date="2025-08",
    plugs_into="unmask",
    exactness="exact",
    claim="The baseline for Dream: positions are committed over the whole canvas along a linear noise schedule.",
    no_help="It is a baseline; with fewer steps than tokens it commits tokens that the model is not sure of.",
    knobs={
        "steps": "forwards for the canvas (0: one per token)",
        "alg": "origin (random order), maskgit_plus (probability), topk_margin or entropy",
        "alg_temp": "temperature at which positions are drawn by their scores (0: the best ones)",
        "eps": "noise left at the end of the schedule",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of Dream's sampler; the released defaults are 512 steps, origin, eps 1e-3."""

    steps: int = 0
    alg: str = "entropy"
    alg_temp: float = 0.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise out_of_range("dream.steps", self.steps, "at least 0 (0: one per token)")
        if self.alg not in ALGORITHMS:
            raise out_of_range("dream.alg", self.alg, ", ".join(ALGORITHMS))
        if not 0 <= self.alg_temp <= 100:
            raise out_of_range("dream.alg_temp", self.alg_temp, "in [0, 100]")
        if not 0 < self.eps < 1:
            raise out_of_range("dream.eps", self.eps, "in (0, 1)")


class Dream:
    """Schedule and scores of Dream: the canvas is one block (a block-causal model keeps its own).

    Steps that would commit nothing are left out, since their forward would be the one before again.
    """

    name = "dream"
    range: PartRange = "block"
    memoryless = True
    lossless = True
    mutates_committed = False

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config
        self._block = context.capabilities.block or context.capabilities.max_len

    @property
    def policy(self) -> Policy:
        """Planner, schedule, scores and selector."""
        return Policy(planner=FixedBlocks(self._block), schedule=self, scorer=self, selectors=(Quota(),))

    def planned(self, row: CanvasRow) -> int:
        """Steps of the whole canvas."""
        return self.config.steps or int(row.masked.sum())

    def quotas(self, row: CanvasRow) -> tuple[int, ...]:
        """Quotas of the block: int(masks (1 - t' / t)) along t = 1..eps, or as many as random times fall due (origin)."""
        masks, steps = row.left, min(self.planned(row), 2**20)
        times = torch.linspace(1, self.config.eps, steps + 1, dtype=torch.float64)
        quotas = []
        for i in range(steps):
            share = 1.0 if i == steps - 1 else 1 - float(times[i + 1] / times[i])
            if self.config.alg == "origin":
                count = int((uniforms(row.seed, i, torch.arange(masks), stream=2)[:, 0] < share).sum())
            else:
                count = masks if i == steps - 1 else int(masks * share)
            masks -= count
            quotas += [count] if count else []
            if not masks:
                break
        return tuple(quotas)

    def draw(self, view: View, row: CanvasRow) -> tuple[Tensor, Tensor]:
        """(x0 [P], score [P]) after temperature, top_p and top_k."""
        sampling = row.sampling
        logits = view.changed if sampling.temperature == 0 else view.changed / sampling.temperature
        if sampling.top_p < 1:
            order = logits.sort(dim=-1, descending=True, stable=True)
            late = order.values.softmax(-1).cumsum(-1) > sampling.top_p
            late[:, 1:], late[:, 0] = late[:, :-1].clone(), False
            logits = logits.masked_fill(torch.zeros_like(late).scatter(-1, order.indices, late), -torch.inf)
        if 0 < sampling.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
        probs = logits.softmax(-1)
        if sampling.temperature == 0:
            x0 = probs.argmax(-1)
        else:
            x0 = (logits.double() + gumbel(row.seed, row.global_step, view.positions, logits.shape[-1])).argmax(-1)
        score = self._score(probs, x0, view, row)
        if self.config.alg_temp > 0:
            score = score.double() / self.config.alg_temp
            score = score + gumbel(row.seed, row.global_step, view.positions, 1, stream=3)[:, 0]
        return x0, score

    def _score(self, probs: Tensor, x0: Tensor, view: View, row: CanvasRow) -> Tensor:
        if self.config.alg == "origin":
            return uniforms(row.seed, row.global_step, view.positions, stream=1)[:, 0].float()
        if self.config.alg == "maskgit_plus":
            return probs.gather(-1, x0[:, None])[:, 0]
        if self.config.alg == "topk_margin":
            best = probs.topk(2).values
            return best[:, 0] - best[:, 1]
        return (probs * (probs + 1e-10).log()).sum(-1)


method = Dream
