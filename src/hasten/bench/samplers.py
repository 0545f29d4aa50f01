"""Reference samplers of masked diffusion written down as plain loops, to compare the engine with: LLaDA, Dream, Fast-dLLM.

They use a model's forward and nothing else of the engine: no scheduler, no policies, no shared code of the methods. Greedy,
one sequence, every forward over everything (Fast-dLLM's cache: over the block). Each is a runner of `hasten.bench.compare`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.bench.compare import Answer, Prompt, Runner
from hasten.engine.contracts import RowInput
from hasten.engine.masks import FULL
from hasten.errors import IncompatibleError

if TYPE_CHECKING:
    from hasten.llm import LLM

BLOCK, TAU, EPS = 32, 0.9, 1e-3
NAMES = ("llada", "dream", "fast-dllm")


class _Canvas:
    """Prompt and masks of one answer, and the model that reads them; counts forwards and query tokens."""

    def __init__(self, llm: LLM, prompt: Prompt, tokens: int) -> None:
        self.model, self.caps = llm.model, llm.model.capabilities
        self.mask = int(self.caps.mask_id or 0)
        self.ids = torch.tensor([*prompt.ids, *[self.mask] * tokens])
        self.start, self.end = len(prompt.ids), len(prompt.ids) + tokens
        self.forwards = self.computed = 0
        self.commits: list[tuple[int, int]] = []

    def logits(self, low: int = 0, high: int | None = None, cache: Any = None) -> Tensor:
        """Logits [high - low, vocab] that predict positions low..high-1, the mask itself excluded."""
        high, shift = self.end if high is None else high, self.caps.logit_shift
        first = max(0, low - shift)
        row = RowInput(
            self.ids[first:high], torch.arange(first, high), cache, FULL, "all", None if cache is None else first
        )
        out = self.model.run([row]).logits.clone()
        out[:, self.mask] = -torch.inf
        self.forwards += 1
        self.computed += high - first
        if first == low and shift:
            return torch.cat((out[:1], out[: high - low - 1]))
        return out[: high - low]

    def open(self, low: int, high: int) -> list[int]:
        """Masked positions in low..high-1."""
        return [at for at in range(low, high) if int(self.ids[at]) == self.mask]

    def commit(self, at: int, token: int) -> None:
        """Make a position final."""
        self.ids[at] = token
        self.commits.append((at - self.start, self.forwards))

    def ended(self) -> bool:
        """Whether an end token is final and everything before it is too."""
        for at in range(self.start, self.end):
            token = int(self.ids[at])
            if token == self.mask:
                return False
            if token in self.caps.eos_ids:
                return True
        return True


def llada(canvas: _Canvas) -> None:
    """LLaDA's low-confidence remasking (arXiv 2502.09992, algorithm 5): blocks, the surest position of the block per
    step."""
    for low in range(canvas.start, canvas.end, BLOCK):
        high = min(low + BLOCK, canvas.end)
        while places := canvas.open(low, high):
            best = canvas.logits().softmax(-1).max(-1)
            at = max(places, key=lambda place: float(best.values[place]))
            canvas.commit(at, int(best.indices[at]))
            if canvas.ended():
                return


def dream(canvas: _Canvas) -> None:
    """Dream's sampler (arXiv 2508.15487): the whole canvas, a linear schedule of one step per token, least entropy
    first."""
    steps = canvas.end - canvas.start
    times = torch.linspace(1, EPS, steps + 1, dtype=torch.float64)
    for i in range(steps):
        places = canvas.open(canvas.start, canvas.end)
        count = len(places) if i == steps - 1 else int(len(places) * (1 - float(times[i + 1] / times[i])))
        if not count:
            continue  # its forward would be the one before again
        probs = canvas.logits().softmax(-1)
        score = (probs * (probs + 1e-10).log()).sum(-1)
        for at in sorted(places, key=lambda place: -float(score[place]))[:count]:
            canvas.commit(at, int(probs[at].argmax()))
        if canvas.ended():
            return


def fast_dllm(canvas: _Canvas, cache: Any = None) -> None:
    """Fast-dLLM (arXiv 2505.22618): every position of the block with probability `TAU`, at least one; with `cache` its dual
    cache, where a block's first forward computes everything and the others the block alone."""
    for low in range(canvas.start, canvas.end, BLOCK):
        high, fresh = min(low + BLOCK, canvas.end), True
        while places := canvas.open(low, high):
            if cache is None or fresh:
                best, base = canvas.logits(0, None, cache).softmax(-1).max(-1), 0
            else:
                best, base = canvas.logits(low, high, cache).softmax(-1).max(-1), low
            if cache is not None:
                cache.length, fresh = canvas.end, False
            sure = [at for at in places if float(best.values[at - base]) >= TAU]
            for at in sure or [max(places, key=lambda place, b=base: float(best.values[place - b]))]:  # type: ignore[misc]
                canvas.commit(at, int(best.indices[at - base]))
            if canvas.ended():
                return


def runners(llm: LLM, wanted: tuple[str, ...] = NAMES) -> dict[str, Runner]:
    """The samplers named, Fast-dLLM without and with its cache; raises IncompatibleError unless attention is full."""
    caps = llm.model.capabilities
    if caps.kind != "masked" or caps.block is not None:
        raise IncompatibleError(
            f"the reference samplers fill canvases with full attention, which {llm.name!r} is not for", field="peers"
        )

    def runner(loop: Callable[..., None], cached: bool = False) -> Runner:
        def answer(prompt: Prompt, tokens: int) -> Answer:
            start = time.perf_counter()
            canvas = _Canvas(llm, prompt, tokens)
            cache = llm.engine.scheduler.pool.open(canvas.end) if cached else None
            try:
                loop(canvas, *([cache] if cached else []))
            finally:
                if cache is not None:
                    cache.release()
            ids = canvas.ids[canvas.start :].tolist()
            stop = next((i + 1 for i, token in enumerate(ids) if token in caps.eos_ids), len(ids))
            seconds = time.perf_counter() - start
            return Answer(
                tuple(ids[:stop]),
                seconds,
                seconds,
                canvas.forwards,
                computed=canvas.computed,
                commits=tuple(canvas.commits),
            )

        return answer

    made = {"llada": {"LLaDA loop": runner(llada)}, "dream": {"Dream loop": runner(dream)}}
    made["fast-dllm"] = {"Fast-dLLM loop": runner(fast_dllm), "Fast-dLLM cached loop": runner(fast_dllm, True)}
    return {name: run for one in wanted for name, run in made[one].items()}
