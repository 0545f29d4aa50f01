"""A pass rounds alike for any number of tokens and rows in bfloat16, where this processor's kernels allow it (AMX)."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from hasten.engine.contracts import RowInput
from hasten.engine.masks import Tree
from hasten.models.transformer import Norm, Transformer

CONFIG = dataclasses.replace(
    tiny.PLAIN, vocab_size=256, hidden=192, heads=6, kv_heads=2, head_dim=32, ffn=256, max_len=1024
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("the kernels of this processor depend on the number of rows")
    small = tiny.model(CONFIG)
    state = [
        (name, p.detach() * (0.3 if p.ndim > 1 else 1.0)) for name, p in small.named_parameters() if name != "head.weight"
    ]
    return Transformer.from_state(CONFIG, state, torch.bfloat16).pack()


def read(model: Transformer, pool, tokens: list[int]):
    cache = pool.open(len(tokens) + 80)
    model.run([RowInput(torch.tensor(tokens), torch.arange(len(tokens)), cache, logits="none")])
    cache.advance(len(tokens))
    return cache


@pytest.mark.parametrize("past", [1, 20, 63, 64, 100, 200, 317])
@pytest.mark.parametrize("count", [2, 3, 5, 9, 16, 24, 31, 32])
def test_a_chain_gives_the_bits_of_single_passes(model, past, count):
    generator = torch.Generator().manual_seed(past)
    tokens = torch.randint(0, 256, (past + count,), generator=generator).tolist()
    pool = model.pool(64_000_000)
    together, alone = read(model, pool, tokens[:past]), read(model, pool, tokens[:past])
    chain = Tree(tuple(range(-1, count - 1)))
    new = torch.tensor(tokens[past:])
    many = model.run([RowInput(new, torch.arange(past, past + count), together, chain, "all")]).logits
    for i in range(count):
        one = model.run([RowInput(new[i : i + 1], torch.tensor([past + i]), alone)]).logits
        alone.advance(1)
        assert torch.equal(many[i], one[0]), f"token {i}"
    assert torch.equal(together.slab[..., : past + count, :], alone.slab[..., : past + count, :])


def test_rows_of_a_batch_give_the_bits_of_each_alone(model):
    generator = torch.Generator().manual_seed(3)
    pool = model.pool(64_000_000)
    caches = [read(model, pool, torch.randint(0, 256, (n,), generator=generator).tolist()) for n in (5, 70, 130, 200)]
    rows = [RowInput(torch.tensor([7 + i]), torch.tensor([cache.length]), cache) for i, cache in enumerate(caches)]
    together = model.run(rows).logits
    for i, row in enumerate(rows):
        assert torch.equal(model.run([row]).logits[0], together[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_gives_the_same_bits_for_one_vector_and_many(dtype):
    norm = Norm(576, 1e-5, dtype)
    norm.weight.data = torch.randn(576).to(dtype)
    x = torch.randn(300, 576).to(dtype)
    with torch.inference_mode():
        many = norm(x)
        assert all(torch.equal(many[i], norm(x[i : i + 1])[0]) for i in range(300))
        want = torch.nn.functional.rms_norm(x.float(), (576,), norm.weight.float(), 1e-5)
        assert torch.allclose(many.float(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_what_lies_behind_the_mask_does_not_count():
    """Tiles are read beyond what is stored: left-overs of an earlier row must change nothing."""
    stack = tiny.model()
    pool = stack.pool(4_000_000)
    first = pool.open(64)
    tokens = list(range(1, 12))
    stack.run([RowInput(torch.tensor(tokens), torch.arange(11), first)])
    clean = stack.run([RowInput(torch.tensor(tokens), torch.arange(11), first)]).logits
    first.slab.fill_(1e4)
    assert torch.equal(stack.run([RowInput(torch.tensor(tokens), torch.arange(11), first)]).logits, clean)
