"""RSD keeps the target's distribution (a biased verifier is caught), and accepts more than drawing with replacement."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
import toys

from hasten.draft.rsd import Config, Rsd, conditioned, gumbel
from hasten.engine.contracts import Draft, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.engine.sampling import Sampler
from hasten.engine.verify import verify
from hasten.errors import ConfigError
from hasten.models.assistant import Assistant
from hasten.types import Request, SamplingParams

VOCAB = 4
RUNS = 6000
SHAPES = {
    "c": {"tree": "c", "branching": "3.2"},
    "s": {"tree": "s", "width": 3, "length": 2},
    "chain-c": {"tree": "c", "branching": "1.1"},
    "chain-s": {"tree": "s", "width": 1, "length": 2},
}


def toy(logits, **knobs) -> Rsd:
    return Rsd(Config(**knobs), toys.context(VOCAB), toys.ToyAssistant(logits))


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_law_of_two_tokens_is_the_targets(shape, temperature):
    target, draft = toys.law(VOCAB, 1, 1.2), toys.law(VOCAB, 2, 1.2)
    statistic, bound = toys.sample(lambda: toy(draft, **SHAPES[shape]), target, VOCAB, RUNS, temperature)
    assert statistic < bound


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["c", "s"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_law_of_two_tokens_over_fifty_thousand_answers(shape, seed):
    target, draft = toys.law(VOCAB, seed, 1.2), toys.law(VOCAB, seed + 10, 1.2)
    statistic, bound = toys.sample(lambda: toy(draft, **SHAPES[shape]), target, VOCAB, 50_000)
    assert statistic < bound


@pytest.mark.parametrize("shape", ["chain-c", "chain-s"])
def test_one_child_per_node_is_speculative_sampling(shape):
    """As many nodes as levels, and the first is accepted with probability sum min(p, q), as a chain's is."""
    target, draft = toys.law(VOCAB, 1, 1.2), toys.law(VOCAB, 2, 1.2)
    text, runs, accepted = (1, 0), 4000, 0
    drafter = toy(draft, **SHAPES[shape])
    for seed in range(runs):
        [made] = drafter.propose([RowView(1, list(text), 9, 1.0, seed)], [64])
        assert made.parents == (-1, 0)
        paths = [text, (*text, made.tokens[0]), (*text, *made.tokens)]
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), seed, text, VOCAB)
        accepted += bool(verify("rejection", torch.stack([target(p) for p in paths]), made, sampler, 2, "swor").path)
    chance = float(torch.minimum(target(text).softmax(-1), draft(text).softmax(-1)).sum())
    assert abs(accepted / runs - chance) < 3.3 * (chance * (1 - chance) / runs) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [6])
def test_more_tokens_per_pass_than_independent_draws_with_as_many_nodes(nodes):
    """A draft model close to its target, a hundred prompts sampled at temperature 1 (2402.14160: at equal budget)."""
    from types import SimpleNamespace

    from hasten.bench.reproduce.rsd import makers

    engine = tiny.engine(rows=20)
    near = tiny.model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.12 * p.std())
    llm = SimpleNamespace(name="tiny", model=engine.backbone, tokenizer=None)
    made = makers(llm, Assistant(near, tiny.VOCAB), nodes)
    asked = [
        Request(
            tuple(range(i % 7 + 1, i % 7 + 4 + i % 5)),
            SamplingParams(max_tokens=21, ignore_eos=True, temperature=1.0, seed=i),
        )
        for i in range(100)
    ]

    def per_pass(name: str) -> float:
        assert made[name]().drafter.max_nodes(made[name]().budget) == nodes
        usages = [outs[0].usage for outs in engine.run([(one, made[name]()) for one in asked])]
        return sum(usage.completion_tokens - 1 for usage in usages) / sum(usage.forwards for usage in usages)

    iid, c, s = (per_pass(name) for name in ("i.i.d. tree", "rsd-c", "rsd-s"))
    assert 1.3 < iid < 3.0
    assert c >= iid
    assert s >= iid


