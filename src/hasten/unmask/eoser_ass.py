"""EOSER and ASS (2509.23924): end-of-text tokens are held back early, and commits grow from step to step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import CanvasRow, PartRange, View
from hasten.errors import ConfigError, IncompatibleError, out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

card = MethodCard(
    slug="eoser-ass",
    title="Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning "
    "with Fewer Decoding Step",
    paper="2509.23924",
    date="2025-09",
    plugs_into="unmask",
    exactness="lossy",
    claim="LLaDA-8B on maths and planning: answers in log2 L steps (7 for 128 tokens) that compete with L/2 even ones.",
    no_help="Models that were not trained on answers padded with end tokens, and canvases that the answer fills.",
    knobs={
        "eoser": "scale down the scores of end tokens early (true or false)",
        "ass": "commit 1, 2, 4, ... tokens per step instead of what the other schedule says (true or false)",
        "blocks": "ass: blocks, all but the first filled in one step (1 to the number of steps)",
        "steps": "ass: forwards for the whole canvas (0: log2 of its length, the only number when ratio is 0)",
        "ratio": "ass: growth of the commits from step to step (0: the published doubling; 1: even)",
        "low": "eoser: factor in the first step, in [0, 1] (-1: 0.01 with ass, else 0.4)",
        "high": "eoser: factor in the last step, in [low, 1]",
        "ids": "eoser: ids of end tokens joined by dots (empty: the model's)",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of both halves; the defaults are the published ones."""

    eoser: bool = True
    ass: bool = True
    blocks: int = 1
    steps: int = 0
    ratio: float = 0.0
    low: float = -1.0
    high: float = 1.0
    ids: str = ""

    def __post_init__(self) -> None:
        if not self.eoser and not self.ass:
            raise out_of_range("eoser-ass.eoser", self.eoser, "true where ass is false")
        if self.blocks < 1:
            raise out_of_range("eoser-ass.blocks", self.blocks, "at least 1")
        if self.steps < 0:
            raise out_of_range("eoser-ass.steps", self.steps, "at least 0 (0: log2 of the canvas)")
        if not 0 <= self.ratio <= 16:
            raise out_of_range("eoser-ass.ratio", self.ratio, "in [0, 16] (0: the published doubling)")
        if self.ratio and self.blocks > 1:
            raise out_of_range("eoser-ass.blocks", self.blocks, "1 where a ratio is given")
        if not (self.low == -1 or 0 <= self.low <= 1):
            raise out_of_range("eoser-ass.low", self.low, "in [0, 1], or -1 for the published one")
        if not max(self.first, 0) <= self.high <= 1:
            raise out_of_range("eoser-ass.high", self.high, f"in [{self.first:g}, 1]")
        if self.ids and not all(part.isascii() and part.isdigit() for part in self.ids.split(".")):
            raise out_of_range("eoser-ass.ids", self.ids, "token ids joined by dots, as in 126081.126348")

    @property
    def first(self) -> float:
        """The factor that end tokens start from."""
        return self.low if self.low >= 0 else 0.01 if self.ass else 0.4


class _Part:
    """What both halves declare."""

    name = "eoser-ass"
    range: PartRange = "block"
    memoryless = True
    lossless = False
    mutates_committed = False


