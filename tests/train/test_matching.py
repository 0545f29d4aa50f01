"""The start that matches context: what its first two layers look at before anything is learnt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.train import alphabet, network
from hasten.train.matching import HELD, OFFSETS, begin, hold
from hasten.train.network import Network, Shape


@pytest.fixture
def looked(monkeypatch) -> list[Tensor]:
    """What every layer's queries look at, [B, heads, T, T], filled by a pass."""
    seen: list[Tensor] = []
    plain = network.attend

    def attend(q, k, v, mask, causal):
        seen.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        return plain(q, k, v, mask, causal)

    monkeypatch.setattr(network, "attend", attend)
    return seen


def begun() -> Network:
    net = Network(Shape())
    begin(net)
    return net


def test_the_first_layer_reads_the_neighbours(looked):
    text = "copy: cat sun pen key jam fox\ncat sun pen key jam fox"
    with torch.no_grad():
        begun()(torch.tensor([[alphabet.BOS, *alphabet.encode(text)]]))
    for head, offset in enumerate(OFFSETS):
        places = torch.arange(4, len(text) - 4)
        found = looked[0][0, head, places].argmax(-1)
        assert (found == places + offset).float().mean() > 0.9


def test_the_second_layer_looks_where_the_neighbours_are_the_same(looked):
    """One masked letter of a copied list: where it was copied from is among the five of 54 places two heads see most of."""
    prompt, answer = "copy: cat sun pen key jam fox\n", "cat sun pen key jam fox"
    start, net = 1 + len(prompt), begun()
    hits = []
    for place in (4, 5, 9, 10, 17, 18):
        ids = torch.tensor([[alphabet.BOS, *alphabet.encode(prompt + answer)]])
        ids[0, start + place] = alphabet.MASK
        looked.clear()
        with torch.no_grad():
            net(ids)
        hits += [1 + len("copy: ") + place in looked[1][0, head, start + place].topk(5).indices for head in (0, 1)]
    assert sum(hits) >= 10


def test_it_is_a_start_and_no_more():
    net, plain = begun(), Network(Shape())
    for name, weight in net.named_parameters():
        if "layers.2" in name or "layers.3" in name or "gate" in name:
            assert torch.equal(weight, plain.get_parameter(name))
    assert torch.equal(begun().layers[1].q.weight, net.layers[1].q.weight)
    for shape in (Shape(layers=1), Shape(heads=8), Shape(kind="causal"), Shape(hidden=64)):
        with pytest.raises(ConfigError, match="four heads"):
            begin(Network(shape))


def test_the_circuit_is_held_at_first_and_the_marks_for_good():
    net = begun()
    for progress in (1 / 4200, 1999 / 4200, 2000 / 4200):
        for weight in net.parameters():
            weight.grad = torch.ones_like(weight)
        hold(net, progress)
        held = {name for name, weight in net.named_parameters() if not weight.grad.any()}
        parts = {"layers.0": ("q", "k", "v", "out", "attn_norm"), "layers.1": ("q", "k", "attn_norm")}
        circuit = {f"{layer}.{part}.weight" for layer, names in parts.items() for part in names}
        assert held == (circuit if progress < HELD else set())
        assert not net.embed.weight.grad[:, :2].any()
        assert net.embed.weight.grad[:, 2:].all()
