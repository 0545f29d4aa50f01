"""Rotary position embeddings: inverse frequencies per scaling rule, and a table that grows with the positions seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.errors import out_of_range
from hasten.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """float32 [rotated / 2] inverse frequencies; `rope.partial` of `head_dim` dimensions are rotated."""
    rotated = int(head_dim * rope.partial)
    rotated -= rotated % 2
    inverse = 1.0 / (rope.theta ** (torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated))
    if rope.kind == "factors":
        if len(rope.factors) != len(inverse):
            raise out_of_range("rope.factors", len(rope.factors), f"{len(inverse)} numbers, one per rotated pair")
        return inverse / torch.tensor(rope.factors)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        smooth = (rope.original_len / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = smooth.clamp(0, 1)  # 0: long wavelengths, divided by factor; 1: short ones, kept
        return (1 - smooth) * inverse / rope.factor + smooth * inverse
    return inverse


class RopeTable:
    """cos and signed sin of every position up to the largest seen, in the half-rotation layout.

    Angles are float32 products of position and inverse frequency, as the released models compute them.
    """

    def __init__(self, rope: Rope, head_dim: int) -> None:
        with torch.device("cpu"):
            self.inverse = inverse_frequencies(rope, head_dim)
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._rows = 0

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), each [T, 1, rotated], for `positions` int64 [T]."""
        largest = int(positions.max()) + 1
        if largest > self._rows:
            self._rows = max(256, 2 ** (largest - 1).bit_length())
            self._tables.clear()
        if dtype not in self._tables:
            angles = torch.arange(self._rows).float()[:, None] * self.inverse[None, :]
            cos, sin = angles.cos(), angles.sin()
            self._tables[dtype] = (
                torch.cat((cos, cos), -1).to(dtype)[:, None],
                torch.cat((-sin, sin), -1).to(dtype)[:, None],
            )
        cos, sin = self._tables[dtype]
        return cos[positions], sin[positions]

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., heads, head_dim] with its first `rotated` dimensions turned; the others pass through."""
        rotated = cos.shape[-1]
        if rotated == x.shape[-1]:
            return torch.addcmul(x * cos, x.roll(rotated // 2, -1), sin)
        turned = x[..., :rotated]
        turned = torch.addcmul(turned * cos, turned.roll(rotated // 2, -1), sin)
        return torch.cat((turned, x[..., rotated:]), -1)