class EndRejection(_Part):
    """Scales the score of positions whose candidate is an end token by a factor that grows to `high`; tokens stay.

    Scores below zero (entropies) are divided by it. The step is the canvas's, so that blocks do not start anew.
    """

    def __init__(self, config: Config, ids: Tensor) -> None:
        self.config, self.ids = config, ids

    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step` (from 0) of `steps`."""
        growth = (self.config.ratio or 2.0) if self.config.ass else 1.0
        if steps <= 1:
            share = 1.0
        elif growth > 1:
            share = (growth ** (step + 1) - 1) / growth**steps
        else:
            share = step / (steps - 1)
        return self.config.first + (self.config.high - self.config.first) * min(share, 1.0)

    def rescore(self, view: View, row: CanvasRow) -> Tensor:
        """score' [P]."""
        factor = self.factor(min(row.global_step, row.planned - 1), row.planned)
        if factor == 1:
            return view.score
        held = torch.where(view.score < 0, view.score / max(factor, 1e-9), view.score * factor)
        return torch.where(torch.isin(view.x0, self.ids), held, view.score)


class Ascending(_Part):
    """Blocks and quotas of ASS. One block: 1, 2, 4, ..., the last step takes the rest of L tokens in floor(log2 L) steps.

    With K blocks the first takes 2^(S-K+1) - 1 tokens in as many steps as doubling needs, each later one a single step.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def plan(self, view: View | None, row: CanvasRow) -> int:
        """The end of the block that starts at row.window[0]."""
        first = row.planned - self.config.blocks + 1
        for i in range(self.config.blocks - 1):
            end = row.prompt_len + 2 ** (first + i) - 1
            if end > row.window[0]:
                return end
        return row.end

    def quotas(self, row: CanvasRow) -> tuple[int, ...]:
        """Quotas of the block row.window, summing to its open positions."""
        if self.config.ratio:
            return geometric(row.left, row.planned, self.config.ratio)
        single = row.window[0] > row.prompt_len and self.config.blocks > 1
        return doubling(row.left, 1 if single else row.planned - self.config.blocks + 1)

    def planned(self, row: CanvasRow) -> int:
        """Steps of the whole canvas; raises ConfigError for numbers of steps or blocks that do not go with its length."""
        length = int(row.masked.sum())
        own = length.bit_length() - 1
        if own < 1:
            raise out_of_range("max_tokens", length, "at least 2 for eoser-ass")
        steps = self.config.steps or own
        if not self.config.ratio and steps != own:
            raise ConfigError(
                f"eoser-ass.steps = {steps} does not go with a canvas of {length} tokens; steps must be {own}, or 0",
                hint="give a ratio for another number of steps, as in eoser-ass:ratio=1.5,steps=16",
                field="eoser-ass.steps",
            )
        if steps > length:
            raise out_of_range("eoser-ass.steps", steps, f"at most the {length} tokens of the canvas")
        if self.config.blocks > steps:
            raise out_of_range("eoser-ass.blocks", self.config.blocks, f"at most the {steps} steps of the canvas")
        return steps


def doubling(count: int, steps: int) -> tuple[int, ...]:
    """Quotas 1, 2, 4, ... that sum to `count` in at most `steps` steps; the last one takes the rest."""
    quotas: list[int] = []
    for i in range(steps):
        left = count - sum(quotas)
        if left:
            quotas.append(left if i == steps - 1 else min(1 << i, left))
    return tuple(quotas)


def geometric(count: int, steps: int, ratio: float) -> tuple[int, ...]:
    """Quotas of at least 1 in proportion to ratio^n that sum to `count`; what rounding leaves goes to the largest rests."""
    steps = min(steps, count)
    if not steps:
        return ()
    weights = [ratio**n for n in range(steps)]
    exact = [count * weight / sum(weights) for weight in weights]
    quotas = [max(1, int(value)) for value in exact]
    while (rest := count - sum(quotas)) > 0:
        for i in sorted(range(steps), key=lambda n: quotas[n] - exact[n])[:rest]:
            quotas[i] += 1
    while sum(quotas) > count:  # the many that were raised to 1
        quotas[quotas.index(max(quotas))] -= 1
    return tuple(quotas)


class EoserAss:
    """Both halves, or one of them: a score stage, and a planner with its schedule."""

    name = "eoser-ass"

    def __init__(self, config: Config, context: MethodContext) -> None:
        caps = context.capabilities
        if config.ass and caps.block is not None:
            raise IncompatibleError(
                f"method 'eoser-ass' plans blocks; model {context.model!r} was trained on blocks of {caps.block}",
                hint="use eoser-ass:ass=false",
                field="method",
            )
        self.policy = Policy()
        if config.ass:
            ascending = Ascending(config)
            self.policy = Policy(planner=ascending, schedule=ascending)
        if config.eoser:
            self.policy = self.policy.join(Policy(scores=(EndRejection(config, _ends(config, context)),)))


def _ends(config: Config, context: MethodContext) -> Tensor:
    """The ids that are held back: as given, else the model's end of text (its end of turn only where that is all)."""
    caps = context.capabilities
    ids = [int(part) for part in config.ids.split(".")] if config.ids else list(caps.eos_ids)
    if not ids:
        raise ConfigError(
            f"model {context.model!r} names no end token to hold back", hint="give eoser-ass:ids=ID", field="eoser-ass.ids"
        )
    if max(ids) >= caps.vocab_size:
        raise out_of_range("eoser-ass.ids", max(ids), f"token ids below the vocabulary of {caps.vocab_size}")
    text_ends = [i for i in ids if i != caps.eot_id]
    return torch.tensor(ids if config.ids or not text_ends else text_ends)


method = EoserAss