@pytest.mark.parametrize("shape", ["c", "s"])
def test_a_draft_temperature_of_its_own_is_exact_too(shape):
    target, draft = toys.law(VOCAB, 1, 1.2), toys.law(VOCAB, 2, 1.2)
    statistic, bound = toys.sample(lambda: toy(draft, temperature=0.5, **SHAPES[shape]), target, VOCAB, RUNS)
    assert statistic < bound


def test_impossible_tokens_are_never_drafted_and_the_law_holds():
    target = toys.law(VOCAB, 1, 1.2)

    def cut(text):
        logits = toys.law(VOCAB, 2, 1.2)(text).clone()
        logits[logits.argsort()[:2]] = -torch.inf  # what top-p leaves of a distribution
        return logits

    for shape in ("c", "s"):
        statistic, bound = toys.sample(lambda shape=shape: toy(cut, **SHAPES[shape]), target, VOCAB, RUNS)
        assert statistic < bound


@pytest.mark.parametrize("error", ["order", "whole"])
def test_a_biased_verifier_is_caught(error):
    """Siblings judged in the order of their ids, or each by the whole of q, as if drawn with replacement."""
    target, draft = toys.law(VOCAB, 1, 1.2), toys.law(VOCAB, 2, 1.2)
    knobs = SHAPES["c"]

    def make() -> Rsd:
        drafter = toy(draft, **knobs)
        if error == "whole":
            drafter.draws = "iid"
        return drafter

    statistic, bound = toys.sample(make, target, VOCAB, RUNS, spoil=toys.by_token if error == "order" else None)
    assert statistic > 2 * bound


def test_equal_laws_accept_every_first_child_and_two_of_two_tokens_always_hit():
    same = toys.law(VOCAB, 5)
    for shape, depth in (("c", 2), ("s", 2)):
        drafter = toy(same, **SHAPES[shape])
        for seed in range(50):
            [draft] = drafter.propose([RowView(1, [1, 0], 9, 1.0, seed)], [64])
            paths = [(1, 0)]
            for token, parent in zip(draft.tokens, draft.parents, strict=True):
                paths.append((*paths[parent + 1], token))
            sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), seed, (1, 0), VOCAB)
            verdict = verify("rejection", torch.stack([same(p) for p in paths]), draft, sampler, 2, "swor")
            assert len(verdict.path) == depth
            assert all(draft.parents.index(draft.parents[node]) == node for node in verdict.path), "the first drawn child"
    r = random.Random(0)
    for _ in range(20):
        p, q = toys.random_law(2, r), toys.random_law(2, r)
        assert toys.acceptance(p, q, 2, replace=False) == pytest.approx(1.0)


def test_drawing_without_replacement_accepts_at_least_as_often():
    r = random.Random(4)
    gains = []
    for _ in range(1000):
        p, q = toys.random_law(3, r), toys.random_law(3, r)
        single, iid, swor = (toys.acceptance(p, q, k, replace) for k, replace in ((1, True), (2, True), (2, False)))
        assert single <= iid + 1e-9
        assert iid <= swor + 1e-9
        gains.append(swor - iid)
    assert sum(gains) / len(gains) > 0.005


def test_the_beam_keeps_its_order_and_its_largest_value():
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        phi = torch.randn(30, generator=generator).log_softmax(-1) - 3.0
        phi[torch.randperm(30, generator=generator)[:5]] = -torch.inf
        g = float(torch.randn((), generator=generator)) - 2.0
        values = conditioned(phi, gumbel(30, generator), g)
        assert float(values.max()) == pytest.approx(g)
        assert torch.isinf(values).sum() == 5
        assert not torch.isnan(values).any()
    for width in (1, 3, 4):
        drafter = toy(toys.law(VOCAB, 2), tree="s", width=width, length=3)
        for seed in range(40):
            [draft] = drafter.propose([RowView(1, [1, 0], 9, 1.0, seed)], [64])
            depth = [0] * len(draft)
            for i, parent in enumerate(draft.parents):
                depth[i] = 1 if parent < 0 else depth[parent] + 1
            assert [depth.count(level) for level in (1, 2, 3)] == [min(width, VOCAB), width, width]
            assert len({(p, t) for p, t in zip(draft.parents, draft.tokens, strict=True)}) == len(draft)


