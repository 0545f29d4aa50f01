"""Unions: merging against a trie written out, exactness with any mix of drafters, and each member hears its own needs."""

from __future__ import annotations

import dataclasses
import random

import pytest
import tiny
import torch
from drafters import Clock, Oracle, RandomTree, Sampled, Stub
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten.union as unions
from hasten.budget import paths
from hasten.draft.prompt_lookup import Config as LookupConfig
from hasten.draft.prompt_lookup import PromptLookup
from hasten.draft.token_recycling import Config, TokenRecycling
from hasten.engine.contracts import Draft, MethodContext, Needs
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError
from hasten.types import Request, SamplingParams
from hasten.union import Union, merge


@st.composite
def drafts(draw) -> tuple[Draft, list[float]]:
    n = draw(st.integers(0, 8))
    draft = Draft(
        tuple(draw(st.integers(0, 2)) for _ in range(n)),
        tuple(draw(st.integers(-1, i - 1)) for i in range(n)),
    )
    return draft, [draw(st.floats(0.01, 1)) for _ in range(n)]


@settings(max_examples=150, deadline=None)
@given(many=st.lists(drafts(), min_size=1, max_size=3), budget=st.integers(0, 12))
def test_merging_is_a_trie_of_paths_cut_to_the_likeliest(many, budget):
    odds: dict[tuple[int, ...], float] = {}
    for draft, chances in many:
        names: list[tuple[int, ...]] = []
        for token, parent, one in zip(draft.tokens, draft.parents, chances, strict=True):
            names.append((*(names[parent] if parent >= 0 else ()), token))
            none = 1 - sum(other for other, beside in zip(chances, draft.parents, strict=True) if beside == parent)
            odds[names[-1]] = max(odds.get(names[-1], 0.0), one / max(none, 0.01))
    reach = {}
    for path in sorted(odds, key=len):
        beside = sum(other for one, other in odds.items() if one[:-1] == path[:-1])
        reach[path] = odds[path] / (1 + beside) * reach.get(path[:-1], 1.0)
    want = sorted(reach.values(), reverse=True)[:budget]
    merged = merge(many, budget)
    got: list[tuple[int, ...]] = []
    for i, (token, parent) in enumerate(zip(merged.tokens, merged.parents, strict=True)):
        assert parent < i
        got.append((*(got[parent] if parent >= 0 else ()), token))
    assert len(set(got)) == len(got)
    assert [reach[path] for path in got] == pytest.approx(want)
    assert merged.scores is None or paths(merged, merged.scores) == pytest.approx(want)


def test_drafters_that_contradict_each_other_are_weighed_as_independent_witnesses():
    first, second = {4: 0.6, 7: 0.3}, {5: 0.2, 7: 0.5}
    alone = merge([(Draft(tuple(first), (-1, -1)), tuple(first.values()))], 8)
    assert dict(zip(alone.tokens, alone.scores, strict=True)) == pytest.approx(first)
    both = merge([(Draft(tuple(one), (-1, -1)), tuple(one.values())) for one in (first, {5: 0.2, 6: 0.5})], 8)
    # each says what the token is, or that it is none of its own; only what they can both be right in counts
    joint = {4: 0.6 * 0.3, 7: 0.3 * 0.3, 5: 0.1 * 0.2, 6: 0.1 * 0.5}
    total = sum(joint.values()) + 0.1 * 0.3
    assert dict(zip(both.tokens, both.scores, strict=True)) == pytest.approx({t: one / total for t, one in joint.items()})
    agreed = merge([(Draft(tuple(one), (-1, -1)), tuple(one.values())) for one in (first, second)], 8)
    odds = {4: 0.6 / 0.1, 7: max(0.3 / 0.1, 0.5 / 0.3), 5: 0.2 / 0.3}  # of two that agree, the surer one is believed
    total = 1 + sum(odds.values())
    assert dict(zip(agreed.tokens, agreed.scores, strict=True)) == pytest.approx({t: o / total for t, o in odds.items()})


def members(engine) -> list:
    context = MethodContext("tiny", engine.backbone)
    q = Sampled(lambda text: torch.ones(tiny.VOCAB) / tiny.VOCAB, "iid", 2, 2, 0)
    return [
        PromptLookup(LookupConfig(), context),
        TokenRecycling(Config(nodes=6, learn_prompt=True), context),
        RandomTree(tiny.VOCAB),
        q,
        Stub(),
    ]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("measured", [False, True], ids=["whole", "measured"])
@pytest.mark.parametrize("batch", [1, 4])
def test_text_is_that_of_plain_decoding(sampling, measured, batch):
    engine = tiny.engine(rows=batch)
    r = random.Random(2)
    asked = [
        Request(
            tuple(r.randrange(4) for _ in range(r.randint(1, 30))),
            SamplingParams(max_tokens=24, seed=i, ignore_eos=True, **sampling),
        )
        for i in range(12)
    ]
    plain = [outs[0].tokens for outs in engine.run([(one, PLAIN) for one in asked])]
    union = Union(members(engine))
    parts = Parts(union, budget=12, measured=measured)
    assert [outs[0].tokens for outs in engine.run([(one, parts) for one in asked])] == plain
    assert union.members[4].opened == 12
    assert not union.members[4].live


