"""ADED: the table is the count written out, the search obeys its rules, and no table changes the text."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.draft._trigrams import Trigrams, fingerprint
from hasten.draft.aded import Aded, Config
from hasten.engine.contracts import MethodContext, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError, FormatError
from hasten.types import Request, SamplingParams


def drafter(engine=None, table: Trigrams | None = None, **knobs) -> Aded:
    engine = engine or tiny.engine()
    return Aded(Config(**{"table": "none", **knobs}), MethodContext("tiny", engine.backbone), table)


def random_table(seed: int, pairs: int = 400) -> Trigrams:
    r = random.Random(seed)
    texts = [np.array([r.randrange(tiny.VOCAB) for _ in range(pairs)])]
    return Trigrams.build(texts, tiny.VOCAB)


def view(tokens: list[int]) -> RowView:
    return RowView(1, tokens, 99, 0.0, 0)


TABLES = {"none": lambda: None, "random": lambda: random_table(1), "empty": lambda: Trigrams.build([], tiny.VOCAB)}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 4, 12])
@pytest.mark.parametrize("table", list(TABLES))
def test_text_is_that_of_plain_decoding(sampling, batch, table):
    engine = tiny.engine(rows=batch)
    r = random.Random(2)
    asked = [
        Request(
            tuple(r.randrange(5) for _ in range(r.randint(1, 30))),
            SamplingParams(max_tokens=20, seed=i, ignore_eos=i % 2 == 0, **sampling),
        )
        for i in range(12)
    ]
    plain = [outs[0].tokens for outs in engine.run([(one, PLAIN) for one in asked])]
    aded = drafter(engine, TABLES[table](), iterations=12)
    for measured in (False, True):
        parts = Parts(aded, measured=measured)
        assert [outs[0].tokens for outs in engine.run([(one, parts) for one in asked])] == plain


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 5), max_size=30), max_size=5),
    followers=st.integers(1, 4),
    least=st.integers(1, 3),
)
def test_the_table_is_the_count_written_out(texts, followers, least):
    table = Trigrams.build([np.array(text, dtype=np.int64) for text in texts], 6, followers, least)
    counts: dict[tuple[int, int], Counter] = defaultdict(Counter)
    for text in texts:
        for a, b, c in zip(text, text[1:], text[2:]):
            counts[a, b][c] += 1
    known = 0
    for a in range(6):
        for b in range(6):
            total = sum(counts[a, b].values())
            best = sorted(counts[a, b].items(), key=lambda entry: (-entry[1], entry[0]))[:followers]
            want = [(c, n / total) for c, n in best] if total >= least else []
            got = table.followers(a, b)
            assert [c for c, _ in got] == [c for c, _ in want]
            assert [p for _, p in got] == pytest.approx([p for _, p in want], abs=1e-3)
            if followers >= 6 and want:
                assert sum(p for _, p in got) == pytest.approx(1.0, abs=1e-2)
            known += bool(want)
    assert len(table) == known


def test_a_window_seen_twice_adds_twice_the_step_up_to_the_cap():
    aded = drafter(cap=0.2)
    window = [7, 8, 9, 10]
    aded.adapt(window)
    aded.adapt(window)
    assert dict(aded.followers((7, 8)))[9] == pytest.approx(0.08)
    for _ in range(10):
        aded.adapt(window)
    assert dict(aded.followers((8, 9)))[10] == pytest.approx(0.2)
    counted = drafter(table=Trigrams.build([np.array([1, 2, 3])], tiny.VOCAB), cap=1.02)
    counted.adapt([1, 2, 3])
    assert dict(counted.followers((1, 2)))[3] == pytest.approx(1.02)


def test_one_follower_per_pair_makes_a_chain_and_no_table_drafts_nothing():
    chain = list(range(10, 40))
    aded = drafter(table=Trigrams.build([np.array(chain)], tiny.VOCAB), learn_prompt=False)
    [draft] = aded.propose([view([50, 10, 11])], [24])
    assert draft.tokens == (12, 13, 14, 15)
    assert draft.parents == (-1, 0, 1, 2)
    assert draft.scores == pytest.approx((1.0, 1.0, 1.0, 1.0), abs=1e-3)
    for tokens in ([5], [5, 6]):
        [nothing] = drafter().propose([view(tokens)], [24])
        assert not len(nothing)
    [nothing] = aded.propose([view([50, 10, 11])], [0])
    assert not len(nothing)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), budget=st.integers(1, 64), depth=st.integers(1, 4), iterations=st.integers(1, 60))
def test_the_search_obeys_its_rules(seed, budget, depth, iterations):
    r = random.Random(seed)
    table = Trigrams.build([np.array([r.randrange(6) for _ in range(200)])], tiny.VOCAB)
    aded = drafter(table=table, depth=depth, iterations=iterations, nodes=64)
    text = [r.randrange(6) for _ in range(20)]
    nodes = aded.search((text[-2], text[-1]), 20)
    if len(nodes) > 1:
        assert nodes[0].visits == iterations
        assert [n.pair for n in nodes] == [n.pair for n in aded.search((text[-2], text[-1]), 20)]
    [draft] = aded.propose([view(text)], [budget])
    assert len(draft) <= min(budget, 64)
    level: list[int] = []
    pairs: list[tuple[int, int]] = []
    for token, parent, score in zip(draft.tokens, draft.parents, draft.scores or ()):
        assert parent < len(level)
        above = (text[-2], text[-1]) if parent < 0 else pairs[parent]
        options = dict(aded.followers(above))
        assert token in options
        assert score == pytest.approx(min(1.0, options[token] / sum(options.values())))
        level.append(1 if parent < 0 else level[parent] + 1)
        pairs.append((above[1], token))
    assert not level or max(level) <= depth + 1


def test_text_like_the_corpus_needs_fewer_passes_and_adaptation_helps():
    engine, text = tiny.trained()
    corpus = [np.array(text(400)) for _ in range(20)]
    request = Request(tuple(text(20)), SamplingParams(max_tokens=120, ignore_eos=True))
    plain = engine.run([(request, PLAIN)])[0][0]

    def tau(aded: Aded) -> float:
        out = engine.run([(request, Parts(aded))])[0][0]
        assert out.tokens == plain.tokens
        return out.usage.tokens_per_forward

    assert tau(drafter(engine, Trigrams.build(corpus, tiny.VOCAB))) >= 1.4
    still, moving = drafter(engine, step=0.0), drafter(engine)
    assert tau(still) == 1.0
    first = tau(moving)
    assert first > 1.2
    assert tau(moving) >= first  # the same document, continued


def test_a_draft_from_a_large_table_is_quick():
    vocab = 2000
    r = np.random.default_rng(1)
    table = Trigrams.build([r.integers(0, vocab, 110_000)], vocab)
    assert len(table) > 100_000
    context = MethodContext("tiny", SimpleNamespace(capabilities=SimpleNamespace(vocab_size=vocab), name="x"))
    aded = Aded(Config(table="none"), context, table)
    text = [int(token) for token in r.integers(0, vocab, 40)]
    pairs = [tuple(divmod(int(key), 1 << 21)) for key in r.choice(table.state["keys"].numpy(), 60)]
    took = []
    for pair in pairs:
        row = view([*text, *pair])
        start = time.thread_time()
        [draft] = aded.propose([row], [24])
        took.append(time.thread_time() - start)
        assert len(draft)
    assert sorted(took)[len(took) // 2] < 0.004  # a tenth of a pass of smollm2-135m on two cores; not a benchmark


def test_adapted_pairs_are_bounded_and_kept_in_a_file():
    aded = drafter(max_keys=5)
    aded.adapt(list(range(40)))
    assert len(aded._added) == 5
    again = drafter()
    again.load_state_dict(aded.state_dict())
    assert [token for token, _ in again.followers((36, 37))] == [38]
    assert dict(again.followers((36, 37)))[38] == pytest.approx(0.04)
    state = aded.state_dict()
    for change, message in (
        ({"vocabulary": torch.zeros(3, dtype=torch.uint8)}, "vocabulary"),
        ({"pairs": state["pairs"] + 90}, "pairs"),
        ({"values": state["values"][:-1]}, "pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            again.load_state_dict({**state, **change})
    with pytest.raises(ConfigError, match="lack values"):
        again.load_state_dict({k: v for k, v in state.items() if k != "values"})


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "table.safetensors"
    mine = fingerprint(None, tiny.VOCAB)
    random_table(3).save(path, mine)
    assert len(Trigrams.load(path, mine, tiny.VOCAB)) == len(random_table(3))
    with pytest.raises(ConfigError, match="another tokenizer"):
        Trigrams.load(path, fingerprint(SimpleNamespace(token_strings=lambda: ["a"]), 1), tiny.VOCAB)
    with pytest.raises(FormatError, match="do not agree"):
        Trigrams.load(path, mine, 20)
    blob = path.read_bytes()
    r = random.Random(0)
    refused = 0
    for _ in range(120):
        at = r.randrange(len(blob))
        path.write_bytes(blob[:at] if r.random() < 0.5 else blob[:at] + bytes([r.randrange(256)]) + blob[at + 1 :])
        try:
            table = Trigrams.load(path, mine, tiny.VOCAB)
        except (FormatError, ConfigError) as error:
            assert str(path) in error.message or "tokenizer" in error.message
            refused += 1
        else:  # a changed chance or id inside its range is another sound table
            assert all(token < tiny.VOCAB for a in range(9) for b in range(9) for token, _ in table.followers(a, b))
    assert refused > 50
    with pytest.raises(ConfigError, match=r"texts.*200"):
        Trigrams.build([np.array([1, 2, 200])], tiny.VOCAB)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nodes", 0),
        ("nodes", 65),
        ("iterations", 0),
        ("depth", 9),
        ("keep", 0),
        ("window", 2),
        ("max_keys", 0),
        ("step", -1.0),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(field, value):
    with pytest.raises(ConfigError, match=f"aded.{field}.*{value}"):
        Config(**{field: value})
