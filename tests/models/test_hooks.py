"""The side doors of the layer loop: each against the same stack written out by hand."""

from __future__ import annotations

import pytest
import tiny
import torch

from hasten.engine.contracts import LayerHooks, Needs, RowInput
from hasten.errors import UnsupportedError

IDS = torch.arange(3, 15)
POSITIONS = torch.arange(12)


def run(model, hooks: LayerHooks | None, cache: bool = False) -> torch.Tensor:
    row = model.pool(10_000_000).open(64) if cache else None
    return model.run([RowInput(IDS, POSITIONS, row, logits="all", hooks=hooks)]).logits


def by_hand(model, mixer=None, ffn=None, after=None, extra=None) -> torch.Tensor:
    """The stack layer by layer with parts exchanged; `extra(i, where, x)` is added."""
    rotary = [table.at(POSITIONS, torch.float32) for table in model.ropes]
    add = extra or (lambda i, where, x: 0)
    with torch.no_grad():
        h = model._embed(IDS)
        causal = torch.ones(12, 12, dtype=torch.bool).tril()
        for i, block in enumerate(model.layers):
            x = block.attn_norm(h)
            q, k, v = block.project(x, None if block.rope is None else rotary[block.rope])
            seen = causal if block.window is None else causal & causal.new_ones(12, 12).triu(1 - block.window)
            own = block.out(block.attend(q, k.transpose(0, 1), v.transpose(0, 1), seen))
            y = (own if mixer is None else mixer(i, x)) + add(i, "attention", x)
            out = h + (y if block.post_attn_norm is None else block.post_attn_norm(y))
            out = out if after is None else after(i, out)
            x = block.ffn_norm(out)
            y = (block.feed_forward(x) if ffn is None else ffn(i, x)) + add(i, "ffn", x)
            out = out + (y if block.post_ffn_norm is None else block.post_ffn_norm(y))
            h = out + add(i, "layer", h)
        return model.logits(model.norm(h))


@pytest.fixture(params=list(tiny.CONFIGS))
def model(request):
    return tiny.model(tiny.CONFIGS[request.param])


@pytest.mark.parametrize("cache", [False, True])
def test_hooks_that_decline_change_nothing(model, cache):
    declining = LayerHooks(
        mixer=lambda i, x: None, ffn=lambda i, x, types: None, parallel=lambda i, where, x: None,
        after_attention=lambda i, h, types, memory: h,
    )  # fmt: skip
    assert (run(model, declining, cache) - run(model, None, cache)).abs().max() < 1e-5
    assert (run(model, None) - by_hand(model)).abs().max() < 1e-4


def test_each_part_can_be_replaced_or_joined(model):
    half = lambda i, x: 0.5 * x  # noqa: E731
    cases = [
        (LayerHooks(mixer=half), {"mixer": half}),
        (LayerHooks(ffn=lambda i, x, types: half(i, x)), {"ffn": half}),
        (LayerHooks(after_attention=lambda i, h, types, memory: h + 1), {"after": lambda i, h: h + 1}),
        *(
            (LayerHooks(parallel=lambda i, at, x, w=where: 0.3 * x if at == w else None),
             {"extra": lambda i, at, x, w=where: 0.3 * x if at == w else 0})
            for where in ("attention", "ffn", "layer")
        ),
    ]  # fmt: skip
    plain = run(model, None)
    for hooks, parts in cases:
        got = run(model, hooks)
        assert (got - by_hand(model, **parts)).abs().max() < 1e-3
        assert (got - plain).abs().max() > 1e-2


def test_types_and_memory_reach_the_hooks():
    seen = []
    types, memory = torch.arange(12) % 2, torch.ones(2, 48)
    hooks = LayerHooks(after_attention=lambda i, h, t, m: seen.append((i, t, m)) or h, types=types, memory=memory)
    run(tiny.model(), hooks)
    assert [i for i, *_ in seen] == [0, 1, 2]
    assert all(t is types and m is memory for _, t, m in seen)


def test_a_row_may_shrink_on_its_way_and_its_neighbours_do_not_notice():
    model = tiny.model()

    def drop(i, h, positions, types):
        keep = torch.arange(0, len(h), 2) if i == 1 else torch.arange(len(h))
        return h[keep], positions[keep], None if types is None else types[keep], keep

    hooks = LayerHooks(before_layer=drop)
    rows = [RowInput(IDS, POSITIONS, logits="all", hooks=hooks), RowInput(IDS, POSITIONS, logits="all")]
    out = model.run(rows, Needs(final_hidden=True))
    assert out.spans == ((0, 6), (6, 18))
    assert (out.row_logits(1) - run(model, None)).abs().max() < 1e-5
    with torch.no_grad():
        rotary = model.ropes[0].at(POSITIONS, torch.float32)
        h = model._embed(IDS)
        keep = torch.arange(12)
        for i, block in enumerate(model.layers):
            if i == 1:
                keep = keep[::2]
                h = h[::2]
            n = len(keep)
            q, k, v = block.project(block.attn_norm(h), (rotary[0][keep], rotary[1][keep]))
            seen = torch.ones(n, n, dtype=torch.bool).tril()
            h = block.finish(h, block.out(block.attend(q, k.transpose(0, 1), v.transpose(0, 1), seen)))
        want = model.logits(model.norm(h))
    assert (out.row_logits(0) - want).abs().max() < 1e-4


def test_doors_that_need_other_rows_are_refused():
    model = tiny.model()
    with pytest.raises(UnsupportedError, match="kv_write"):
        run(model, LayerHooks(kv_write=lambda i, k, v: None))
    shrink = LayerHooks(before_layer=lambda i, h, p, t: (h, p, t, torch.arange(len(h))))
    with pytest.raises(UnsupportedError, match="slab"):
        run(model, shrink, cache=True)