@pytest.mark.parametrize("shape", ["c", "s"])
def test_a_budget_cuts_the_shape_before_anything_is_drawn(shape):
    drafter = toy(toys.law(VOCAB, 2), **SHAPES[shape])
    whole = drafter.max_nodes(64)
    for budget in range(whole + 1):
        [draft] = drafter.propose([RowView(1, [1, 0], 9, 1.0, 3)], [budget])
        assert len(draft) == drafter.max_nodes(budget) <= budget
        assert bool(len(draft)) == bool(budget)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_text_is_that_of_plain_decoding(shape, batch):
    engine = tiny.engine(rows=batch)
    drafter = Rsd(Config(**SHAPES[shape]), context(engine), Assistant(tiny.model(seed=1), tiny.VOCAB))
    asked = [Request(tuple(range(i + 1, 3 * i + 4)), SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(8)]
    plain = [outs[0].tokens for outs in engine.run([(one, PLAIN) for one in asked])]
    for measured in (False, True):
        parts = Parts(drafter, measured=measured)
        assert [outs[0].tokens for outs in engine.run([(one, parts) for one in asked])] == plain


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
def test_a_draft_model_that_is_the_target_is_always_right(sampling):
    engine = tiny.engine()
    drafter = Rsd(Config(tree="s", width=2, length=3), context(engine), Assistant(engine.backbone, tiny.VOCAB))
    request = Request((5, 9, 13), SamplingParams(max_tokens=41, ignore_eos=True, seed=3, **sampling))
    out = engine.run([(request, Parts(drafter))])[0][0]
    assert out.usage.tokens_per_forward == 4.0
    again = engine.run([(request, Parts(drafter))])[0][0]
    assert again.tokens == out.tokens


def context(engine):
    from hasten.engine.contracts import MethodContext

    return MethodContext("tiny", engine.backbone)


def test_rows_do_not_change_one_another():
    engine = tiny.engine()
    drafter = Rsd(Config(), context(engine), Assistant(tiny.model(seed=1), tiny.VOCAB))
    asked = [
        Request(tuple(range(i + 1, 2 * i + 4)), SamplingParams(max_tokens=15, ignore_eos=True, temperature=0.9, seed=i))
        for i in range(6)
    ]
    together = [outs[0].tokens for outs in engine.run([(one, Parts(drafter)) for one in asked])]
    assert together == [engine.run([(one, Parts(drafter))])[0][0].tokens for one in asked]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tree": "x"}, "tree.*x"), ({"branching": ""}, "branching"), ({"branching": "2.0"}, "branching.*2.0"),
        ({"branching": "a"}, "branching.*a"), ({"width": 0}, "width.*0"), ({"length": 17}, "length.*17"),
        ({"temperature": 3.0}, "temperature.*3"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name_and_value(knobs, message):
    with pytest.raises(ConfigError, match=f"rsd.{message}"):
        Config(**knobs)


def test_without_q_rejection_is_refused_and_a_model_must_be_named():
    draft = Draft((1,), (-1,))
    sampler = Sampler(SamplingParams(temperature=1.0), 1, (1,), VOCAB)
    with pytest.raises(ConfigError, match="needs the distribution q"):
        verify("rejection", torch.zeros(2, VOCAB), draft, sampler, 1, "swor")
    with pytest.raises(ConfigError, match=r"rsd\.model is empty"):
        Rsd(Config(), context(tiny.engine()))
