"""The scoring call: log-probabilities of given tokens, in chunks, without holding logits of a whole text."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from hasten.engine.cache import CachePool
from hasten.engine.contracts import Backbone, RowInput
from hasten.engine.limits import LIMITS
from hasten.errors import ContextLengthError, out_of_range
from hasten.types import TokenLogprob


def score(backbone: Backbone, pool: CachePool, tokens: Sequence[int], start: int) -> list[float]:
    """Natural-log probabilities of tokens[start:], each given all tokens before it, under the raw distribution.

    `start` is at least 1 (the first token has nothing before it). Raises ContextLengthError, MemoryFitError, ConfigError.
    """
    work = judge(backbone, pool, tokens, start)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return [one.logprob for one in end.value]


def judge(
    backbone: Backbone, pool: CachePool, tokens: Sequence[int], start: int, top: int = 0
) -> Generator[None, None, list[TokenLogprob]]:
    """As `score`, with the `top` best alternatives of every token; yields after each chunk, so that others may go on.

    Chunks of `LIMITS.prefill_chunk` queries share one cache row: memory does not grow with length x vocabulary.
    """
    caps = backbone.capabilities
    if not 1 <= start <= len(tokens):
        raise out_of_range("start", start, f"in [1, {len(tokens)}]")
    if len(tokens) > caps.max_len:
        raise ContextLengthError(
            f"{len(tokens)} tokens exceed the model's window of {caps.max_len}", hint="shorten the text", field="text"
        )
    ids = torch.tensor(tokens)
    if len(tokens) and not (int(ids.min()) >= 0 and int(ids.max()) < caps.vocab_size):
        raise out_of_range("tokens", int(ids.max()), f"in [0, {caps.vocab_size - 1}]")
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
                values, places = done.logits.topk(min(top, caps.vocab_size))
                pairs = zip(places.tolist(), (values - sums[:, None]).tolist(), strict=True)
                best = [tuple(zip(tokens, logs, strict=True)) for tokens, logs in pairs]
            out += [TokenLogprob(*one) for one in zip(targets.tolist(), chosen, best, strict=True)]
    finally:
        cache.release()
    return out
