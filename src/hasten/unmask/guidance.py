"""Unsupervised classifier-free guidance (SMDM, LLaDA's cfg_scale): away from what the model writes without the prompt.

A guided forward is two: of the canvas, and of its companion, in which everything that was given is masked. Both run in one
pass, over the same positions with the same sight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import SLOT, CanvasRow, Forward, PartRange
from hasten.errors import out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard
from hasten.unmask.reference import NoCache

card = MethodCard(
    slug="guidance",
    title="Unsupervised classifier-free guidance (SMDM, LLaDA)",
    paper="2410.18514",
    date="2024-10",
    plugs_into="unmask",
    exactness="lossy",
    claim="Models pretrained on unpaired text follow a prompt better, without training for it; two forwards per step.",
    no_help="Models that never saw a prompt masked: mini-dlm gains nothing beyond chance, and loses from scale 1 on.",
    knobs={"scale": "how far from the logits without the prompt, in [0, 100]; 0 is off and costs nothing"},
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the guidance; LLaDA evaluates GPQA, ARC-C and HellaSwag with 0.5, TruthfulQA with 2, and writes with 0.

    Raises ConfigError naming guidance.scale outside [0, 100].
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= 100:
            raise out_of_range("guidance.scale", self.scale, "in [0, 100]")


class _Blocks(NoCache):
    """Nothing is kept, and nothing behind the block is computed: blocks of a block-causal model never see later ones."""

    name = "guidance"

    def span(self, row: CanvasRow, refresh: bool, shift: int) -> tuple[int, int]:
        """Everything up to the end of the block."""
        return 0, row.window[1]


class Guidance:
    """A guide: the logits of a step are l_u + (scale + 1) (l - l_u), l_u those of the canvas with all given text masked.

    Given is what is final before the first step: the prompt, fixed text of a template and pins (LLaDA: `x != mask_id`).
    Every part of the policy sees guided logits alone. What the canvas has committed stays visible in both forwards.
    """

    name = "guidance"
    range: PartRange = "block"
    memoryless = True
    lossless = False
    mutates_committed = False

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config
        self._mask, self._block = context.capabilities.mask_id, context.capabilities.block

    @property
    def policy(self) -> Policy:
        """This guide, which keeps no keys; nothing at scale 0."""
        if self.config.scale == 0:
            return Policy()
        return Policy(guide=self, cache=None if self._block is None else _Blocks())

    def companion(self, row: CanvasRow) -> CanvasRow:
        """The state with everything masked that was given."""
        return replace(row, tokens=row.tokens.masked_fill(row.provenance != SLOT, row.blank))

    def join(self, seen: Forward, other: Forward) -> Forward:
        """The guided forward of a state, out of its own and its companion's; logits float32 [P, vocab]."""
        logits = (seen.logits - other.logits).mul_(self.config.scale + 1).add_(other.logits)
        if self._mask is not None:
            logits[:, self._mask] = -torch.inf
        return Forward(logits, seen.positions)


method = Guidance
