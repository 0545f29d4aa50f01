"""Suite `spec`: six task groups for left-to-right drafting, each answer of a fixed length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.bench.cases import Case, Suite, chat_ids
from hasten.bench.suites import draws

if TYPE_CHECKING:
    from hasten.llm import LLM

suite = Suite(
    name="spec",
    summary="six task groups (chat, code, edit, summary, context, arithmetic) for left-to-right drafting",
    quality_is="texts equal to the first arm's, percent",
    options={"per_group": 3, "tokens": 64, "groups": ""},
    kinds=("causal",),
    fixed=True,
    methods={"causal": "plain,prompt-lookup,token-recycling,auto"},
)


def cases(llm: LLM, options: Mapping[str, Any], seeds: Sequence[int]) -> list[Case]:
    """`per_group` prompts of each group for each seed, no prompt twice."""
    chosen = tuple(filter(None, str(options["groups"]).split(",")))
    out = []
    for seed in seeds:
        drawn = draws(options["per_group"], seed, chosen) if chosen else draws(options["per_group"], seed)
        out += [
            Case(seed, group, chat_ids(llm, text), options["tokens"], text)
            for group, texts in drawn.items()
            for text in texts
        ]
    return out
