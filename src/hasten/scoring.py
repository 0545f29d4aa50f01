"""What is read from given text, in chunks: log-probabilities of its tokens, and one vector that stands for it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar, cast

import torch

from hasten.engine.cache import CachePool
from hasten.engine.contracts import Backbone, Needs, RowInput
from hasten.engine.limits import LIMITS
from hasten.engine.masks import CAUSAL, FULL, BlockCausal
from hasten.errors import ContextLengthError, IncompatibleError, out_of_range
from hasten.types import TokenLogprob

T = TypeVar("T")


def finish(work: Generator[None, None, T]) -> T:
    """The result of work that is done in chunks, with nothing in between."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast("T", end.value)


def score(backbone: Backbone, pool: CachePool, tokens: Sequence[int], start: int) -> list[float]:
    """Natural-log probabilities of tokens[start:], each given all tokens before it, under the raw distribution.

    `start` is at least 1 (the first token has nothing before it). Raises ContextLengthError, MemoryFitError, ConfigError.
    """
    return [one.logprob for one in finish(judge(backbone, pool, tokens, start))]


def judge(
    backbone: Backbone, pool: CachePool, tokens: Sequence[int], start: int, top: int = 0
) -> Generator[None, None, list[TokenLogprob]]:
    """As `score`, with the `top` best alternatives of every token; yields after each chunk, so that others may go on.

    Chunks of `LIMITS.prefill_chunk` queries share one cache row: memory does not grow with length x vocabulary.
    """
    if not 1 <= start <= len(tokens):
        raise out_of_range("start", start, f"in [1, {len(tokens)}]")
    ids = _checked(backbone, tokens, 1)  # the last one is only predicted
    out: list[TokenLogprob] = []
    cache = pool.open(len(tokens))
    try:
        for base in range(0, len(tokens) - 1, LIMITS.prefill_chunk):
            if base:
                yield
            end = min(base + LIMITS.prefill_chunk, len(tokens) - 1)
            wanted = tuple(range(max(start - 1 - base, 0), end - base))
            row = RowInput(ids[base:end], torch.arange(base, end), cache, logits=wanted)
            done = backbone.run([row])
            cache.advance(end - base)
            if not wanted:
                continue
            targets = ids[base + wanted[0] + 1 : end + 1]
            sums = done.logits.logsumexp(-1)
            chosen = (done.logits.gather(1, targets[:, None])[:, 0] - sums).tolist()
            best: list[tuple[tuple[int, float], ...]] = [()] * len(wanted)
            if top:
                values, places = done.logits.topk(min(top, backbone.capabilities.vocab_size))
                pairs = zip(places.tolist(), (values - sums[:, None]).tolist(), strict=True)
                best = [tuple(zip(tokens, logs, strict=True)) for tokens, logs in pairs]
            out += [TokenLogprob(*one) for one in zip(targets.tolist(), chosen, best, strict=True)]
    finally:
        cache.release()
    return out


def pooled(
    backbone: Backbone, pool: CachePool, tokens: Sequence[int], *, last: bool = False
) -> Generator[None, None, torch.Tensor]:
    """The mean of the final hidden states of a text, or the `last` one; float32 [hidden]. Yields after each chunk.

    A model that sees both ways reads the text whole. Raises ContextLengthError, MemoryFitError, ConfigError,
    IncompatibleError for a model that shows no hidden states.
    """
    caps = backbone.capabilities
    ids, masked = _checked(backbone, tokens), caps.kind == "masked"
    seen = CAUSAL if not masked else FULL if caps.block is None else BlockCausal(caps.block)
    chunk = len(tokens) if masked else LIMITS.prefill_chunk
    cache = None if len(tokens) <= chunk else pool.open(len(tokens))
    total, state = torch.zeros(()), torch.zeros(())
    try:
        for base in range(0, len(tokens), chunk):
            if base:
                yield
            end = min(base + chunk, len(tokens))
            row = RowInput(ids[base:end], torch.arange(base, end), cache, seen, "none")
            states = backbone.run([row], Needs(final_hidden=True)).final_hidden
            if states is None:
                raise IncompatibleError("this model shows no hidden states", field="model")
            if cache is not None:
                cache.advance(end - base)
            total, state = total + states.float().sum(0), states[-1].float()
    finally:
        if cache is not None:
            cache.release()
    return state if last else total / len(tokens)


def _checked(backbone: Backbone, tokens: Sequence[int], more: int = 0) -> torch.Tensor:
    """Token ids int64 [T] within the model's window, of which `more` may stick out, and vocabulary."""
    caps = backbone.capabilities
    if len(tokens) > caps.max_len + more:
        raise ContextLengthError(
            f"{len(tokens)} tokens exceed the model's window of {caps.max_len}", hint="shorten the text", field="text"
        )
    ids = torch.tensor(tokens)
    if not len(tokens) or int(ids.min()) < 0 or int(ids.max()) >= caps.vocab_size:
        wrong = len(tokens) and (int(ids.min()) if int(ids.min()) < 0 else int(ids.max()))
        raise out_of_range("tokens", wrong, f"token ids in [0, {caps.vocab_size - 1}], at least one")
    return ids


def bound(
    backbone: Backbone, prompt: Sequence[int], answer: Sequence[int], *, samples: int = 128, seed: int = 0
) -> Generator[None, None, float]:
    """An estimate of a lower bound of log p(answer | prompt) under a masked model (arXiv 2502.09992, equation 14).

    Each Monte-Carlo sample masks k of the L answer tokens, k even over 1..L (spread over the samples), and takes their
    log-probabilities times L / k. The noise depends on `seed` alone. Yields after each pass. Raises ConfigError,
    ContextLengthError, IncompatibleError for a model without a mask token.
    """
    caps, size = backbone.capabilities, len(answer)
    if caps.mask_id is None:
        raise IncompatibleError(f"a {caps.kind} model has no mask token", hint="`score` is exact for it", field="model")
    if not size or samples < 1:
        raise out_of_range("answer" if not size else "samples", 0 if not size else samples, "at least 1")
    ids, start = _checked(backbone, [*prompt, *answer]), len(prompt)
    seen = FULL if caps.block is None else BlockCausal(caps.block)
    generator = torch.Generator().manual_seed(seed)
    offset, total, done = float(torch.rand((), generator=generator)), 0.0, 0
    while done < samples:
        if done:
            yield
        rows, places = [], []
        for i in range(done, min(samples, done + max(1, LIMITS.step_tokens // len(ids)))):
            count = int((offset + i / samples) % 1.0 * size) + 1
            hidden = torch.randperm(size, generator=generator)[:count].sort().values + start
            tokens = ids.clone()
            tokens[hidden] = caps.mask_id
            wanted = (hidden - caps.logit_shift).clamp(min=0)
            rows.append(RowInput(tokens, torch.arange(len(ids)), None, seen, tuple(wanted.tolist())))
            places.append(hidden)
        logits = backbone.run(rows).logits
        logits[:, caps.mask_id] = -torch.inf
        chosen = logits.gather(1, ids[torch.cat(places)][:, None])[:, 0] - logits.logsumexp(-1)
        for part, hidden in zip(chosen.split([len(p) for p in places]), places, strict=True):
            total += float(part.sum(dtype=torch.float64)) * size / len(hidden)
        done += len(rows)
    return total / samples
