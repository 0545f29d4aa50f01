"""One choice of a request on its way, and a row of the autoregressive loop with its part of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from hasten.engine.cache import Past, RowCache
from hasten.engine.contracts import EMPTY_DRAFT, NO_NEEDS, Draft, Drafter, Law, Needs, Pseudo, RowInput, RowView
from hasten.engine.masks import CAUSAL, Tree, Visibility
from hasten.engine.sampling import Sampler
from hasten.engine.verify import depths
from hasten.failure import words
from hasten.text import StopText
from hasten.types import FinishReason, Output, Request, TokenLogprob, Usage


@dataclass(slots=True, eq=False, kw_only=True)
class Choice:
    """One choice of one request on its way, in whichever loop: its cache, its text, counters, and why it ended."""

    id: int
    request_id: int
    choice: int
    request: Request
    text: StopText
    cache: RowCache
    eos_ids: frozenset[int]
    added_s: float
    started_s: float
    method: tuple[str, ...] = ("plain",)
    forwards: int = 0
    computed: int = 0
    size: int = 1  # query tokens of its part of the last pass
    reason: FinishReason | None = None
    stop: str | int | None = None
    error: str = ""
    cause: Exception | None = None  # what was raised, where something was

    def end(self, reason: FinishReason, error: str = "") -> None:
        """Stop here, with what is committed; a failed row's keys are never looked at again."""
        self.reason, self.error = reason, error
        if reason == "error":
            self.cache.truncate(0)
            self.cache.scrub()
        else:
            self.text.finish()

    def fail(self, cause: Exception) -> None:
        """Stop here because of what was raised."""
        self.cause = cause
        self.end("error", words(cause))


@dataclass(slots=True, eq=False, kw_only=True)
class Row(Choice):
    """A choice of the autoregressive loop: committed tokens, sampler and drafter."""

    sampler: Sampler
    limit: int
    drafter: Drafter | None = None
    law: Law = "greedy"
    budget: int = 0
    measured: bool = False
    lead: Row | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    first_s: float = 0.0
    opened: bool = False
    cached: int = 0  # prompt tokens whose keys were kept from an earlier request
    native: bool = True  # all its keys come from the engine's own backbone, none from a stand-in
    kept: bool = False  # its keys were offered to the prefix store once its prompt was read

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens committed after the prompt."""
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens this row may still commit."""
        return self.limit - self.generated

    @property
    def pending(self) -> int:
        """Committed tokens that are not in the cache yet."""
        return len(self.tokens) - self.cache.length

    def view(self) -> RowView:
        """What a drafter sees of this row."""
        temperature = self.sampler.params.temperature
        return RowView(self.id, self.tokens, self.remaining, temperature, self.sampler.seed, Past(self.cache))

    def output(self, now_s: float) -> Output:
        """The finished choice; `now_s` is on the trace clock."""
        decoded = self.generated
        usage = Usage(
            prompt_tokens=self.prompt_len,
            completion_tokens=decoded,
            forwards=self.forwards,
            computed_tokens=self.computed,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            prefill_s=(self.first_s or now_s) - self.started_s,
            decode_s=now_s - self.first_s if self.first_s else 0.0,
            draft_s=self.draft_s,
            cached_tokens=self.cached,
        )
        return Output(
            text=self.text.text,
            tokens=tuple(self.tokens[self.prompt_len :]),
            finish_reason=self.reason or "abort",
            usage=usage,
            seed=self.sampler.seed,
            choice=self.choice,
            method=self.method,
            stop=self.stop,
            logprobs=tuple(self.logprobs) if self.request.sampling.logprobs is not None else None,
        )


@dataclass(slots=True)
class Turn:
    """One row's part of a pass: `count` pending tokens, then the nodes of `draft` when the row is `ready`.

    `pseudo` are the placeholders its drafter asks for, None where they do not pay; `needs` is what it wants to hear.
    `asked` says that its drafter was weighed and drafted, `taken` how many nodes were accepted.
    """

    row: Row
    count: int
    ready: bool
    draft: Draft = EMPTY_DRAFT
    pseudo: Pseudo | None = None
    needs: Needs = NO_NEEDS
    asked: bool = False
    taken: int = 0

    @property
    def heard(self) -> int:
        """Prompt tokens before the root whose logits the drafter asked for."""
        return self.read if self.needs.prompt and self.needs.prompt_logits else 0

    @property
    def read(self) -> int:
        """Prompt tokens that this pass reads, without the root."""
        return self.count - 1 if self.ready else self.count

    @property
    def anchors(self) -> tuple[int, ...]:
        """Queries that placeholders hang on, as many as the cache has scratch slots for: the last ones first."""
        if self.pseudo is None:
            return ()
        root, last = self.count - 1, self.count - 1 + len(self.draft)
        places = {"last": (last,), "ends": tuple(dict.fromkeys((root, last))), "all": tuple(range(root, last + 1))}
        room = (self.row.cache.capacity - self.row.cache.length - last - 1) // len(self.pseudo.layers)
        wanted = places[self.pseudo.anchors]
        return wanted[max(0, len(wanted) - room) :]

    def input(self) -> RowInput:
        """The row's queries: what is pending, the nodes behind it, and the placeholders."""
        row, base, anchors = self.row, self.row.cache.length, self.anchors
        pseudo = self.pseudo if anchors else None
        ids, root = row.tokens[base : base + self.count], self.count - 1
        places: Sequence[int] = range(base, base + self.count)
        sight: Visibility = CAUSAL
        want: Literal["all", "last", "none"] | tuple[int, ...] = "all" if self.heard else "last" if self.ready else "none"
        if len(self.draft):
            below = depths(self.draft.parents)
            ids, places = [*ids, *self.draft.tokens], [*places, *(base + root + depth for depth in below)]
            sight = Tree((*range(-1, root), *(root if p < 0 else root + 1 + p for p in self.draft.parents)))
            want = tuple(range(0 if self.heard else root, root + 1 + len(self.draft)))
        # through numpy: half of torch's time for so few numbers
        tokens, positions = (torch.from_numpy(np.array(one, np.int64)) for one in (ids, places))
        return RowInput(tokens, positions, row.cache, sight, want, pseudo=pseudo, anchors=anchors)
