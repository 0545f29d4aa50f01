"""Tiny masked-diffusion models and plain loops that decode with them, for tests of the canvas loop and its methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tiny
import torch
from torch import Tensor

from hasten import registry
from hasten.engine.contracts import Backbone, MethodContext, RowInput
from hasten.engine.engine import Engine, Parts
from hasten.engine.masks import FULL, BlockCausal
from hasten.engine.parts import CanvasRow, Forward, View
from hasten.models.config import ModelConfig
from hasten.policy import Policy
from hasten.types import Event, Output, Request, SamplingParams

MASK, EOS = 96, 0


class Masked:
    """A random stack that says it fills canvases; `block` makes it block-causal, `shift` predicts one position ahead."""

    def __init__(self, config: ModelConfig = tiny.PLAIN, seed: int = 0, block: int | None = None, shift: int = 0) -> None:
        self.stack = tiny.model(config, seed)
        self.name = "torch"
        self.capabilities = dataclasses.replace(
            self.stack.capabilities, kind="masked", mask_id=MASK, eos_ids=(EOS,), block=block, logit_shift=shift,
            cache_exact=frozenset({"block_causal"} if block else ()),
        )  # fmt: skip

    def __getattr__(self, name: str) -> object:
        return getattr(self.stack, name)

    def logits(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Aligned logits float32 [L, vocab] of one whole canvas, the mask token at -inf: what a plain loop sees."""
        ids = torch.as_tensor(tokens)
        block, shift = self.capabilities.block, self.capabilities.logit_shift
        seen = BlockCausal(block) if block else FULL
        raw = self.stack.run([RowInput(ids, torch.arange(len(ids)), None, seen, "all")]).logits.clone()
        if shift:
            raw = torch.cat((raw[:1], raw[:-1]))
        raw[:, MASK] = -torch.inf
        return raw


def policy(model: Backbone, *names: str) -> Policy:
    """These methods over the reference sampler."""
    context = MethodContext("tiny", model)
    joined = Policy()
    for name in names:
        joined = joined.join(registry.build(name, context).policy)
    base = registry.build("reference", context)
    return joined.over(base.policy).over(base.rest).check(model.capabilities)


def run(
    model: Backbone, prompts: Sequence[Sequence[int]], *names: str, events: list[Event] | None = None, **sampling: object
) -> list[Output]:
    """All prompts in one batch; sampling goes to the end of the canvas unless told otherwise."""
    engine = Engine(model, cache_bytes=64_000_000)
    params = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, "seed": 7, **sampling})  # type: ignore[arg-type]
    parts = Parts(canvas=policy(model, *names), method=names)
    watch = None if events is None else events.append
    return [outs[0] for outs in engine.run([(Request(tuple(p), params), parts) for p in prompts], watch)]


def prompts(count: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1..longest tokens without special ids."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, MASK, (size,), generator=generator).tolist() for size in sizes]


def plain_loop(model: Masked, prompt: Sequence[int], length: int, block: int, steps: int) -> tuple[list[int], int]:
    """LLaDA's sampler as its paper states it, T = 0: (canvas after the prompt, forwards)."""
    x = [*prompt, *[MASK] * length]
    forwards = 0
    for low in range(len(prompt), len(x), block):
        high = min(low + block, len(x))
        blocks = -(-length // block)
        masks, turns = high - low, max(1, min(high - low, steps // blocks))
        for turn in range(turns):
            quota = masks // turns + (1 if turn < masks % turns else 0)
            probs = model.logits(x).softmax(-1)
            forwards += 1
            open_ = [i for i in range(low, high) if x[i] == MASK]
            ranked = sorted(open_, key=lambda i: -float(probs[i].max()))
            for i in ranked[:quota]:
                x[i] = int(probs[i].argmax())
    return x[len(prompt) :], forwards


def view_of(score: Sequence[float] | Tensor, open_: Sequence[bool] | Tensor, first: int = 10) -> tuple[View, CanvasRow]:
    """A step as selectors see it: scores and open flags of a block that starts at position `first`."""
    score, open_ = torch.as_tensor(score, dtype=torch.float32), torch.as_tensor(open_, dtype=torch.bool)
    size = len(score)
    accepted = torch.cat((torch.ones(first, dtype=torch.bool), ~open_))
    row = CanvasRow(
        id=0, tokens=torch.full((first + size,), MASK), provenance=torch.tensor([0] * first + [2] * size), accepted=accepted,
        prompt_len=first, end=first + size, window=(first, first + size), sampling=SamplingParams(), blank=MASK,
    )  # fmt: skip
    positions = torch.arange(first, first + size)
    probs = score.clamp(1e-6, 1 - 1e-6)
    logits = torch.stack((probs, 1 - probs), 1).log()
    inside = torch.ones(size, dtype=torch.bool)
    x0 = torch.zeros(size, dtype=torch.int64)
    return View(Forward(logits, positions), logits, positions, open_, inside, logits, x0, score, score), row
