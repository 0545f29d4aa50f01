"""Kept prefixes: the same tokens with and without, nothing across tenants, memory bounded and given up at once."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import pytest
import tiny
import torch
from canvases import Masked
from drafters import RandomTree, Stub
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.cache import CacheLayout, CachePool
from hasten.engine.engine import PLAIN, Engine, Parts
from hasten.engine.prefix import BLOCK, PrefixStore
from hasten.kernels import library
from hasten.types import Event, Request, SamplingParams

MODEL = tiny.model()
BASES = {
    "torch": MODEL,
    "windowed": tiny.model(tiny.WINDOWED, 1),
    **({"native": tiny.native(MODEL), "native-int8": tiny.native(MODEL, cache="int8")} if library.available() else {}),
}
LAYOUT = CacheLayout(layers=1, kv_heads=1, head_dim=2, dtype=torch.float32)


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(1, tiny.VOCAB) for _ in range(length))


def request(prompt: tuple[int, ...], tenant: str = "", **sampling: object) -> Request:
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "seed": 5, **sampling})  # type: ignore[arg-type]
    return Request(prompt, params, tenant=tenant)


def keeping(backbone: object = MODEL, cache_bytes: int = 16_000_000, share: float = 0.5, **options: object) -> Engine:
    return Engine(backbone, cache_bytes=cache_bytes, prefix_bytes=int(cache_bytes * share), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9}, {"temperature": 0.9, "n": 3}], ids=["greedy", "sampled", "n"]
)
@pytest.mark.parametrize("base", BASES)
def test_the_same_tokens_with_and_without(base, sampling):
    """Turns of a chat, prompts that share a beginning, whole blocks and one more or less: cold and warm are alike."""
    cold, warm = Engine(BASES[base], cache_bytes=16_000_000), keeping(BASES[base])
    head = text(70)
    prompts = [
        head,
        head[:64],
        head[:65],
        head[:63],
        (*head, *text(20, 1)),
        (*head[:40], *text(30, 2)),
        text(5),
        text(33, 3),
    ]
    chat = head[:50]
    for turn in range(3):
        prompts.append(chat)
        chat = (*chat, *cold.run([(request(chat), PLAIN)])[0][0].tokens, *text(20, 10 + turn))
    cached = []
    for prompt in prompts:
        one = request(prompt, **sampling)
        want, got = cold.run([(one, PLAIN)])[0], warm.run([(one, PLAIN)])[0]
        assert [out.tokens for out in got] == [out.tokens for out in want]
        usage = got[0].usage
        assert usage.cached_tokens % BLOCK == 0
        assert usage.cached_tokens < len(prompt)
        assert usage.computed_tokens + usage.cached_tokens == want[0].usage.computed_tokens
        cached.append(usage.cached_tokens)
    assert cached[:8] == [0, 32, 64, 32, 64, 32, 0, 0]
    if not sampling:
        assert cached[9] >= 32 < cached[10]  # later turns find the answers too
    assert warm.scheduler.pool.used_bytes == warm.prefix.nbytes == warm.scheduler.pool.lent_bytes


@pytest.mark.parametrize("base", [name for name in BASES if name.startswith("native")])
def test_on_the_native_stack_keys_are_the_same_bits(base):
    head, more = text(70), text(30, 1)
    warm, cold = keeping(BASES[base]), Engine(BASES[base], cache_bytes=16_000_000)
    warm.run([(request(head), PLAIN)])
    slabs = []
    for engine in (warm, cold):
        engine.add(request((*head, *more)))
        for _ in range(5):
            engine.step()
        row = engine.scheduler.running[0]
        assert row.cached == (64 if engine is warm else 0)
        slabs.append(row.cache.slab[:, :, :, : row.cache.length].clone())
    assert torch.equal(*slabs)


def test_the_trace_tells_what_came_from_the_cache():
    engine = keeping()
    engine.run([(request(text(70)), PLAIN)])
    events: list[Event] = []
    engine.run([(request((*text(70), *text(9, 1))), PLAIN)], events.append)
    read = [event for event in events if event.kind == "prefill"]
    assert [(event.position, event.total, event.cached_tokens) for event in read] == [(79, 79, 64)]


def test_requests_that_run_at_the_same_time_share_a_prompt_once_it_is_read():
    engine = keeping()
    engine.add(request(text(70), max_tokens=40))
    engine.step()
    assert engine.prefix.nbytes == 2 * engine.scheduler.pool.layout.nbytes(BLOCK)
    out = engine.run([(request((*text(70), 3)), PLAIN)])[0][0]
    assert out.usage.cached_tokens == 64


def test_tenants_never_share():
    engine = keeping()
    prompt = text(70)
    engine.run([(request(prompt, "one"), PLAIN)])
    assert engine.run([(request(prompt, "two"), PLAIN)])[0][0].usage.cached_tokens == 0
    assert engine.run([(request(prompt), PLAIN)])[0][0].usage.cached_tokens == 0
    assert engine.run([(request(prompt, "one"), PLAIN)])[0][0].usage.cached_tokens == 64


def test_a_planted_hit_of_another_tenant_is_impossible():
    """Whatever the other tenant stores - names that look like salts, separators, quotes - no name of this one is among them."""
    engine = keeping()
    prompt = text(64)
    mine = set(engine.prefix.names(prompt, "me"))
    tricks = ["", "m", "me ", " me", 'me", "', "me\x00", "ME", "mé", "torch me", '"me"', "me" * 50]
    for tenant in tricks:
        engine.run([(request(text(70), tenant), PLAIN)])
        assert not mine & set(engine.prefix._blocks)
    assert engine.run([(request(text(70), "me"), PLAIN)])[0][0].usage.cached_tokens == 0


def test_models_and_layouts_have_names_of_their_own():
    tokens = text(64)
    names = set()
    layouts = [LAYOUT, *(dataclasses.replace(LAYOUT, **{field: 3}) for field in ("layers", "kv_heads", "head_dim"))]
    layouts.append(dataclasses.replace(LAYOUT, dtype=torch.int8))
    for layout in layouts:
        for identity in ("a", "b", "a int8"):
            names |= set(PrefixStore(CachePool(layout, 10**6), 10**5, identity).names(tokens, ""))
    assert len(names) == 2 * 3 * len(layouts)


@given(st.lists(st.tuples(st.lists(st.integers(0, 300), max_size=3 * BLOCK), st.sampled_from(["", "a", "b"])), max_size=12))
def test_equal_names_are_equal_texts(texts):
    store = PrefixStore(CachePool(LAYOUT, 10**6), 10**5, "x")
    seen: dict[bytes, tuple[object, ...]] = {}
    for tokens, tenant in texts:
        filled = [*tokens, *range(2 * BLOCK)]
        for i, name in enumerate(store.names(filled, tenant), 1):
            assert seen.setdefault(name, (tenant, *filled[: i * BLOCK])) == (tenant, *filled[: i * BLOCK])
    assert len(set(seen.values())) == len(seen)


def test_digits_that_run_together_are_other_texts():
    store = PrefixStore(CachePool(LAYOUT, 10**6), 10**5, "x")
    one, two = [1, 23] + [0] * 30, [12, 3] + [0] * 30
    assert set(store.names(one, "")).isdisjoint(store.names(two, ""))
    assert set(store.names([256] + [0] * 31, "")).isdisjoint(store.names([0, 1] + [0] * 30, ""))


# --- memory ---


def row_of(pool: CachePool, tokens: tuple[int, ...], value: float = 1.0):
    row = pool.open(len(tokens))
    row.slab[:] = value
    row.advance(len(tokens))
    return row


def test_the_least_lately_used_goes_first_and_the_end_of_a_text_before_its_beginning():
    pool = CachePool(LAYOUT, LAYOUT.nbytes(BLOCK * 20))
    store = PrefixStore(pool, LAYOUT.nbytes(BLOCK * 6), "x")
    old, new = text(3 * BLOCK), text(3 * BLOCK, 1)
    for tokens in (old, new):
        row = row_of(pool, tokens)
        store.keep(row, tokens, "")
        row.release()
    assert store.nbytes == LAYOUT.nbytes(BLOCK * 6)
    fresh = pool.open(4 * BLOCK)
    assert store.fill(fresh, (*old, 1), "") == 3 * BLOCK  # now the latest
    third = text(2 * BLOCK, 2)
    row = row_of(pool, third)
    store.keep(row, third, "")
    lengths = []
    for tokens in (old, new, third):
        cache = pool.open(4 * BLOCK)
        lengths.append(store.fill(cache, (*tokens, 1), "") // BLOCK)
        cache.release()
    assert lengths == [3, 1, 2]


def test_a_text_longer_than_the_store_keeps_its_beginning():
    pool = CachePool(LAYOUT, LAYOUT.nbytes(BLOCK * 40))
    store = PrefixStore(pool, LAYOUT.nbytes(BLOCK * 3), "x")
    tokens = text(8 * BLOCK)
    row = row_of(pool, tokens)
    for _ in range(2):
        store.keep(row, tokens, "")
        assert store.fill(pool.open(9 * BLOCK), tokens, "") == 3 * BLOCK
        assert store.nbytes == LAYOUT.nbytes(BLOCK * 3)


def test_blocks_are_copies():
    pool = CachePool(LAYOUT, 10**6)
    store = PrefixStore(pool, 10**5, "x")
    tokens = text(BLOCK + 1)
    row = row_of(pool, tokens, 3.0)
    store.keep(row, tokens, "")
    row.scrub()
    for _ in range(2):
        other = pool.open(2 * BLOCK)
        assert store.fill(other, tokens, "") == BLOCK
        assert bool((other.slab[:, :, :, :BLOCK] == 3.0).all())
        other.slab.fill_(9.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["keep", "open", "close", "fill"]), st.integers(0, 5), st.integers(1, 200)), max_size=60
    )
)
def test_rows_get_what_is_kept_and_the_budget_holds(steps):
    pool = CachePool(LAYOUT, LAYOUT.nbytes(512))
    store = PrefixStore(pool, LAYOUT.nbytes(256), "x")
    rows = []
    for what, seed, size in steps:
        if what == "open":
            rows_bytes = sum(row.slab.nbytes for row in rows)
            if rows_bytes + pool.row_bytes(size) <= pool.budget_bytes:  # never refused for what is merely kept
                rows.append(row_of(pool, text(size, seed)))
        elif rows and what == "close":
            rows.pop(seed % len(rows)).release()
        elif rows and what == "keep":
            row = rows[seed % len(rows)]
            store.keep(row, text(row.length, seed), str(seed))
        elif pool.fits(size):
            row = pool.open(size)
            assert store.fill(row, text(size, seed), str(seed)) < size
            row.release()
        assert store.nbytes == pool.lent_bytes <= LAYOUT.nbytes(256)
        assert pool.used_bytes == store.nbytes + sum(row.slab.nbytes for row in rows)
        assert pool.held_bytes <= pool.budget_bytes
    for row in rows:
        row.release()
    store.give_up(10**9)
    assert pool.used_bytes == pool.lent_bytes == 0


def test_a_request_as_large_as_the_cache_runs_at_once():
    need = MODEL.pool(10**8).row_bytes(200)
    engine = keeping(cache_bytes=need, share=0.5)
    for seed in range(3):
        engine.run([(request(text(60, seed)), PLAIN)])
    assert engine.prefix.nbytes > 0
    engine.add(request(text(60), max_tokens=140))
    engine.step()
    assert len(engine.scheduler.running) == 1
    assert engine.prefix.nbytes == 0


# --- what is not kept ---


def test_a_row_cut_off_while_it_reads_leaves_nothing(monkeypatch):
    from hasten.engine import ar
    from hasten.engine.limits import Limits

    monkeypatch.setattr(ar, "LIMITS", Limits(prefill_chunk=32))
    engine = keeping()
    number = engine.add(request(text(150)))
    engine.step()
    engine.step()
    assert engine.scheduler.running[0].cache.length == 64
    engine.abort(number)
    engine.step()
    assert engine.prefix.nbytes == engine.scheduler.pool.used_bytes == 0
    kept = engine.add(request(text(150)))
    for _ in range(6):
        engine.step()
    engine.abort(kept)  # its prompt was read whole
    assert engine.prefix.nbytes == engine.scheduler.pool.used_bytes > 0


@pytest.mark.parametrize("when", [1, 3])
def test_rows_that_were_not_finite_leave_nothing(monkeypatch, when):
    engine = keeping()
    passes = []
    run = engine.backbone.run

    def broken(rows, needs):
        done = run(rows, needs)
        passes.append(rows)
        if len(passes) == when:
            done = dataclasses.replace(done, logits=torch.full_like(done.logits, torch.nan))
            for row in rows:
                row.cache.slab[:, :, :, 40] = torch.nan
        return done

    monkeypatch.setattr(engine.backbone, "run", broken, raising=False)
    events: list[Event] = []
    engine.run([(request(text(70)), PLAIN)], events.append)
    assert events[-1].output.finish_reason == "error"
    kept = engine.prefix.nbytes // engine.scheduler.pool.layout.nbytes(BLOCK)
    assert kept == (0 if when == 1 else 2)  # the prompt itself was sound where the answer was not
    assert engine.scheduler.pool.used_bytes == engine.prefix.nbytes


def test_a_block_that_is_not_finite_is_not_kept():
    pool = CachePool(LAYOUT, 10**6)
    store = PrefixStore(pool, 10**5, "x")
    tokens = text(4 * BLOCK)
    row = row_of(pool, tokens)
    row.slab[0, 1, 0, 2 * BLOCK + 5, 1] = torch.nan
    store.keep(row, tokens, "")
    assert store.nbytes == pool.lent_bytes == 2 * LAYOUT.nbytes(BLOCK)


class Reads(Stub):
    """A drafter that must see the whole prompt."""

    needs = dataclasses.replace(Stub.needs, prompt=True)


def test_a_drafter_that_must_hear_the_prompt_hears_all_of_it():
    engine, drafter = keeping(), Reads()
    prompt = text(70)
    engine.run([(request(prompt), PLAIN)])
    out = engine.run([(request(prompt), Parts(drafter, budget=2))])[0][0]
    assert out.usage.cached_tokens == 0
    heard = [token for report in drafter.heard if not report.nodes for token in report.tokens]
    assert tuple(heard) == prompt[:-1]
    quiet = engine.run([(request(prompt), Parts(Stub(), budget=2))])[0][0]
    assert quiet.usage.cached_tokens == 64


def test_drafts_and_prefixes_go_together():
    engine = keeping()
    prompt = text(70)
    plain = engine.run([(request(prompt), PLAIN)])[0][0].tokens
    drafter = RandomTree(tiny.VOCAB)
    drafter.needs = dataclasses.replace(drafter.needs, prompt=False, prompt_logits=False)
    out = engine.run([(request(prompt), Parts(drafter, budget=5))])[0][0]
    assert (out.tokens, out.usage.cached_tokens) == (plain, 64)
    assert engine.run([(request((*prompt, *plain, 3)), PLAIN)])[0][0].usage.cached_tokens == 64


def test_keys_of_a_stand_in_are_not_kept(monkeypatch):
    engine = keeping()
    run = engine.backbone.run
    monkeypatch.setattr(
        engine.backbone, "run", lambda rows, needs: dataclasses.replace(run(rows, needs), backbone="other"), raising=False
    )
    engine.run([(request(text(70)), PLAIN)])
    assert engine.prefix.nbytes == 0


def test_it_is_off_unless_asked_for_and_for_masked_models():
    assert Engine(MODEL, cache_bytes=10**6).prefix is None
    assert Engine(Masked(), cache_bytes=10**6, prefix_bytes=10**5).prefix is None


def test_names_of_a_longer_text_begin_with_those_of_a_shorter():
    store = PrefixStore(CachePool(LAYOUT, 10**6), 10**5, "x")
    tokens = text(5 * BLOCK + 7)
    chains = [list(store.names(tokens[:n], "")) for n in range(0, len(tokens), 9)]
    for shorter, longer in pairwise(chains):
        assert longer[: len(shorter)] == shorter
    assert [len(chain) for chain in chains] == [n // BLOCK for n in range(0, len(tokens), 9)]
