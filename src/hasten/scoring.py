"""The scoring call: log-probabilities of given tokens, in chunks, without holding logits of a whole text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hasten.engine.cache import CachePool
from hasten.engine.contracts import Backbone, RowInput
from hasten.engine.limits import LIMITS
from hasten.errors import ContextLengthError, out_of_range


def score(backbone: Backbone, pool: CachePool, tokens: Sequence[int], start: int) -> list[float]:
    """Natural-log probabilities of tokens[start:], each given all tokens before it, under the raw distribution.

    `start` is at least 1 (the first token has nothing before it). Chunks of `LIMITS.prefill_chunk` queries share one
    cache row, so memory does not grow with length x vocabulary. Raises ContextLengthError, MemoryFitError, ConfigError.
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
    out: list[float] = []
    cache = pool.open(len(tokens))
    try:
        for base in range(0, len(tokens) - 1, LIMITS.prefill_chunk):
            end = min(base + LIMITS.prefill_chunk, len(tokens) - 1)
            wanted = tuple(range(max(start - 1 - base, 0), end - base))
            row = RowInput(ids[base:end], torch.arange(base, end), cache, logits=wanted)
            logits = backbone.run([row]).logits
            cache.advance(end - base)
            if wanted:
                targets = ids[base + wanted[0] + 1 : end + 1]
                out += (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
    finally:
        cache.release()
    return out
