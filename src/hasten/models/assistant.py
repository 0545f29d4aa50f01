"""A small language model that follows a target's rows and says what may come next: the draft model of speculative sampling.

It keeps a cache of its own per row and is fed tokens only. Every `begin` brings it to the row's committed text (what the
target refused is cut off, what it accepted is read again together with the new root, in one pass); every `grow` adds draft
nodes below it, under a tree mask, for all rows in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.engine.cache import RowCache
from hasten.engine.contracts import Backbone, RowInput, RowView
from hasten.engine.limits import LIMITS
from hasten.engine.masks import Explicit
from hasten.errors import IncompatibleError, MemoryFitError


@dataclass(slots=True)
class _Row:
    """One row's cache, the tokens in it, and the ancestors (as slots after the text) of every node grown below them."""

    cache: RowCache | None = None
    tokens: list[int] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)


class Assistant:
    """Follows rows with `model`, for a target of `vocab_size` tokens; at most `cache_bytes` of keys and values.

    A row for which there is no memory, or whose text has outgrown the model's window, is not followed.
    """

    def __init__(self, model: Backbone, vocab_size: int, cache_bytes: int = 256_000_000) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.pool = model.pool(cache_bytes)
        self._rows: dict[int, _Row] = {}

    def open(self, row: int) -> None:
        """A row joins; nothing is read before it is asked for."""
        self._rows[row] = _Row()

    def close(self, row: int) -> None:
        """A row leaves."""
        gone = self._rows.pop(row, None)
        if gone is not None and gone.cache is not None:
            gone.cache.release()

    def begin(self, rows: Sequence[RowView], depth: int, nodes: int) -> list[Tensor | None]:
        """Logits [target vocab] after each row's last token; None where the row is not followed.

        `depth` levels and `nodes` nodes may be grown below it until the next call.
        """
        live: list[tuple[int, _Row, Sequence[int]]] = []
        for i, view in enumerate(rows):
            own = self._rows[view.id]
            if len(view.tokens) + depth <= self.model.capabilities.max_len and self._room(own, view, nodes):
                live.append((i, own, view.tokens))
        out: list[Tensor | None] = [None] * len(rows)
        for _, own, tokens in live:
            same = 0
            for a, b in zip(own.tokens, tokens, strict=False):
                if a != b:
                    break
                same += 1
            same = min(same, len(tokens) - 1)  # the last token is read again where it must be, for its logits
            if own.cache is not None:
                own.cache.truncate(same)
            own.tokens, own.seen = list(tokens[:same]), []
        while live:
            inputs, waiting = [], []
            for _, own, tokens in live:
                part = list(tokens[len(own.tokens) : len(own.tokens) + LIMITS.prefill_chunk])
                positions = torch.arange(len(own.tokens), len(own.tokens) + len(part))
                inputs.append(RowInput(torch.tensor(part), positions, own.cache))
                own.tokens += part
            done = self.model.run(inputs)
            for (i, own, tokens), start, given in zip(live, done.logit_starts, inputs, strict=True):
                if own.cache is not None:
                    own.cache.advance(given.queries)
                if len(own.tokens) == len(tokens):
                    out[i] = self._fit(done.logits[start])
                else:
                    waiting.append((i, own, tokens))
            live = waiting
        return out

    def _room(self, own: _Row, view: RowView, nodes: int) -> bool:
        if own.cache is None:
            try:
                own.cache = self.pool.open(min(len(view.tokens) + view.remaining, self.model.capabilities.max_len) + nodes)
            except MemoryFitError:
                return False
        return own.cache.capacity >= len(view.tokens) + nodes

    def grow(self, asks: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """Logits [n, target vocab] after new nodes, for every (row id, their tokens, their parents) in one pass.

        Parents are -1 (the row's last token) or nodes grown before, numbered by row in the order they were given.
        """
        inputs: list[RowInput] = []
        for row, tokens, parents in asks:
            own = self._rows[row]
            if own.cache is None:
                raise IncompatibleError(f"row {row} is not followed", field="row")
            base, first = own.cache.length, len(own.seen)
            positions = []
            allowed = torch.zeros(len(tokens), base + first + len(tokens), dtype=torch.bool)
            allowed[:, :base] = True
            for j, parent in enumerate(parents):
                above = own.seen[parent] if parent >= 0 else []
                own.seen.append([*above, first + j])
                allowed[j, [base + slot for slot in own.seen[-1]]] = True
                positions.append(base + len(above))
            inputs.append(
                RowInput(
                    torch.tensor(list(tokens)), torch.tensor(positions), own.cache, Explicit(allowed), "all", base + first
                )
            )
        done = self.model.run(inputs)
        return [self._fit(done.row_logits(i)) for i in range(len(asks))]

    def _fit(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary: padding beyond it is dropped, ids the model lacks are impossible."""
        spare = self.vocab_size - logits.shape[-1]
        if spare <= 0:
            return logits[..., : self.vocab_size]
        return torch.nn.functional.pad(logits, (0, spare), value=-torch.inf)


def check_vocabularies(target: Any, draft: Any, target_size: int, draft_size: int, name: str) -> None:
    """Raise IncompatibleError unless ids mean the same token strings on both sides, up to padding at the end.

    `target` and `draft` are tokenizers, or None when unknown: then only sizes are compared, and must be equal.
    """
    if target is None or draft is None:
        if target_size != draft_size:
            raise IncompatibleError(
                f"draft model {name!r} has {draft_size} tokens and the target {target_size}; without tokenizers that is "
                "all there is to compare",
                hint="use a draft model of the same family",
                field="model",
            )
        return
    ours, theirs = target.token_strings(), draft.token_strings()
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            raise IncompatibleError(
                f"draft model {name!r} has another vocabulary: token {i} is {b!r}, the target's is {a!r}",
                hint="use a draft model of the same family",
                field="model",
            )
