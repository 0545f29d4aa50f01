"""A start from which looking things up is learnt at once: the first two layers begin as a circuit that matches context.

A masked token can often be copied from where its neighbours stand elsewhere. A network finds that out only after millions
of tokens; here it begins with it (compare "Mimetic initialization", arXiv 2305.09828, which does it for other patterns).
Layer 0: head h reads the token at one of the offsets -1, 1, -2, 2, found by rotary angles alone. Layer 1: a head looks for
places whose neighbours are those of the query, away from masked ones, and copies what stands there. The circuit is held
for the first half of a run, while the rest learns to use it, and then trained like everything else.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from hasten.errors import out_of_range
from hasten.train import alphabet
from hasten.train.network import Layer, Network

OFFSETS = (-1, 1, -2, 2)
PAIRS = (((0, 2), (0, 2)), ((1, 3), (1, 3)), ((0, 2), (1, 3)), ((1, 3), (0, 2)))  # neighbours of the query, of the key
HELD = 0.476  # share of a run: the first 1999 of 4200 steps
_WIDTH = 0.1  # standard deviation of embeddings and of the codes of neighbours
_LEVEL = 4 * _WIDTH  # of the two marks in embeddings: channel 0 says "a token", channel 1 "a mask"
_EMBEDDING, _STREAM = 1.03 * _WIDTH, 2.3 * _WIDTH  # root mean square of embeddings, and of the stream behind layer 0
_FAST = 9  # rotary pairs that tell neighbours apart
_SLOPE, _MATCH, _AWAY = (
    6.0,
    25.0,
    18.0,
)  # scores: of the right offset, of equal neighbours, against masked places


def begin(network: Network, seed: int = 0) -> None:
    """Set embeddings, the first two layers and the last norm of a fresh network.

    Raises ConfigError for a network that has no two layers of four heads, or heads too small for the angles.
    """
    shape = network.shape
    size = shape.hidden // shape.heads
    if shape.layers < 2 or shape.heads != len(OFFSETS) or size < 32 or shape.kind != "full":
        raise out_of_range("shape", shape, "full, two layers or more, four heads of 32 or more")
    generator = torch.Generator().manual_seed(seed + 99)
    first, second = (cast(Layer, one) for one in network.layers[:2])
    with torch.no_grad():
        mark = network.embed.weight
        mark *= _WIDTH / 0.02
        mark[:, 0], mark[:, 1] = _LEVEL, 0.0
        mark[alphabet.MASK, 1] = _LEVEL
        network.norm.weight.fill_(0.02 / _WIDTH)  # so that the first guesses stay flat
        codes = _neighbours(first, size, shape.theta, generator)
        _lookup(second, size, codes, generator)


def hold(network: Network, progress: float) -> None:
    """Take away the gradients of the two marks, and, until the share HELD of a run is over, of the circuit."""
    grads = [network.embed.weight.grad]
    if grads[0] is not None:
        grads[0][:, :2] = 0
    if progress < HELD:
        first, second = (cast(Layer, one) for one in network.layers[:2])
        for weight in (
            *(one.weight for one in (first.q, first.k, first.v, first.out, second.q, second.k)),
            *(one.weight for one in (first.attn_norm, second.attn_norm)),
        ):
            if weight.grad is not None:
                weight.grad.zero_()


def _neighbours(layer: Layer, size: int, theta: float, generator: torch.Generator) -> list[Tensor]:
    """Heads that read a neighbour; the matrices [hidden, size] by which they write it."""
    hidden, half = layer.q.weight.shape[1], size // 2
    used = (theta ** (-torch.arange(half) / half))[:_FAST]
    gain = float((1 - used.cos()).sum())
    strength = math.sqrt(_SLOPE * math.sqrt(size) / gain) / (_LEVEL / _EMBEDDING)
    value = torch.randn(size, hidden, generator=generator) * hidden**-0.5
    value[:, :2] = 0
    codes = []
    for head, offset in enumerate(OFFSETS):
        rows = slice(head * size, (head + 1) * size)
        query, key = torch.zeros(size), torch.zeros(size)
        query[:_FAST] = strength
        key[:_FAST] = strength * torch.cos(-used * offset)
        key[half : half + _FAST] = strength * torch.sin(-used * offset)
        layer.q.weight[rows, 0], layer.k.weight[rows, 0] = query, key
        layer.v.weight[rows] = value
        code = torch.randn(hidden, size, generator=generator) * (_WIDTH / size**0.5)
        layer.out.weight[:, rows] = code
        codes.append(code)
    return codes


def _lookup(layer: Layer, size: int, codes: list[Tensor], generator: torch.Generator) -> None:
    """Heads that find the same neighbours elsewhere, on slow rotary pairs, and copy the token there."""
    hidden, half = layer.q.weight.shape[1], size // 2
    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    spared = [half - 1, half - 2, size - 1, size - 2]
    scale = float((codes[0] ** 2).sum() / size) / _STREAM
    alpha = math.sqrt(_MATCH * math.sqrt(size) / 2 / len(slow)) / scale
    away = math.sqrt(_AWAY * math.sqrt(size) / len(spared)) / (_LEVEL / _STREAM)
    for head, (ours, theirs) in enumerate(PAIRS):
        query, key = torch.zeros(size, hidden), torch.zeros(size, hidden)
        for a, b in zip(ours, theirs, strict=True):
            mix = torch.randn(len(slow), size, generator=generator) * size**-0.5
            query[slow] += alpha * mix @ codes[a].T
            key[slow] += alpha * mix @ codes[b].T
        query[spared], key[spared] = 0.0, 0.0
        query[spared, 0], key[spared, 1] = away, -away
        rows = slice(head * size, (head + 1) * size)
        layer.q.weight[rows], layer.k.weight[rows] = query, key
        plane = torch.linalg.qr(torch.randn(hidden, size, generator=generator))[0].T
        plane[:, :2] = 0
        layer.v.weight[rows], layer.out.weight[:, rows] = plane, 1.5 * _WIDTH * plane.T
