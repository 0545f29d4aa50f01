"""Prompt lookup against a brute-force re-implementation, and its promise: the text of plain decoding, in fewer passes."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.draft.prompt_lookup import Config, PromptLookup
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError
from hasten.types import Request, SamplingParams


def brute_force(tokens: list[int], config: Config, budget: int) -> list[int]:
    """The definition: longest suffix n-gram that occurred earlier, copied from its last or first continuation."""
    for n in range(min(config.max_ngram, len(tokens)), config.min_ngram - 1, -1):
        places = [end for end in range(n, len(tokens)) if tokens[end - n : end] == tokens[len(tokens) - n :]]
        if places:
            start = places[-1] if config.pick == "last" else places[0]
            return tokens[start : start + min(config.nodes, budget)]
    return []


def drafter(config: Config) -> PromptLookup:
    return PromptLookup(config, SimpleNamespace())  # prompt lookup asks nothing of the context


@settings(deadline=None, max_examples=200)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    max_ngram=st.integers(1, 5),
    nodes=st.integers(1, 8),
    budget=st.integers(0, 10),
    pick=st.sampled_from(["last", "first"]),
    data=st.data(),
)
def test_the_growing_index_drafts_what_a_full_search_would(tokens, max_ngram, nodes, budget, pick, data):
    config = Config(max_ngram, data.draw(st.integers(1, max_ngram)), nodes, pick)
    lookup = drafter(config)
    lookup.open(7, tokens[:1])
    for end in sorted({data.draw(st.integers(1, len(tokens))), len(tokens)}):
        [draft] = lookup.propose([SimpleNamespace(id=7, tokens=tokens[:end])], [budget])
        assert list(draft.tokens) == brute_force(tokens[:end], config, budget)
        assert list(draft.parents) == list(range(-1, len(draft) - 1))


def test_rows_do_not_see_each_other():
    lookup = drafter(Config())
    for row in (1, 2):
        lookup.open(row, [])
    repeated, fresh = lookup.propose(
        [SimpleNamespace(id=1, tokens=[5, 6, 7, 5, 6]), SimpleNamespace(id=2, tokens=[5, 6])], [4, 4]
    )
    assert repeated.tokens[0] == 7
    assert not len(fresh)
    lookup.close(1)
    lookup.open(1, [])
    [reopened] = lookup.propose([SimpleNamespace(id=1, tokens=[5, 6])], [4])
    assert not len(reopened)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 4])
def test_text_is_that_of_plain_decoding_and_repetition_needs_fewer_passes(sampling, batch):
    r = random.Random(batch)
    prompts = [tuple([r.randrange(1, tiny.VOCAB) for _ in range(4)] * 8) for _ in range(12)]
    requests = [Request(p, SamplingParams(max_tokens=40, **sampling)) for p in prompts]
    outputs = {}
    for name, parts in (("plain", PLAIN), ("lookup", Parts(drafter(Config()), method=("prompt-lookup",)))):
        engine = tiny.engine(rows=batch)
        outputs[name] = [choice for choices in engine.run([(r, parts) for r in requests]) for choice in choices]
    assert [o.tokens for o in outputs["lookup"]] == [o.tokens for o in outputs["plain"]]
    forwards = {name: sum(o.usage.forwards for o in outs) for name, outs in outputs.items()}
    assert forwards["lookup"] <= forwards["plain"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_ngram", 0), ("max_ngram", 17), ("min_ngram", 0), ("min_ngram", 4), ("nodes", 0), ("nodes", 65), ("pick", "any")],
)
def test_a_bad_setting_is_refused_by_name_and_value(field, value):
    with pytest.raises(ConfigError, match=f"prompt-lookup.{field}.*{value}"):
        Config(**{field: value})
