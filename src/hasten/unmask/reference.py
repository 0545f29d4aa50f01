"""The reference sampler of masked diffusion (LLaDA): blocks from left to right, an even quota of the surest per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.engine.contracts import Capabilities, MethodContext
from hasten.engine.parts import Advance, CanvasRow, Forward, PartRange, Taken, View
from hasten.errors import ConfigError, out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard
from hasten.unmask._noise import gumbel, uniforms

SCORES = ("prob", "margin", "entropy", "random")

card = MethodCard(
    slug="reference",
    title="LLaDA's reference sampler: low-confidence remasking in blocks",
    paper="2502.09992",
    date="2025-02",
    plugs_into="unmask",
    exactness="exact",
    claim="The baseline that every other canvas method is counted from: one token per forward unless steps say else.",
    no_help="It is the baseline; with fewer steps than tokens it commits tokens that the model is not sure of.",
    knobs={
        "block": "positions per block (1 or more; block-causal models bring their own)",
        "steps": "forwards for the whole canvas, spread evenly over its blocks (0: one per token)",
        "score": "what ranks positions: prob, margin (best minus second), entropy (least first) or random",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the reference sampler; LLaDA's own are block 128 and steps 128, or block 32 for long canvases."""

    block: int = 32
    steps: int = 0
    score: str = "prob"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise out_of_range("reference.block", self.block, "at least 1")
        if self.steps < 0:
            raise out_of_range("reference.steps", self.steps, "at least 0 (0: one per token)")
        if self.score not in SCORES:
            raise out_of_range("reference.score", self.score, ", ".join(SCORES))


class _Part:
    """What most parts declare."""

    name = "reference"
    range: PartRange = "block"
    memoryless = True
    lossless = True
    mutates_committed = False


class FixedBlocks(_Part):
    """Blocks of one size, from the end of the prompt; those of a block-causal model are aligned to position 0."""

    def __init__(self, block: int) -> None:
        self.block = block

    def plan(self, view: View | None, row: CanvasRow) -> int:
        """The end of the block that starts at row.window[0]."""
        return row.window[0] + self.block


