"""Tiny random models for tests: real stacks, real caches, no checkpoint needed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from hasten.engine.engine import Engine
from hasten.models.config import Layer, ModelConfig, Rope
from hasten.models.native import NativeStack
from hasten.models.packing import from_state
from hasten.models.transformer import Transformer

VOCAB = 97

PLAIN = ModelConfig(
    family="llama", vocab_size=VOCAB, hidden=48, heads=4, kv_heads=2, head_dim=12, ffn=96, max_len=256,
    layers=(Layer(), Layer(), Layer()), tied=True, eos_ids=(0,),
)  # fmt: skip
WINDOWED = dataclasses.replace(
    PLAIN, family="gemma2", layers=(Layer(window=7), Layer(), Layer(window=7)), sandwich_norms=True,
    attn_softcap=20.0, logit_softcap=15.0, activation="gelu_tanh", embed_scale=48**0.5,
)  # fmt: skip
NORMED = dataclasses.replace(
    PLAIN, family="qwen3", qk_norm=True, qkv_bias=True, layers=(Layer(), Layer(rope=None), Layer(window=9)), tied=False,
    ropes=(Rope(theta=1e4, kind="llama3", factor=4.0, original_len=32, partial=0.5),),
)  # fmt: skip
CONFIGS = {"plain": PLAIN, "windowed": WINDOWED, "normed": NORMED}


def model(config: ModelConfig = PLAIN, seed: int = 0, scale: float = 0.3) -> Transformer:
    """A random stack; weights large enough that greedy text is not constant and near-ties are rare."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = [(name, p.shape) for name, p in Transformer(config).named_parameters()]
    state = []
    for name, shape in shapes:
        value = torch.randn(shape, generator=generator)
        state.append((name, 1 + 0.1 * value if "norm" in name else value * (0.3 if "embed" in name else scale)))
    return Transformer.from_state(config, state)


def native(stack: Transformer, **options: object) -> NativeStack:
    """The native stack of the same weights, with the torch one behind it."""
    weights = from_state(stack.config, stack.named_parameters(), torch.float32)
    return NativeStack(stack.config, weights, oracle=lambda: stack, **options)  # type: ignore[arg-type]


def engine(config: ModelConfig = PLAIN, **kwargs: object) -> Engine:
    """An engine over a random stack with 32 MB of cache."""
    return Engine(model(config), **{"cache_bytes": 32_000_000, **kwargs})  # type: ignore[arg-type]


def trained() -> tuple[Engine, Callable[[int], list[int]]]:
    """An engine over a tiny model trained on texts made of twelve recurring lines, and a source of such texts.

    The source starts anew for every caller: what a test draws does not depend on those that ran before it.
    """
    engine, lines, state = _trained()
    r = random.Random()
    r.setstate(state)
    return engine, partial(_text, r, lines)


def _text(r: random.Random, lines: list[list[int]], length: int) -> list[int]:
    out: list[int] = []
    while len(out) < length:
        out += r.choice(lines)
    return out[:length]


@cache
def _trained() -> tuple[Engine, list[list[int]], tuple[Any, ...]]:
    """The engine, the lines, and where the draws stood after the training."""
    r = random.Random(1)
    lines = [[r.randrange(10, VOCAB) for _ in range(r.randint(5, 9))] + [1] for _ in range(12)]

    stack = model(scale=0.1)
    for parameter in stack.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(stack.parameters(), lr=3e-3)
    for _ in range(120):
        ids = torch.tensor([_text(r, lines, 49) for _ in range(16)])
        loss = torch.nn.functional.cross_entropy(stack(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 1.0
    return Engine(stack.eval().requires_grad_(False), cache_bytes=32_000_000), lines, r.getstate()