class Listener(Stub):
    """Hears what it asked for, and nothing else."""

    def __init__(self, needs: Needs) -> None:
        super().__init__()
        self.needs = needs


def test_members_hear_what_they_asked_for():
    engine = tiny.engine()
    shy = Listener(Needs())
    curious = Listener(Needs(topk=2, hidden=(1,), feedback="all", prompt=True, prompt_logits=True))
    reader = Listener(Needs(final_hidden=True, topk=1, prompt=True))
    union = Union([shy, curious, reader, RandomTree(tiny.VOCAB)])
    request = Request((5, 9, 13, 2), SamplingParams(max_tokens=20, ignore_eos=True))
    engine.run([(request, Parts(union, budget=6))])
    assert all(report.nodes for report in shy.heard)
    assert all(report.topk is None and not report.hidden and report.final is None for report in shy.heard)
    assert all(len(report.tokens) == 1 + len(report.path) for report in shy.heard)
    assert any(not report.nodes for report in curious.heard)
    for report in reader.heard:
        assert report.final is not None
        assert (report.topk is None) == (not report.nodes)
    assert any(not report.nodes for report in reader.heard)
    assert any(len(report.tokens) > 1 + len(report.path) for report in curious.heard)
    for report in curious.heard:
        assert report.topk.shape == report.topk_logits.shape == (len(report.tokens), 2)
        assert set(report.hidden) == {1}
        assert len(report.hidden[1]) == len(report.tokens)


def test_the_better_drafter_gets_the_nodes():
    engine = tiny.engine()
    request = Request((5, 9, 13), SamplingParams(max_tokens=120, ignore_eos=True))
    plain = engine.run([(request, PLAIN)])[0][0]
    oracle = Oracle({(): [*request.prompt, *plain.tokens]}, tiny.VOCAB)
    out = engine.run([(request, Parts(Union([RandomTree(tiny.VOCAB), oracle]), budget=4))])[0][0]
    assert out.tokens == plain.tokens
    assert out.usage.tokens_per_forward > 3.5


def test_state_is_kept_by_member_and_one_drafter_is_no_union():
    engine = tiny.engine()
    context = MethodContext("tiny", engine.backbone)
    first, second = (TokenRecycling(Config(), context) for _ in range(2))
    request = Request((5, 9, 13), SamplingParams(max_tokens=20, ignore_eos=True))
    union = Union([first, PromptLookup(LookupConfig(), context)])
    engine.run([(request, Parts(union, budget=6))])
    Union([PromptLookup(LookupConfig(), context), second]).load_state_dict(union.state_dict())
    assert (second._shared[0] == first._shared[0]).all()
    assert (second._shared[0] >= 0).any()
    with pytest.raises(ConfigError, match="at least two"):
        unions.Union([first])


class Costly(Oracle):
    """An oracle that takes its time."""

    def __init__(self, clock, seconds: float, texts, skill: float) -> None:
        super().__init__(texts, tiny.VOCAB, skill)
        self.clock, self.seconds, self.asked = clock, seconds, 0

    def propose(self, rows, budgets):
        self.clock.time += self.seconds
        self.asked += 1
        return super().propose(rows, budgets)


@pytest.mark.parametrize(
    ("seconds", "skill", "other", "low", "high"),
    [
        (0.5, 1.0, 0.0, 40, 10**6),  # dear but right: asked before nearly every one of the 45 passes
        (0.5, 0.0, 0.0, 1, 40),  # dear and wrong: looked at now and then
        (0.5, 1.0, 1.0, 1, 20),  # dear, right, and needless beside one that costs nothing
        (0.001, 0.0, 0.0, 300, 10**6),  # costs nothing: always asked
    ],
)
def test_a_member_is_asked_when_it_is_worth_its_time(monkeypatch, seconds, skill, other, low, high):
    engine = tiny.engine(dataclasses.replace(tiny.PLAIN, max_len=1024))
    request = Request((5, 9, 13), SamplingParams(max_tokens=400, ignore_eos=True))
    plain = engine.run([(request, PLAIN)])[0][0]
    clock = Clock(monkeypatch, engine, lambda n: 1.0 + 0.02 * n)
    monkeypatch.setattr(unions.time, "perf_counter", lambda: clock.time)
    texts = {(): [*request.prompt, *plain.tokens]}
    costly = Costly(clock, seconds, texts, skill)
    union = Union([Oracle(texts, tiny.VOCAB, other), costly], engine.pass_cost)
    out = engine.run([(request, Parts(union, budget=8, measured=True))])[0][0]
    assert out.tokens == plain.tokens
    assert low <= costly.asked <= high
    assert clock.time <= 400 * 1.02 * 1.06  # never much slower than plain decoding