class EvenSteps(_Part):
    """`steps` forwards over the canvas, the same number in every block and quotas that differ by at most one."""

    def __init__(self, steps: int, block: int) -> None:
        self.steps, self.block = steps, block

    def quotas(self, row: CanvasRow) -> tuple[int, ...]:
        """Quotas of the block row.window."""
        if not self.steps:
            return ()
        return even(row.left, max(1, min(row.left, self.steps // self._blocks(row))))

    def planned(self, row: CanvasRow) -> int:
        """Steps of the whole canvas; raises ConfigError for fewer steps than blocks."""
        if self.steps and self.steps < self._blocks(row):
            raise ConfigError(
                f"reference.steps = {self.steps} for {self._blocks(row)} blocks; steps must be at least one per block",
                hint="raise steps or block",
                field="steps",
            )
        return self.steps or int(row.masked.sum())

    def _blocks(self, row: CanvasRow) -> int:
        return math.ceil((row.end - row.prompt_len) / self.block)


def even(masks: int, steps: int) -> tuple[int, ...]:
    """`steps` quotas that sum to `masks`: floor(masks / steps), the first ones one more."""
    return tuple(masks // steps + (i < masks % steps) for i in range(steps))


class Confidence(_Part):
    """Candidates by Gumbel-max at the request's temperature; scores from the logits without temperature."""

    def __init__(self, score: str = "prob") -> None:
        self.score = score

    def draw(self, view: View, row: CanvasRow) -> tuple[Tensor, Tensor]:
        """(x0 [P], score float32 [P]) from view.changed."""
        logits = view.changed
        plain = logits is view.logits
        seen = view.forward
        if row.sampling.temperature == 0:
            x0 = seen.best if plain and seen.best is not None else logits.argmax(-1)
        else:
            noise = gumbel(row.seed, row.global_step, view.positions, logits.shape[-1])
            x0 = (logits.double() / row.sampling.temperature + noise).argmax(-1)
        if self.score == "prob":
            return x0, (logits.gather(-1, x0[:, None])[:, 0] - logits.logsumexp(-1)).exp()
        return x0, score_of(self.score, logits, row, view.positions)


def score_of(score: str, logits: Tensor, row: CanvasRow, positions: Tensor) -> Tensor:
    """margin, entropy (negated, in nats) or random scores float32 [P] of `logits` [P, vocab]."""
    if score == "random":
        return uniforms(row.seed, row.global_step, positions, stream=1)[:, 0].float()
    probs = logits.softmax(-1)
    if score == "margin":
        best = probs.topk(2).values
        return best[:, 0] - best[:, 1]
    return (probs * (probs + 1e-10).log()).sum(-1)


class Quota(_Part):
    """Selects the `quota` open positions of the block with the highest scores."""

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history, bool [P])."""
        return history, top(view, quota)


def top(view: View, count: int) -> Tensor:
    """bool [P]: the `count` open positions of the window with the highest scores, the lowest position at ties."""
    scores = view.score.masked_fill(~(view.masked & view.inside), -torch.inf)
    chosen = torch.zeros_like(view.masked)
    if count == 1:
        chosen[scores.argmax()] = True
    else:
        chosen[scores.sort(descending=True, stable=True).indices[:count]] = True
    return chosen & view.masked & view.inside


class PlainStepper(_Part):
    """One forward, one step."""

    most = 1

    def branches(self, row: CanvasRow, seen: Forward | None, advance: Advance) -> Sequence[CanvasRow]:
        """The state itself."""
        return [row]

    def settle(
        self,
        row: CanvasRow,
        seen: Forward | None,
        branches: Sequence[CanvasRow],
        got: Sequence[Forward],
        advance: Advance,
    ) -> tuple[Sequence[Taken], Forward | None]:
        """The one step."""
        return [advance(row, got[0])], None


class NoCache(_Part):
    """Everything is recomputed in every forward: the reference."""

    stores = False

    def exact(self, capabilities: Capabilities) -> bool:
        """Always."""
        return True

    def refresh(self, row: CanvasRow) -> bool:
        """Every time."""
        return True

    def span(self, row: CanvasRow, refresh: bool, shift: int) -> tuple[int, int]:
        """The whole canvas."""
        return 0, row.end

    def length(self, row: CanvasRow, refresh: bool, high: int) -> int:
        """Nothing is kept."""
        return 0


class BlockCache(_Part):
    """Keys of finished blocks stay: exact for block-causal models, whose blocks never see later ones.

    A finished block's final keys are computed together with the first step of the next one. With a logit shift the last
    place of the block before, which foretells the first of this one, is read in every step; its keys stay what they were.
    """

    stores = True

    def exact(self, capabilities: Capabilities) -> bool:
        """For block-causal models."""
        return "block_causal" in capabilities.cache_exact

    def refresh(self, row: CanvasRow) -> bool:
        """At the start of a block what is not stored yet is read: the prompt, or the block before."""
        return row.fresh < 0

    def span(self, row: CanvasRow, refresh: bool, shift: int) -> tuple[int, int]:
        """The block with the place that foretells its first token, and before it what is not stored."""
        low = max(0, row.window[0] - shift)
        return (min(row.stored, low) if refresh else low), row.window[1]

    def length(self, row: CanvasRow, refresh: bool, high: int) -> int:
        """Everything before the block."""
        return row.window[0]


class Reference:
    """Blocks, quotas and scores of the reference sampler: `policy`; `rest` is what every canvas has besides.

    Quotas that were asked for (`steps`) are united with what other methods select; else those methods decide alone.
    """

    name = "reference"

    def __init__(self, config: Config, context: MethodContext) -> None:
        capabilities = context.capabilities
        block = config.block if capabilities.block is None else capabilities.block
        self.policy = Policy(
            planner=FixedBlocks(block),
            schedule=EvenSteps(config.steps, block),
            scorer=Confidence(config.score),
            selectors=(Quota(),) if config.steps else (),
        )
        cache = NoCache() if capabilities.block is None else BlockCache()
        self.rest = Policy(selectors=(Quota(),), stepper=PlainStepper(), cache=cache)


method = Reference
