"""What fills placeholders, for tests: random maps and inputs over tiny targets, written as files like those of `hasten train`."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from hasten.engine.contracts import Needs, RowInput
from hasten.engine.engine import PLAIN, Parts
from hasten.models.feature import identity
from hasten.models.pseudo import Guesser, TrainedInputs, TransferMaps
from hasten.models.transformer import Transformer
from hasten.train.self_text import Texts
from hasten.types import Request, SamplingParams


def maps(target: Transformer, layers: tuple[int, ...] = (1, 2, 2), seed: int = 0, scale: float = 0.1) -> TransferMaps:
    """Random maps; `scale` 0 leaves the identity."""
    made = TransferMaps(target, torch.arange(tiny.VOCAB), layers)
    generator = torch.Generator().manual_seed(seed)
    for _, p in made.trained():
        p.data = torch.randn(p.shape, generator=generator) * scale
    return made


def inputs(target: Transformer, count: int = 3, seed: int = 0, scale: float = 0.2) -> TrainedInputs:
    """Random inputs with a random adapter."""
    made = TrainedInputs(target, torch.arange(tiny.VOCAB), count, 2, 4)
    generator = torch.Generator().manual_seed(seed)
    for _, p in made.trained():
        p.data = torch.randn(p.shape, generator=generator) * scale
    return made


def stored(folder: Path, guesser: Guesser, target: Transformer) -> str:
    """A file holding the guesser."""
    path = folder / f"{guesser.kind}.safetensors"
    guesser.save(path, identity(target, ""), {"steps": 0})
    return str(path)


def by_hand(target: Transformer, guesser: Guesser, ids: torch.Tensor, anchor: int, count: int) -> torch.Tensor:
    """Final states [count, hidden] of the placeholders behind one token: the prefix and they as one dense causal sequence.

    The text runs up to the anchor; the placeholders follow it one by one, which is what they may see.
    """
    n, pseudo = anchor + 1, guesser.pseudo(count)
    with torch.no_grad():
        h = target.embeddings(ids[:n])
        p = torch.zeros(0, h.shape[1])
        for i in range(len(target.layers) + 1):
            new = [pseudo.enter(s, h[-1:]) for s, at in enumerate(pseudo.layers) if at == i]
            p = torch.cat((p, *new))
            if i == len(target.layers):
                return target.norm(p)
            block = target.layers[i]
            x = torch.cat((h, p))
            positions = torch.arange(len(x))
            rotary = None if block.rope is None else target.ropes[block.rope].at(positions, torch.float32)
            seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
            seen = seen if block.window is None else seen.triu(1 - block.window)
            adapted = pseudo.adapt is not None and len(p) > 0
            added = pseudo.adapt(i, "qkv", block.attn_norm(x)[n:]) if adapted else None
            q, k, v = block.project(x=block.attn_norm(x), rotary=rotary, added=added)
            mixed = block.out(block.attend(q, k.transpose(0, 1), v.transpose(0, 1), seen))
            x = x + (mixed if block.post_attn_norm is None else block.post_attn_norm(mixed))
            y = block.feed_forward(block.ffn_norm(x))
            if adapted:
                y[n:] += pseudo.adapt(i, "ffn", block.ffn_norm(x)[n:])
            x = x + (y if block.post_ffn_norm is None else block.post_ffn_norm(y))
            h, p = x[:n], x[n:]
    raise AssertionError


def requests(count: int, **sampling: float) -> list[Request]:
    """Ragged prompts of 4 to 31 tokens, with seeds."""
    return [
        Request(tuple(range(i + 1, 3 * i + 5)), SamplingParams(max_tokens=14, seed=i, ignore_eos=True, **sampling))
        for i in range(count)
    ]


def texts(engine, drafter, asked: list[Request], **options) -> list[tuple[int, ...]]:
    """The tokens of every request, drafted for by `drafter` (None: plain)."""
    parts = PLAIN if drafter is None else Parts(drafter, **options)
    return [outs[0].tokens for outs in engine.run([(one, parts) for one in asked])]


def read(target: Transformer, ids: torch.Tensor, room: int = 64):
    """(row cache holding `ids`, states entering every layer [T, hidden])."""
    cache = target.pool(10_000_000).open(len(ids) + room)
    taps = tuple(range(len(target.layers) + 1))
    done = target.run([RowInput(ids, torch.arange(len(ids)), cache)], Needs(hidden=taps))
    cache.advance(len(ids))
    return cache, done.hidden


def trained_texts():
    """(engine over a tiny trained model, 48 texts of 4 + 24 tokens that it wrote)."""
    engine, text = tiny.trained()
    asked = [(Request(tuple(text(4)), SamplingParams(max_tokens=24, ignore_eos=True)), PLAIN) for _ in range(48)]
    told = [[*request.prompt, *outs[0].tokens] for (request, _), outs in zip(asked, engine.run(asked), strict=True)]
    ids = torch.tensor([t for one in told for t in one], dtype=torch.int32)
    return engine, Texts(ids, torch.tensor([28] * 48), torch.tensor([4] * 48))
