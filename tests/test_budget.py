"""The measured budget: what passes cost and drafts are worth, against a written-out optimum and simulated machines."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import groupby, pairwise

import pytest
import tiny
from drafters import Clock, Oracle, RandomTree, Stub
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.budget import GRID, Acceptance, Budget, deepest_first, paths, select
from hasten.engine.contracts import Draft
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError
from hasten.pass_cost import PassCost
from hasten.types import Request, SamplingParams


def taught(cost: Callable[[int], float], sizes: tuple[int, ...] = GRID, rows: int = 1) -> PassCost:
    passes = PassCost()
    for size in sizes:
        for _ in range(2):
            passes.record(rows, rows + size, cost(rows + size))
    return passes


def test_pass_cost_takes_the_median_of_recent_times_and_interpolates():
    passes = PassCost()
    assert passes(1, 1) == 0.0
    passes.record(1, 1, 9.0)
    assert passes(1, 1) == pytest.approx(7.2)  # the first one may be set-up
    for seconds in (2.0, 1.0, 3.0):
        passes.record(1, 1, seconds)
    assert passes(1, 1) == passes.typical(1) == 2.0
    assert 2.0 < passes(1, 9) < 2.4  # not tried yet: thought cheap, so that it is tried
    for seconds in (10.0, 6.0, 40.0, 8.0):  # the first one may be set-up
        passes.record(1, 9, seconds)
    assert passes(1, 9) == 8.0
    assert passes(1, 5) == pytest.approx(5.0)
    assert passes(1, 17) == pytest.approx(8.0 + 8 * 0.75)  # beyond what is known it goes on as it went so far
    assert passes(2, 2) == 0.0  # two rows are another kind of pass
    for _ in range(20):
        passes.record(1, 1, 1.0)
    assert passes(1, 1) == 1.0  # old times go


@given(st.lists(st.floats(0.5, 3.0), min_size=12, max_size=60), st.integers(0, 1000))
def test_a_slow_moment_of_the_machine_tells_sizes_nothing(paces, seed):
    """Passes of 4 tokens take twice a plain one, at whatever speed the machine runs when they are seen."""
    rng, passes = random.Random(seed), PassCost()
    for pace in paces:
        for _ in range(7):  # as many as are remembered
            passes.record(1, 1, pace)
        if rng.random() < 0.5:
            passes.record(1, 4, 2 * pace)
            passes.record(1, 4, 2 * pace)
    if 4 in passes.table():
        assert passes(1, 4) == pytest.approx(2 * paces[-1])


def test_sizes_seen_before_any_plain_pass_are_restated_in_its_terms():
    passes = PassCost()
    for _ in range(2):
        passes.record(1, 3, 6.0)
    assert passes(1, 3) == 6.0
    for _ in range(2):
        passes.record(1, 1, 4.0)
    assert passes(1, 3) == pytest.approx(6.0 * 4.0 / 3.2)  # the first plain pass may be set-up
    for _ in range(7):
        passes.record(1, 3, 6.0)
    assert passes(1, 3) == pytest.approx(6.0)


def test_what_was_foretold_comes_back_when_a_size_is_forgotten():
    passes = PassCost()
    passes.expect(1, {1: 1.0, 5: 3.0})
    for _ in range(3):
        passes.record(1, 5, 100.0)
    assert passes(1, 5) == 100.0
    for _ in range(400):
        passes.record(1, 1, 2.0)
    assert passes(1, 5) == pytest.approx(6.0)
    with pytest.raises(ConfigError, match="times"):
        PassCost().expect(1, {4: 1.0})


def test_rows_learn_from_one_row_how_passes_grow():
    passes = PassCost()
    passes.expect(1, {n: 1.0 + 0.25 * (n - 1) for n in (1, 2, 4, 8, 16, 32)})
    for _ in range(2):
        passes.record(8, 8, 4.0)
    assert passes(8, 16) == pytest.approx(4.0 * 4.75 / 2.75)  # not tried, but not thought cheap
    assert passes(8, 12) == pytest.approx(4.0 * 3.75 / 2.75)
    assert passes(8, 33) == pytest.approx(4.0 + 25 * 0.04)  # beyond what one row knows: tried once
    for _ in range(2):
        passes.record(8, 16, 5.0)
    assert passes(8, 16) == 5.0
    assert passes(8, 32) == pytest.approx(5.0 * 8.75 / 4.75)
    assert passes(2, 4) == 0.0


def test_a_size_that_looked_bad_once_is_tried_again_later():
    passes = PassCost()
    for seconds in (1.0, 1.0):
        passes.record(1, 1, seconds)
        passes.record(1, 5, 100.0)
    assert passes(1, 5) == 100.0
    for _ in range(400):
        passes.record(1, 1, 1.0)
    assert passes(1, 5) < 2.0


@st.composite
def trees(draw, most: int = 12) -> Draft:
    n = draw(st.integers(1, most))
    parents = tuple(draw(st.integers(-1, i - 1)) for i in range(n))
    scores = tuple(draw(st.floats(0, 1)) for _ in range(n))
    return Draft(tuple(range(n)), parents, scores=scores)


@settings(max_examples=80, deadline=None)
@given(draft=trees(), steep=st.floats(0.0, 0.5))
def test_the_kept_nodes_maximise_tokens_per_second(draft, steep):
    """Against every subset size in order of the chance of a path; ties aside nothing else can be better."""
    budget = Budget()
    budget.cost = taught(lambda n: 1.0 + steep * (n - 1))
    drafter = Stub()
    [kept] = budget.keep(1, 0, [(7, drafter, draft)])
    chances = sorted(paths(draft, budget.book(drafter).acceptance.chances(7, draft)), reverse=True)
    likely = [chance for chance in chances if chance >= 0.02]
    best = max((1 + sum(likely[:k])) / (1.0 + steep * k) for k in GRID if k <= len(likely))
    reached = (1 + sum(chances[: len(kept)])) / (1.0 + steep * len(kept))
    assert reached == pytest.approx(best if best > 1.03 else 1.0)
    for i, parent in enumerate(kept.parents):
        assert -1 <= parent < i


@settings(max_examples=80, deadline=None)
@given(draft=trees(), data=st.data())
def test_selecting_nodes_keeps_every_path(draft, data):
    def texts(d: Draft) -> list[tuple[int, ...]]:
        out: list[tuple[int, ...]] = []
        for token, parent in zip(d.tokens, d.parents, strict=True):
            out.append((*(out[parent] if parent >= 0 else ()), token))
        return out

    count = data.draw(st.integers(0, len(draft)))
    best = sorted(range(len(draft)), key=lambda i: (-paths(draft, draft.scores)[i], i))[:count]
    order = deepest_first(draft, best)
    assert sorted(order) == sorted(best)
    part = select(draft, order)
    whole = texts(draft)
    assert texts(part) == [whole[i] for i in order]
    assert list(part.scores) == [draft.scores[i] for i in order]


def test_acceptance_is_what_the_text_says_of_every_node():
    """Against a count over the finished text, for drafts at every position, verified or not."""
    r = random.Random(3)
    text = [r.randrange(3) for _ in range(300)]
    acceptance = Acceptance()
    tries: dict[int, int] = {}
    hits: dict[int, int] = {}
    for length in range(1, len(text)):
        acceptance.judge(1, text[:length])
        n = r.randint(1, 6)
        draft = Draft(
            tuple(r.randrange(3) for _ in range(n)),
            tuple(r.randint(-1, i - 1) for i in range(n)),
            scores=tuple(r.choice((0.1, 0.6)) for _ in range(n)),
        )
        acceptance.watch(1, length, draft)
        right: set[int] = {-1}
        depth = {-1: 0}
        for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            depth[i] = depth[parent] + 1
            at = length + depth[i] - 1
            if parent not in right or at >= len(text):
                continue
            earlier = any(draft.parents[j] == parent and draft.tokens[j] == token for j in range(i))
            key = int(draft.scores[i] * 20)
            tries[key] = tries.get(key, 0) + 1
            if text[at] == token and not earlier:
                hits[key] = hits.get(key, 0) + 1
                right.add(i)
    acceptance.judge(1, text)
    for key, count in tries.items():
        rate = acceptance._rates[key]
        assert 0 < rate.hits / rate.tries < 1
        assert rate.hits / rate.tries == pytest.approx(hits[key] / count, abs=0.2)  # it forgets: about 50 count
        assert rate.tries == pytest.approx(min(count, 50), rel=0.2)


def test_chances_follow_what_was_seen_and_rows_differ():
    acceptance = Acceptance()
    draft = Draft((5,), (-1,), scores=(0.5,))
    assert acceptance.chances(1, draft) == [0.5]
    for length in range(1, 60):
        for row, following in ((1, 5), (2, 6)):
            acceptance.watch(row, length, draft)
            acceptance.judge(row, [0] * length + [following])
    good, bad, new = (acceptance.chances(row, draft)[0] for row in (1, 2, 3))
    assert good > 0.9
    assert bad < 0.1
    assert 0.3 < new < 0.7
    acceptance.forget(1)
    assert acceptance.chances(1, draft)[0] == new


class Slow(Stub):
    """A drafter that is not asked when it does not pay."""

    draws = "swor"


def test_a_costly_drafter_is_left_alone_and_looked_at_again_ever_more_rarely():
    budget, drafter = Budget(), Slow()
    budget.cost = taught(lambda n: 1.0)
    book = budget.book(drafter)
    book.cost = taught(lambda n: 0.5 * n)
    asked = []
    for step in range(400):
        [nodes] = budget.ask(drafter, [8])
        if nodes:
            asked.append(step)
            length = 2 * step + 1
            book.acceptance.watch(1, length, Draft(tuple([1] * nodes), tuple(range(-1, nodes - 1))))
            book.acceptance.judge(1, [0] * (length + 1))
    gaps = [b - a for a, b in pairwise(asked)]
    assert 3 <= len(asked) < 30
    assert gaps[-1] > 60
    book.cost = taught(lambda n: 0.01)  # it got cheap, and right
    for length in range(1, 80):
        book.acceptance.watch(1, length, Draft((1, 1, 1, 1), (-1, 0, 1, 2)))
        book.acceptance.judge(1, [1] * (length + 4))
    assert max(budget.ask(drafter, [8])[0] for _ in range(8)) >= 4


def test_as_many_nodes_are_asked_of_a_cheap_drafter_as_were_lately_verified():
    budget, drafter = Budget(), Stub()
    budget.cost = taught(lambda n: 1.0 + 0.01 * (n - 1))
    sizes = []

    def rounds(count, right):
        for _ in range(count):
            [nodes] = budget.ask(drafter, [64])
            sizes.append(nodes)
            chain = Draft(tuple(range(nodes)), tuple(range(-1, nodes - 1)), scores=(right,) * nodes)
            budget.keep(1, 0, [(1, drafter, chain)])

    rounds(3, 0.99)  # whole drafts pay: twice as many
    assert sizes[0] < sizes[1] < sizes[2] <= 64
    rounds(100, 0.1)  # hardly a node does: fewer, but never none
    assert sizes[-1] == 8
    assert sorted(sizes[3:], reverse=True) == sizes[3:]
    rounds(5, 0.99)
    assert sizes[-1] == 64


@pytest.mark.parametrize(("steep", "skill"), [(0.02, 1.0), (0.02, 0.0), (1.0, 1.0), (1.0, 0.0), (0.3, 0.6), (0.05, 0.3)])
def test_on_a_simulated_machine_it_is_never_slower_and_finds_what_pays(steep, skill):
    request = Request((5, 9, 13), SamplingParams(max_tokens=200, ignore_eos=True))
    speedups = []
    for seed in range(1 if skill in (0.0, 1.0) else 4):
        engine = tiny.engine()
        plain = engine.run([(request, PLAIN)])[0][0]
        oracle = Oracle({(): [*request.prompt, *plain.tokens]}, tiny.VOCAB, skill)
        oracle.random.seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch, engine, lambda n: 1.0 + steep * (n - 1))
            out = engine.run([(request, Parts(oracle, budget=16, measured=True))])[0][0]
        assert out.tokens == plain.tokens
        speedups.append(199 / (clock.time - (1.0 + steep * 2)))  # without the prompt
    assert min(speedups) >= 0.97
    if skill == 0.0 or steep == 1.0:
        return
    assert sum(speedups) / len(speedups) >= (5 if (steep, skill) == (0.02, 1.0) else 1.1)


def test_batches_share_one_budget_and_rows_without_drafts_are_served(monkeypatch):
    engine = tiny.engine()
    asked = [Request((i + 1, 9, 13), SamplingParams(max_tokens=40 + 10 * i, ignore_eos=True)) for i in range(4)]
    plain = [outs[0].tokens for outs in engine.run([(one, PLAIN) for one in asked])]
    clock = Clock(monkeypatch, engine, lambda n: 1.0 + 0.05 * n)
    good = Oracle({one.prompt: [*one.prompt, *text] for one, text in zip(asked, plain, strict=True)}, tiny.VOCAB)
    drafters = [good, None, RandomTree(tiny.VOCAB), good]
    parts = [Parts(d, budget=12, measured=True) if d else PLAIN for d in drafters]
    texts = [outs[0].tokens for outs in engine.run(list(zip(asked, parts, strict=True)))]
    assert texts == plain
    assert max(clock.passes) > 8


def test_draft_seconds_are_reported():
    engine = tiny.engine()
    request = Request((5, 9, 13), SamplingParams(max_tokens=30, ignore_eos=True))
    out = engine.run([(request, Parts(RandomTree(tiny.VOCAB), budget=4, measured=True))])[0][0]
    assert 0 < out.usage.draft_s < out.usage.decode_s
    assert engine.run([(request, PLAIN)])[0][0].usage.draft_s < out.usage.draft_s


def test_placeholders_are_asked_for_while_they_pay_and_looked_at_ever_more_rarely_after():
    budget = Budget()
    drafter = Stub()
    assert not budget.looks(drafter, 1, 3)  # plain passes are measured first
    budget.cost.record(1, 1, 0.1)
    budget.cost.record(1, 1, 0.1)
    for tokens in range(4, 13):
        budget.cost.record(1, tokens, 0.15)
        budget.cost.record(1, tokens, 0.15)
    assert budget.looks(drafter, 1, 3)  # nothing is known of it: worth a try at half a pass
    acceptance = budget.book(drafter).acceptance
    for _ in range(60):
        acceptance.watch(1, 1, Draft((5, 6, 7), (-1, 0, 1)))
        acceptance.judge(1, (4, 9, 9, 9))
        acceptance.forget(1)
    asked = [budget.looks(drafter, 1, 3) for _ in range(120)]
    when = [i for i, yes in enumerate(asked) if yes]
    assert when
    gaps = [b - a for a, b in pairwise(when)]
    assert gaps == sorted(gaps)
    assert when[0] == 7
    assert gaps[0] == 16


def test_a_drafter_of_a_row_alone_rests_where_it_does_not_pay_and_comes_back():
    budget, drafter = Budget(), Stub()

    def asked(taken: int, steep: float, drafted_s: float = 0.03) -> bool:
        """Two nodes are verified and `taken` of them right; whatever this pass took, passes of its size take `steep` more."""
        budget.cost = taught(lambda n: 1.0 + steep * (n - 1))
        yes = any(budget.ask(drafter, [2]))
        if yes:
            budget.settle([drafter], 1, 3 if steep else 1, 1 + taken, drafted_s, 17.0)
        return yes

    assert all(asked(0, 0.0, 0.001) for _ in range(40))  # drafting takes no time: nothing to save
    dear = [asked(0, 0.0) for _ in range(220)]
    assert dear[:18] == [True] * 17 + [False]  # it may lose half a pass
    rests = [len(list(same)) for yes, same in groupby(dear) if not yes]
    assert rests[:5] == [8, 16, 32, 32, 32]
    assert [len(list(same)) for yes, same in groupby(dear[17:]) if yes][:4] == [9] * 4  # it is looked at again and again
    while not asked(1, 0.1):  # a text that it knows: asked after at most one rest, and from then on always
        pass
    assert all(asked(1, 0.1) for _ in range(40))
    again = [asked(1, 0.5) for _ in range(90)]  # a token gained, and a token's time lost, besides the drafting
    assert [len(list(same)) for yes, same in groupby(again)][:2] == [67, 8]  # it has credit, and rests are short again


def test_drafters_of_several_rows_rest_where_their_passes_lose_time_and_come_back():
    budget, drafter, rows = Budget(), Stub(), 4
    budget.cost = taught(lambda n: 1.0 + 0.01 * (n - rows), rows=rows)
    budget.book(drafter).cost.record(rows, 3 * rows, 0.001)

    def asked(seconds: float, tokens: float = 1.0, drafted_s: float = 0.03) -> bool:
        yes = any(budget.ask(drafter, [2] * rows))
        if yes:
            budget.settle([drafter], rows, 3 * rows, round(tokens * rows), drafted_s, seconds)
        return yes

    assert all(asked(1.0, drafted_s=0.001) for _ in range(60))  # nothing was verified, and drafting takes no time
    dear = [asked(1.22) for _ in range(300)]  # a quarter of a pass is lost each time, half a pass is the credit
    assert dear[:3] == [True, True, True]
    runs = [(yes, len(list(same))) for yes, same in groupby(dear)]
    assert [length for yes, length in runs if not yes][:5] == [8, 16, 32, 64, 64]
    assert {length for yes, length in runs[1:-1] if yes} == {2}  # it is looked at again and again, at a quarter of a pass
    while not asked(1.1, 2.0):  # text that it knows: asked after at most one rest, and from then on always
        pass
    assert all(asked(1.1, 2.0) for _ in range(40))
    again = [asked(1.52) for _ in range(30)]
    assert [len(list(same)) for yes, same in groupby(again)][:2] == [4, 8]  # soon tired however long it did well


def test_a_forecast_that_is_wrong_costs_several_rows_little():
    budget, drafter = Budget(), Stub()
    budget.cost = taught(lambda n: 1.0, rows=2)  # verifying is thought free, and takes twice as long
    spent = committed = 0.0
    for _ in range(2000):
        drafted = any(budget.ask(drafter, [4, 4]))
        seconds = 2.0 if drafted else 1.0
        if drafted:
            budget.settle([drafter], 2, 10, 2, 0.01, seconds)
        spent, committed = spent + seconds, committed + 1
    assert committed / spent > 0.97


def test_slow_passes_are_held_against_several_rows_and_not_against_a_row_alone():
    for rows in (1, 2):
        budget, drafter = Budget(), Stub()
        budget.cost = taught(lambda n, rows=rows: 1.0, rows=rows)
        for _ in range(20):
            budget.settle([drafter], rows, 3 * rows, 2 * rows, 0.01, 9.0)
        assert any(budget.ask(drafter, [4] * rows)) == (rows == 1)


def test_nodes_are_kept_for_a_gain_and_not_for_less_than_is_measured():
    budget, drafter = Budget(), Stub()
    draft = Draft((1,), (-1,), scores=(0.5,))
    for steep, kept in ((0.44, 1), (0.47, 0)):  # 1.5 tokens in 1.44 or 1.47 of a plain pass: 4 and 2 per cent more
        budget.cost = taught(lambda n, steep=steep: 1.0 + steep * (n - 1))
        assert len(budget.keep(1, 0, [(0, drafter, draft)])[0]) == kept
    budget.cost = taught(lambda n: 1.0)
    unlikely = Draft((1, 2), (-1, 0), scores=(0.5, 0.03))
    assert budget.keep(1, 0, [(0, drafter, unlikely)])[0].tokens == (1,)


def test_only_passes_whose_rows_were_all_weighed_are_settled(monkeypatch):
    engine = tiny.engine()
    settled = []
    monkeypatch.setattr(Budget, "settle", lambda self, *given: settled.append([list(given[0]), *given[1:]]))
    request = Request((5, 9, 13), SamplingParams(max_tokens=12, ignore_eos=True))
    both = [Parts(RandomTree(tiny.VOCAB), budget=4, measured=measured) for measured in (True, False)]
    engine.run([(request, both[0])])
    asked = [rest for drafters, *rest in settled if drafters]
    assert asked
    assert all(rows == 1 and tokens >= 1 and drafted_s > 0 and seconds > 0 for rows, _, tokens, drafted_s, seconds in asked)
    settled.clear()
    engine.run([(request, both[1])])  # drafts all the same, whatever it costs
    assert not any(drafters for drafters, *_ in settled)
