"""The packed layout of a linear operator, on every machine that can make one: the same function as the plain weight."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from hasten.models import linear as module
from hasten.models.linear import Linear


@pytest.fixture
def packed(monkeypatch):
    """A packed float32 operator and its weight, also where float32 is not packed of itself (AVX-512)."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(module, "packs", lambda dtype: dtype == torch.float32)
    layer = Linear(24, 40, bias=True)
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    weight = layer.weight.detach().clone()
    layer.pack()
    assert layer.packed is not None
    assert layer.weight is None
    return layer, weight


def test_a_packed_operator_is_its_weight_and_gives_it_back(packed):
    layer, weight = packed
    x = torch.randn(3, 7, 24)
    torch.testing.assert_close(layer(x), linear(x, weight, layer.bias))
    layer.unpack()
    torch.testing.assert_close(layer.weight.detach(), weight)


def test_autocast_narrows_what_comes_into_a_packed_operator(packed):
    """Attention under autocast gives bfloat16; without AVX-512 the weights it meets are packed float32."""
    layer, weight = packed
    x = torch.randn(7, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out.float(), linear(x.float(), weight, layer.bias))
