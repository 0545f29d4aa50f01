"""Rotary embeddings against complex multiplication, for every scaling and share of the head."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.errors import ConfigError
from hasten.models.config import Rope
from hasten.models.rope import RopeTable, inverse_frequencies


@pytest.mark.parametrize("partial", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("kind", ["plain", "linear", "factors"])
def test_rotation_is_complex_multiplication_of_the_two_halves(kind, partial):
    dim = 32
    n = int(dim * partial) // 2
    factors = tuple(1.0 + i / 4 for i in range(n)) if kind == "factors" else ()
    rope = Rope(theta=5000.0, kind=kind, factor=3.0 if kind == "linear" else 1.0, partial=partial, factors=factors)
    positions = torch.tensor([0, 1, 5, 900])
    x = torch.randn(4, 3, dim, generator=torch.Generator().manual_seed(0))
    got = RopeTable.rotate(x, *RopeTable(rope, dim).at(positions, torch.float32))
    for t, position in enumerate(positions.tolist()):
        for i in range(n):
            angle = position * 5000.0 ** (-2 * i / (2 * n))
            angle /= 3.0 if kind == "linear" else factors[i] if kind == "factors" else 1.0
            z = torch.complex(x[t, :, i].double(), x[t, :, i + n].double()) * complex(math.cos(angle), math.sin(angle))
            assert torch.allclose(got[t, :, i].double(), z.real, atol=2e-4)
            assert torch.allclose(got[t, :, i + n].double(), z.imag, atol=2e-4)
    assert torch.equal(got[..., 2 * n :], x[..., 2 * n :])


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    rope = Rope(theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8192)
    plain, scaled = inverse_frequencies(Rope(theta=5e5), 128), inverse_frequencies(rope, 128)
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    assert torch.allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize("field", ["theta", "factor", "partial"])
def test_bad_settings_are_refused(field):
    with pytest.raises(ConfigError, match=f"rope.{field}"):
        Rope(**{field: -1.0})
