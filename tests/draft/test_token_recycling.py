"""Token recycling: the published tree, the table's rules, exactness for any table, and gains that outlive a request."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten import registry
from hasten.draft.token_recycling import Config, TokenRecycling, paths
from hasten.engine.contracts import Feedback, MethodContext, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError
from hasten.types import Request, SamplingParams


def drafter(engine=None, **settings) -> TokenRecycling:
    engine = engine or tiny.engine()
    return TokenRecycling(Config(**settings), MethodContext("tiny", engine.backbone))


def requests(count: int, **sampling) -> list[Request]:
    r = random.Random(5)
    return [
        Request(
            tuple(r.randrange(tiny.VOCAB) for _ in range(r.randint(1, 30))),
            SamplingParams(max_tokens=24, seed=i, ignore_eos=i % 2 == 0, **sampling),
        )
        for i in range(count)
    ]


def texts(engine, batch, parts) -> list[tuple[int, ...]]:
    return [outs[0].tokens for outs in engine.run([(request, parts) for request in batch])]


def test_the_published_tree():
    tree = paths("2.2.2")
    assert len(tree) == 80
    assert [sum(len(path) == depth for path in tree) for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]
    assert all(path[:-1] in ((), *tree) for path in tree)
    assert len(set(tree)) == 80
    assert {(0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0), (4, 0, 0), (5, 0, 0), (3, 1), (7, 0)} <= set(tree)
    assert (6, 0, 0) not in tree


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 4, 12])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"nodes": 80, "tree": "2.2.2", "adapt": False, "fill": "zero"},
        {"table": "row", "learn_prompt": True},
        {"tree": "0/0.0/1"},
    ],
    ids=["default", "paper", "row", "small"],
)
def test_text_is_that_of_plain_decoding(sampling, batch, knobs):
    engine = tiny.engine(rows=batch)
    parts = Parts(drafter(engine, **knobs), budget=80)
    asked = requests(12, **sampling)
    plain = texts(engine, asked, PLAIN)
    for _ in range(2):  # the second time with all that was learnt
        assert texts(engine, asked, parts) == plain
    assert len(set(plain)) > 6


@pytest.mark.parametrize("seed", range(3))
def test_any_table_gives_the_same_text(seed):
    engine = tiny.engine()
    recycling = drafter(engine)
    torch.manual_seed(seed)
    ids = torch.randint(-1, tiny.VOCAB, (tiny.VOCAB, 8), dtype=torch.int32)
    recycling._shared = (ids, torch.rand(tiny.VOCAB, 8).half())
    asked = requests(6)
    assert texts(engine, asked, Parts(recycling)) == texts(engine, asked, PLAIN)


def test_the_table_holds_the_rankings_of_the_model():
    engine = tiny.engine()
    recycling = drafter(engine, learn_prompt=True)
    request = Request((9, 3, 44, 17, 60), SamplingParams(max_tokens=20, ignore_eos=True))
    output = engine.run([(request, Parts(recycling))])[0][0]
    full = [*request.prompt, *output.tokens]
    with torch.no_grad():
        dense = engine.backbone(torch.tensor([full]))[0]
    tip = len(full) - 2  # the last token whose ranking the model gave
    assert recycling._shared[0][full[tip]].tolist() == dense[tip].topk(8).indices.tolist()
    assert recycling._shared[0][full[tip], 0] == full[tip + 1]
    alone = [t for t in request.prompt if t not in output.tokens]
    for token in alone:  # read with the prompt; nodes may have written over it in another context since
        row = recycling._shared[0][token].tolist()
        assert len(set(row)) == 8
        assert min(row) >= 0
    without = drafter(engine, nodes=1)
    engine.run([(request, Parts(without))])
    assert (without._shared[0][request.prompt[0]] == -1).all()


def test_the_accepted_path_has_the_last_word():
    recycling = drafter()
    ranking = torch.arange(4)[:, None] * 10 + torch.arange(8)
    recycling.observe(
        [Feedback(1, (0, 1, 2, 3), (5, 7, 7, 7), path=(1,), next=3, topk=ranking, topk_logits=-ranking.float())]
    )
    assert recycling._shared[0][7].tolist() == ranking[2].tolist()  # node 1 is entry 2
    assert recycling._shared[0][5].tolist() == ranking[0].tolist()
    assert torch.allclose(recycling._shared[1][7].float(), (-torch.arange(8.0)).softmax(-1), atol=1e-3)
    flat = torch.zeros(1, 8)
    later = [Feedback(row, (0,), (5,), (), 1, topk=torch.full((1, 8), row), topk_logits=flat) for row in (9, 2)]
    recycling.observe(later)
    assert (recycling._shared[0][5] == 9).all()  # rows in ascending order, whatever the order of the reports


@settings(max_examples=60, deadline=None)
@given(data=st.data(), nodes=st.integers(1, 80), adapt=st.booleans(), fill=st.sampled_from(["skip", "zero"]))
def test_a_draft_is_the_lookup_written_out(data, nodes, adapt, fill):
    recycling = drafter(nodes=nodes, tree="2.2.2", adapt=adapt, fill=fill)
    known = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    r = random.Random(data.draw(st.integers(0, 99)))
    for token in range(tiny.VOCAB):
        if r.random() < known:
            recycling._shared[0][token] = torch.tensor(r.sample(range(tiny.VOCAB), 8))
    budget = data.draw(st.integers(0, 80))
    [draft] = recycling.propose([RowView(1, [4, 11], 99, 0.0, 0)], [budget])
    assert len(draft) <= min(nodes, budget)

    def walk(path):
        token = 11
        for rank in path:
            token = int(recycling._shared[0][token, rank])
            if token < 0:
                return None
        return token

    want = [walk(path) for path in recycling._order]
    assert list(draft.tokens) == [token for token in want if token is not None][: len(draft)]
    assert len(draft) == min(nodes, budget, sum(token is not None for token in want))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 40), known=st.sampled_from([0.0, 0.3, 1.0]))
def test_the_best_tree_holds_the_likeliest_paths(seed, budget, known):
    recycling = drafter(nodes=30, k=3)
    r = random.Random(seed)
    ids, chances = recycling._shared
    for token in range(tiny.VOCAB):
        if r.random() < known:
            ids[token] = torch.tensor(r.sample(range(tiny.VOCAB), 3))
            chances[token] = torch.tensor([r.random() for _ in range(3)]).softmax(-1).half()
    [draft] = recycling.propose([RowView(1, [4, 11], 99, 0.0, 0)], [budget])

    def walk(token, chance, path):
        """Every path worth drafting below `token`, written out."""
        for child, share in zip(ids[token].tolist(), chances[token].tolist(), strict=True):
            if child >= 0 and chance * share >= 0.01:
                yield chance * share, (*path, child)
                yield from walk(child, chance * share, (*path, child))

    want = sorted((chance for chance, _ in walk(11, 1.0, ())), reverse=True)[: min(30, budget)]
    drafted: list[tuple[float, tuple[int, ...]]] = []
    for token, parent, score in zip(draft.tokens, draft.parents, draft.scores or (), strict=True):
        above = (1.0, ()) if parent < 0 else drafted[parent]
        drafted.append((above[0] * score, (*above[1], token)))
    assert [chance for chance, _ in drafted] == pytest.approx(want)
    assert {path for _, path in drafted} <= {path for _, path in walk(11, 1.0, ())}


def test_a_chain_tree_is_a_chain_and_the_budget_caps_it():
    recycling = drafter(tree="0/0.0/0.0.0")
    recycling._shared[0][:] = torch.arange(8, dtype=torch.int32)
    [draft] = recycling.propose([RowView(1, [4], 99, 0.0, 0)], [80])
    assert draft.parents == (-1, 0, 1)
    [nothing] = recycling.propose([RowView(1, [4], 99, 0.0, 0)], [0])
    assert not len(nothing)


@pytest.fixture(scope="module")
def trained():
    return tiny.trained()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 4}], ids=["greedy", "sampled"])
def test_repetitive_text_needs_fewer_passes_and_what_was_learnt_stays(trained, sampling):
    engine, text = trained
    recycling = drafter(engine, nodes=12, learn_prompt=False)
    loop = Request(tuple(text(20)), SamplingParams(max_tokens=200, ignore_eos=True, **sampling))
    plain = engine.run([(loop, PLAIN)])[0][0]

    def passes(parts: Parts) -> float:
        output = engine.run([(loop, parts)])[0][0]
        assert output.tokens == plain.tokens
        return output.usage.tokens_per_forward

    cold, warm = passes(Parts(recycling)), passes(Parts(recycling))
    assert cold >= 1.5
    assert warm >= cold
    assert passes(Parts(drafter(engine, nodes=12))) >= 1.5
    saved = recycling.state_dict()
    again = drafter(engine, nodes=12, learn_prompt=False)
    again.load_state_dict(saved)
    assert passes(Parts(again)) >= cold
    recycling.reset()
    assert passes(Parts(recycling)) == cold


def test_rows_with_their_own_table_do_not_meet():
    recycling = drafter(table="row")
    for row in (1, 2):
        recycling.open(row, [])
    recycling.observe([Feedback(1, (0,), (5,), (), 6, topk=torch.arange(8)[None], topk_logits=torch.zeros(1, 8))])
    mine, other = recycling.propose([RowView(1, [5], 9, 0.0, 0), RowView(2, [5], 9, 0.0, 0)], [4, 4])
    assert len(mine)
    assert not len(other)
    assert recycling.nbytes == 3 * tiny.VOCAB * 8 * 6
    recycling.close(1)
    assert recycling.nbytes == 2 * tiny.VOCAB * 8 * 6


def test_ranks_that_are_right_move_forward():
    recycling = drafter(nodes=8, tree="2.2.2")
    first = recycling._order[:8]
    recycling._tries[:] = 1000
    recycling._hits[:] = 10
    recycling._hits[3] = 900
    recycling._order = recycling._benefit_order()
    assert recycling._order[0] == (3,)
    assert set(recycling._order) == set(paths("2.2.2"))
    assert recycling._order[:8] != first
    for i, path in enumerate(recycling._order):
        assert len(path) == 1 or path[:-1] in recycling._order[:i]


def test_a_table_as_large_as_its_vocabulary_allows_and_no_larger():
    assert drafter(k=8).nbytes == tiny.VOCAB * 8 * 6
    engine = tiny.engine(dataclasses.replace(tiny.PLAIN, vocab_size=6))
    with pytest.raises(ConfigError, match=r"token-recycling\.k = 8.*vocabulary of 6"):
        TokenRecycling(Config(), MethodContext("tiny", engine.backbone))


def test_logits_that_are_not_finite_teach_the_table_nothing():
    engine = tiny.engine()
    with torch.no_grad():
        engine.backbone.embed.weight[50] = float("nan")
        head = engine.backbone.embed.weight.clone()
        head[50] = 0
    engine.backbone.head.weight = torch.nn.Parameter(head, requires_grad=False)
    recycling = drafter(engine, learn_prompt=True)
    bad = Request((50, 1), SamplingParams(max_tokens=6, ignore_eos=True))
    [[out]] = engine.run([(bad, Parts(recycling))])
    assert out.finish_reason == "error"
    ids, chances = recycling._shared
    assert int(ids.max()) == -1
    assert not bool(chances.isnan().any())


def test_a_draft_is_quick():
    recycling = TokenRecycling(Config(nodes=80), MethodContext("tiny", tiny.engine().backbone))
    recycling._shared[0][:] = torch.arange(8, dtype=torch.int32)
    row = RowView(1, [4], 99, 0.0, 0)
    start = time.perf_counter()
    for _ in range(50):
        recycling.propose([row], [80])
    assert (time.perf_counter() - start) / 50 < 0.02  # an order of magnitude above what it takes; not a benchmark


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"nodes": 0}, "token-recycling.nodes.*0"), ({"nodes": 81}, "nodes.*81"), ({"k": 7, "tree": "2.2.2"}, "k.*7"), ({"k": 0}, "k.*0"), ({"k": 33}, "k.*33"),
        ({"tree": "0.0"}, "tree.*0.0.*parent"), ({"tree": "0/0"}, "tree.*once"), ({"tree": "0/-1"}, "tree.*-1"),
        ({"tree": "a"}, "tree.*a"), ({"tree": "0/9"}, "k.*8"), ({"fill": "x"}, "fill"), ({"table": "x"}, "table"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name_and_value(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Config(**knobs)


def test_settings_as_text():
    built = registry.build("token-recycling:nodes=5,tree=0/1/0.0,learn_prompt=true", MethodContext("m", tiny.model()))
    assert built.config == Config(nodes=5, tree="0/1/0.0", learn_prompt=True)


def test_a_table_of_another_model_is_refused():
    engine = tiny.engine()
    recycling = drafter(engine)
    state = recycling.state_dict()
    for change, message in (
        ({"model": torch.tensor(list(b"other"), dtype=torch.uint8)}, "other"),
        ({"table": state["table"][:-1]}, "vocabulary"),
        ({"table": state["table"] + 500}, "ids"),
        ({"hits": -state["hits"] - 1}, "hits"),
        ({"chances": state["chances"] + 2}, "chances"),
    ):
        with pytest.raises(ConfigError, match=message):
            recycling.load_state_dict({**state, **change})
    with pytest.raises(ConfigError, match="lacks table"):
        recycling.load_state_dict({k: v for k, v in state.items() if k != "table"})
