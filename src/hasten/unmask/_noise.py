"""Random numbers of canvases: pure functions of (seed, step, position), so drafts and batches draw what rows alone do."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 words."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 words that wrap around."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniforms(seed: int, step: int, positions: Tensor, count: int = 1, stream: int = 0) -> Tensor:
    """float64 [P, count] in (0, 1) for int64 `positions` [P]; streams are independent of one another."""
    key = _mix(_mix(torch.tensor(seed)) ^ torch.tensor(step * 16 + stream))
    rows = _mix(key ^ positions)
    words = _mix(rows[:, None] ^ torch.arange(1, count + 1)[None, :])
    return (_shifted(words, 11).double() + 0.5) * 2.0**-53


def gumbel(seed: int, step: int, positions: Tensor, count: int, stream: int = 0) -> Tensor:
    """Standard Gumbel noise float64 [P, count]."""
    return -(-uniforms(seed, step, positions, count, stream).log()).log()
