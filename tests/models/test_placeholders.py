"""Placeholders: in a pass or alone they are what a dense computation says, and nobody else notices them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch

from hasten.engine.cache import Past
from hasten.engine.contracts import LayerHooks, Needs, RowInput
from hasten.engine.masks import FULL, Tree
from hasten.errors import MemoryFitError, UnsupportedError
from hasten.models.placeholders import look_ahead

sys.path.insert(0, str(Path(__file__).parent.parent / "draft"))
from ahead import by_hand, inputs, maps, read

IDS = torch.arange(3, 15)
GUESSERS = {"maps": lambda target: maps(target), "deep": lambda target: maps(target, (0, 1, 3)), "inputs": inputs}


@pytest.fixture(params=list(tiny.CONFIGS))
def target(request):
    return tiny.model(tiny.CONFIGS[request.param])


@pytest.fixture(params=list(GUESSERS))
def guesser(request, target):
    return GUESSERS[request.param](target)


@pytest.mark.parametrize("cached", [False, True])
def test_in_a_pass_they_are_what_the_dense_form_says_and_real_queries_do_not_notice(target, guesser, cached):
    rows = []
    for pseudo in (None, guesser.pseudo(3)):
        cache = read(target, IDS[:5])[0] if cached else None
        first = 5 if cached else 0
        row = RowInput(IDS[first:], torch.arange(first, 12), cache, logits="all")
        if pseudo is not None:
            row.pseudo, row.anchors = pseudo, (1, 4)
        rows.append(row)
    other = RowInput(torch.arange(20, 29), torch.arange(9), logits="all", pseudo=guesser.pseudo(2), anchors=(8,))
    plain = target.run(rows[:1], Needs(hidden=(0, 2, 3), final_hidden=True))
    both = target.run([rows[1], other, RowInput(IDS, torch.arange(12))], Needs(hidden=(0, 2, 3), final_hidden=True))
    n = len(rows[0].tokens)
    assert torch.allclose(both.row_logits(0), plain.row_logits(0), atol=1e-5)
    assert both.spans == ((0, n), (n, n + 9), (n + 9, n + 21))
    for layer in (0, 2, 3):
        assert torch.allclose(both.hidden[layer][:n], plain.hidden[layer], atol=1e-4)  # states reach 20
    assert torch.allclose(both.final_hidden[:n], plain.final_hidden, atol=1e-5)
    assert both.pseudo[2] is None
    for j, anchor in enumerate((1, 4)):
        want = by_hand(target, guesser, IDS, anchor + (5 if cached else 0), 3)
        assert torch.allclose(both.pseudo[0][j], want, atol=1e-4)
    assert torch.allclose(both.pseudo[1][0], by_hand(target, guesser, torch.arange(20, 29), 8, 2), atol=1e-4)


def test_behind_the_nodes_of_a_tree_each_sees_its_own_path(target, guesser):
    cache = read(target, IDS[:6])[0]
    tokens = torch.tensor([9, 30, 31, 32])  # root, two children of it, a child of the second
    row = RowInput(tokens, torch.tensor([6, 7, 7, 8]), cache, Tree((-1, 0, 0, 2)), "all", pseudo=guesser.pseudo(3))
    row.anchors = (0, 1, 2, 3)
    got = target.run([row]).pseudo[0]
    for anchor, path in ((0, [9]), (1, [9, 30]), (2, [9, 31]), (3, [9, 31, 32])):
        text = torch.cat((IDS[:6], torch.tensor(path)))
        assert torch.allclose(got[anchor], by_hand(target, guesser, text, len(text) - 1, 3), atol=1e-4), anchor


def test_alone_behind_a_cache_they_are_the_same_and_leave_it_as_it_was(target, guesser):
    caches = [read(target, IDS[:n]) for n in (5, 12)]
    before = [(cache.length, cache.slab[:, :, :, : cache.length].clone()) for cache, _ in caches]
    known = [{layer: states[-1] for layer, states in hidden.items()} for _, hidden in caches]
    rows = [(Past(cache), own) for (cache, _), own in zip(caches, known)]
    got = look_ahead(target, rows, guesser.pseudo(3))
    for j, n in enumerate((5, 12)):
        assert torch.allclose(got[j], by_hand(target, guesser, IDS, n - 1, 3), atol=1e-4)
    for (cache, _), (length, slab) in zip(caches, before):
        assert cache.length == length
        assert torch.equal(cache.slab[:, :, :, :length], slab)
        assert cache.positions[:length].tolist() == list(range(length))
    assert torch.allclose(look_ahead(target, rows[1:], guesser.pseudo(2)), got[1:, :2], atol=1e-5)


def test_what_cannot_be_is_refused():
    target = tiny.model()
    pseudo = maps(target).pseudo(3)
    row = RowInput(IDS, torch.arange(12), visibility=FULL, pseudo=pseudo, anchors=(1,))
    with pytest.raises(UnsupportedError, match="placeholders"):
        target.run([row])
    hooked = RowInput(IDS, torch.arange(12), hooks=LayerHooks())
    with pytest.raises(UnsupportedError, match="placeholders"):
        target.run([RowInput(IDS, torch.arange(12), pseudo=pseudo, anchors=(1,)), hooked])
    cache, hidden = read(target, torch.arange(1, 64), room=1)
    with pytest.raises(MemoryFitError, match="holds 64 slots"):
        look_ahead(target, [(Past(cache), {i: h[-1] for i, h in hidden.items()})], pseudo)
