"""Prompt lookup: draft what followed the last time these tokens occurred in the row's own text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hasten.engine.contracts import EMPTY_DRAFT, NO_NEEDS, Draft, Draws, Feedback, MethodContext, Needs, RowView
from hasten.errors import out_of_range
from hasten.types import MethodCard

_DOUBT = 2.0  # a copy after r agreeing tokens is thought right with chance r / (r + 2), until it was measured

card = MethodCard(
    slug="prompt-lookup",
    title="Prompt Lookup Decoding",
    paper="",
    date="2023-11",
    plugs_into="draft",
    exactness="exact",
    claim="About 2.4x on summarisation and context question answering (Mistral-7B, one A100).",
    no_help="Free text that repeats nothing: no match, so nothing is drafted and decoding is ordinary.",
    knobs={
        "max_ngram": "longest run of recent tokens that is looked up (1..16)",
        "min_ngram": "shortest run that may match (1..max_ngram)",
        "nodes": "tokens drafted after a match (1..64)",
        "pick": "which earlier occurrence to copy from: last or first",
    },
    needs=("causal",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of prompt lookup; the paper's are max_ngram 3, nodes 10, pick first."""

    max_ngram: int = 3
    min_ngram: int = 1
    nodes: int = 24
    pick: str = "last"

    def __post_init__(self) -> None:
        if not 1 <= self.max_ngram <= 16:
            raise out_of_range("prompt-lookup.max_ngram", self.max_ngram, "an integer in [1, 16]")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise out_of_range("prompt-lookup.min_ngram", self.min_ngram, f"an integer in [1, {self.max_ngram}]")
        if not 1 <= self.nodes <= 64:
            raise out_of_range("prompt-lookup.nodes", self.nodes, "an integer in [1, 64]")
        if self.pick not in ("last", "first"):
            raise out_of_range("prompt-lookup.pick", self.pick, "last or first")


class _Index:
    """First and last start of the continuation of every n-gram of one row, extended as the row grows."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        self._read = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index every n-gram that already has a continuation in `tokens`."""
        for end in range(max(1, self._read), len(tokens)):
            for n in range(self._config.min_ngram, min(self._config.max_ngram, end) + 1):
                gram = tuple(tokens[end - n : end])
                first, _ = self._places.get(gram, (end, end))
                self._places[gram] = (first, end)
        self._read = len(tokens)

    def continuation(self, tokens: Sequence[int]) -> int | None:
        """Where the text after the longest known run of last tokens continues, or None."""
        for n in range(min(self._config.max_ngram, len(tokens)), self._config.min_ngram - 1, -1):
            place = self._places.get(tuple(tokens[len(tokens) - n :]))
            if place is not None:
                return place[1] if self._config.pick == "last" else place[0]
        return None


def _agreement(tokens: Sequence[int], start: int) -> int:
    """How many tokens before `start` agree with the last tokens, at most 32: the longer, the surer the copy."""
    run, last = 0, len(tokens) - 1
    while run < min(start, 32) and tokens[start - 1 - run] == tokens[last - run]:
        run += 1
    return run


class PromptLookup:
    """Chains copied from the row's own prompt and output; needs nothing from the model, so it costs almost nothing."""

    name = "prompt-lookup"
    needs: Needs = NO_NEEDS
    scope: Literal["row", "shared"] = "row"
    draws: Draws = "point"

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config
        self._rows: dict[int, _Index] = {}

    def max_nodes(self, budget: int) -> int:
        """The configured chain length, or the budget if that is less."""
        return min(self.config.nodes, budget)

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """Read the prompt, once: a draft then reads the few tokens since the one before."""
        self._rows[row] = index = _Index(self.config)
        index.extend(prompt)

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One chain per row, empty where nothing matches."""
        drafts = []
        for row, budget in zip(rows, budgets, strict=True):
            index = self._rows[row.id]
            index.extend(row.tokens)
            start = index.continuation(row.tokens)
            chain = () if start is None else tuple(row.tokens[start : start + self.max_nodes(budget)])
            if start is None or not chain:
                drafts.append(EMPTY_DRAFT)
                continue
            run = _agreement(row.tokens, start)
            scores = tuple((run + i) / (run + i + _DOUBT) for i in range(len(chain)))
            drafts.append(Draft(chain, tuple(range(-1, len(chain) - 1)), scores=scores))
        return drafts

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Nothing to learn: committed tokens are read at the next draft."""

    def close(self, row: int) -> None:
        """Forget the row."""
        self._rows.pop(row, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is shared between rows."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


method = PromptLookup
