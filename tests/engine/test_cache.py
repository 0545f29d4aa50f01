"""The slot-addressed cache: compaction equals a fresh prefill, memory is reused and never exceeds its budget."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.cache import CacheLayout, CachePool
from hasten.engine.contracts import RowInput
from hasten.engine.masks import Tree
from hasten.errors import ConfigError, MemoryFitError

LAYOUT = CacheLayout(layers=2, kv_heads=2, head_dim=4, dtype=torch.float32)


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_cache_after_compaction_equals_a_fresh_prefill(name: str) -> None:
    model = tiny.model(tiny.CONFIGS[name])
    pool = model.pool(10**7)
    text = torch.randint(0, tiny.VOCAB, (20,), generator=torch.Generator().manual_seed(1))
    row = pool.open(64)
    model.run([RowInput(text[:12], torch.arange(12), row)])
    row.advance(12)
    # the eight last tokens go in as every second node of a tree of decoys
    tokens, parents, depth, keep = [], [], [], []
    tip = -1
    for j in range(12, 20):
        tokens += [5, int(text[j])]
        parents += [tip, tip]
        depth += [j, j]
        tip = len(tokens) - 1
        keep.append(tip)
    nodes = model.run([RowInput(torch.tensor(tokens), torch.tensor(depth), row, Tree(tuple(parents)), logits="all")])
    row.gather(12, keep)
    fresh = pool.open(64)
    dense = model.run([RowInput(text, torch.arange(20), fresh, logits="all")])
    assert row.length == 20
    assert row.positions[:20].tolist() == list(range(20))
    torch.testing.assert_close(row.slab[:, :, :, :20], fresh.slab[:, :, :, :20], atol=1e-4, rtol=0)
    torch.testing.assert_close(nodes.logits[keep], dense.logits[12:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_a_tree_of_single_children_gives_the_logits_of_a_chain(name: str) -> None:
    model = tiny.model(tiny.CONFIGS[name])
    tokens = torch.arange(5, 25)
    rows = [model.pool(4_000_000).open(64) for _ in range(2)]
    for row in rows:
        model.run([RowInput(tokens[:12], torch.arange(12), row)])
        row.advance(12)
    chain = Tree(tuple(range(-1, 7)))
    trees = model.run([RowInput(tokens[12:], torch.arange(12, 20), rows[0], chain, logits="all")]).logits
    plain = model.run([RowInput(tokens[12:], torch.arange(12, 20), rows[1], logits="all")]).logits
    torch.testing.assert_close(trees, plain, atol=1e-5, rtol=0)


def test_an_uncommitted_pass_leaves_no_trace() -> None:
    model = tiny.model()
    row = model.pool(10**7).open(64)
    ids = torch.arange(1, 11)
    model.run([RowInput(ids, torch.arange(10), row)])
    row.advance(10)
    first = model.run([RowInput(torch.tensor([3]), torch.tensor([10]), row)]).logits
    model.run([RowInput(torch.tensor([4, 5, 6]), torch.arange(10, 13), row)])
    again = model.run([RowInput(torch.tensor([3]), torch.tensor([10]), row)]).logits
    assert torch.equal(first, again)


def test_replacing_a_block_in_place_is_what_a_fresh_row_would_hold() -> None:
    model = tiny.model()
    pool = model.pool(10**7)
    a, b = pool.open(64), pool.open(64)
    ids = torch.arange(1, 13)
    model.run([RowInput(ids, torch.arange(12), a)])
    a.advance(12)
    changed = ids.clone()
    changed[8:12] = torch.tensor([50, 51, 52, 53])
    replaced = model.run([RowInput(changed[8:12], torch.arange(8, 12), a, start=8, logits="all")])
    fresh = model.run([RowInput(changed, torch.arange(12), b, logits="all")])
    torch.testing.assert_close(replaced.logits, fresh.logits[8:], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.slab[:, :, :, :12], b.slab[:, :, :, :12], atol=1e-5, rtol=0)


def test_fork_is_independent() -> None:
    pool = CachePool(LAYOUT, 10**6)
    row = pool.open(10)
    row.slab[:, :, :, :3] = 7
    row.advance(3)
    twin = row.fork(100)
    assert twin.length == 3
    assert twin.capacity >= 100
    twin.slab[:, :, :, 0] = 9
    assert bool((row.slab[:, :, :, 0] == 7).all())
    row.release()
    with pytest.raises(ConfigError, match="released"):
        row.fork()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=60))
def test_pool_never_exceeds_its_budget_and_forgets_nothing(steps: list[tuple[bool, int]]) -> None:
    pool = CachePool(LAYOUT, LAYOUT.nbytes(640))
    rows = []
    for opens, size in steps:
        if opens or not rows:
            fits = pool.fits(size)
            try:
                rows.append(pool.open(size))
                assert fits
                assert rows[-1].capacity >= size
            except MemoryFitError:
                assert not fits
        else:
            rows.pop(size % len(rows)).release()
        assert pool.used_bytes == sum(row.slab.nbytes for row in rows)
        assert pool.held_bytes <= pool.budget_bytes
    for row in rows:
        row.release()
        row.release()
    assert pool.used_bytes == 0


def test_memory_is_reused() -> None:
    pool = CachePool(LAYOUT, 10**6)
    row = pool.open(100)
    address = row.slab.data_ptr()
    row.release()
    assert pool.open(90).slab.data_ptr() == address


def test_bad_use_is_refused_with_numbers() -> None:
    pool = CachePool(LAYOUT, LAYOUT.nbytes(128))
    with pytest.raises(MemoryFitError, match="129 tokens needs"):
        pool.open(129)
    row = pool.open(64)
    with pytest.raises(MemoryFitError, match="holds 64 slots"):
        row.reserve(0, torch.arange(65))
    with pytest.raises(ConfigError, match="length"):
        row.truncate(1)
    with pytest.raises(ConfigError, match="tokens"):
        row.advance(65)
    with pytest.raises(MemoryFitError, match="cache_bytes"):
        CachePool(LAYOUT, 10)
