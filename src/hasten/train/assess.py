"""How good a small model is: exact answers at one token per step, by world and canvas, and how far it can be believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from hasten.train import alphabet
from hasten.train.mixture import CANVASES, Batch, Mixture, collate, draw, row, sample_of
from hasten.train.network import Network
from hasten.worlds import WORLDS, Sample, Split, World, split_of

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES = {32: 60, 64: 60, 128: 24, 256: 12, 512: 6}
BLOCK = 32  # the width of the blocks a fully visible canvas is written in, one token per step


@dataclass(slots=True)
class _Canvas:
    """Rows that are being written: ids, where the windows begin, which places are still masked."""

    ids: Tensor
    known: Tensor
    masked: Tensor
    first: Tensor


@torch.no_grad()
def write(network: Network, prompts: Sequence[Sequence[int]], canvas: int, block: int = BLOCK) -> list[list[int]]:
    """What the network writes after prompts (ids), at most `canvas` tokens each, by the surest token of every step.

    A fully visible canvas is filled block after block of `block` tokens; a block-causal one in blocks of its own width, a
    left-to-right network in tokens. A row is done when it has an end token with nothing masked before it.
    """
    given = collate([([*prompt, *[alphabet.MASK] * canvas], len(prompt)) for prompt in prompts])
    first = torch.tensor([len(prompt) for prompt in prompts])
    state = _Canvas(given.ids.clone(), given.known, given.answer.clone(), first)
    out: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    while alive:
        _commit(network, state, block)
        keep = []
        for i, number in enumerate(alive):
            window = state.ids[i, state.first[i] : state.first[i] + canvas]
            masked = state.masked[i, state.first[i] : state.first[i] + canvas]
            ends = (window == alphabet.EOS).nonzero().flatten()
            done = int(ends[0]) if len(ends) else canvas
            if bool(masked[:done].any()):
                keep.append(i)
            else:
                out[number] = window[:done].tolist()
        alive = [alive[i] for i in keep]
        state = _Canvas(state.ids[keep], state.known[keep], state.masked[keep], state.first[keep])
    return out


def _commit(network: Network, state: _Canvas, block: int) -> None:
    """Make one token of every row final: the surest of the block that is in progress."""
    rows, length = state.ids.shape
    kind, places = network.shape.kind, torch.arange(length)[None]
    at = state.masked.float().argmax(1)
    if kind == "causal":
        last = int(at.max())
        states = network(state.ids[:, :last], state.known[:, :last])
        state.ids[torch.arange(rows), at] = network.logits(states[torch.arange(rows), at - 1]).argmax(-1)
        state.masked[torch.arange(rows), at] = False
        return
    origin = state.first[:, None] if kind == "full" else torch.zeros(1, 1, dtype=torch.long)
    width = block if kind == "full" else network.shape.block
    of = (places - origin).div(width, rounding_mode="floor")
    open_now = state.masked & (of == of.expand(rows, -1).gather(1, at[:, None]))
    probability = network.logits(network(state.ids, state.known)[open_now]).softmax(-1)
    best, token = probability.max(-1)
    score = torch.full((rows, length), -1.0).masked_scatter_(open_now, best)
    tokens = state.ids.masked_scatter(open_now, token)
    chosen = score.argmax(1, keepdim=True)
    state.ids.scatter_(1, chosen, tokens.gather(1, chosen))
    state.masked.scatter_(1, chosen, False)


def samples(world: World, canvas: int, count: int, split: Split = "test", seed: int = 0) -> list[Sample]:
    """Different samples of a split whose answers need this canvas; none where the world has no such sizes."""
    smaller = [c for c in CANVASES if c < canvas]
    sizes = world.fitting(canvas, smaller[-1] if smaller else 0)
    rng, found = Random(f"{world.name} {canvas} {seed}"), {}  # noqa: S311 - tasks, not secrets
    for _ in range(400 * count if sizes else 0):
        sample = sample_of(world, rng, rng.choice(sizes))
        if split_of(sample.prompt) == split:
            found[sample.prompt] = sample
        if len(found) == count:
            break
    return list(found.values())


def exact(network: Network, world: World, given: Sequence[Sample], canvas: int) -> float:
    """The share of samples whose written text is right in full."""
    prompts = [[alphabet.BOS, *alphabet.encode(one.prompt)] for one in given]
    written = write(network, prompts, canvas)
    right = [world.verify(one.meta, alphabet.decode(ids)) == 1 for one, ids in zip(given, written, strict=True)]
    return sum(right) / len(right)


def table(
    network: Network,
    counts: dict[int, int] | None = None,
    split: Split = "test",
    report: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """World -> canvas -> exact answers in percent and the number of samples, computed in bfloat16."""
    cells = [
        (world, canvas, count)
        for world in WORLDS.values()
        for canvas, count in (SAMPLES if counts is None else counts).items()
    ]
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for done, (world, canvas, count) in enumerate(cells):
        given = samples(world, canvas, count, split)
        if given:
            with torch.autocast("cpu", torch.bfloat16):
                right = exact(network, world, given, canvas)
            out.setdefault(world.name, {})[str(canvas)] = {"exact": round(100 * right, 1), "samples": len(given)}
        if report is not None:
            report(done + 1, len(cells))
    return out


@torch.no_grad()
def calibration(network: Network, count: int = 192, split: Split = "test", seed: int = 0) -> dict[str, dict[str, float]]:
    """Noise level -> expected calibration error of the greatest probability at masked places, and how often it is right.

    A left-to-right network has one level, the next token of right texts.
    """
    rng, mixture = Random(f"calibration {seed}"), Mixture()  # noqa: S311 - tasks, not secrets
    rows = sorted((row(*draw(rng, mixture, split=split)) for _ in range(count)), key=lambda one: len(one[0]))
    batches = [collate(rows[i : i + 16]) for i in range(0, len(rows), 16)]
    if network.shape.kind == "causal":
        pairs = [_pairs(network, given, given.answer & (given.weights == 1)) for given in batches]
        return {"next": _error(pairs)}
    out = {}
    for level in LEVELS:
        generator = torch.Generator().manual_seed(seed)
        drawn = [_hidden(network, given, level, generator) for given in batches]
        out[str(level)] = _error([_pairs(network, given, hidden) for given, hidden in zip(batches, drawn, strict=True)])
    return out


def _hidden(network: Network, given: Batch, level: float, generator: torch.Generator) -> Tensor:
    """Places of answers to mask at a noise level; for a block-causal network inside one block of a row, as it decodes."""
    hidden = given.answer & (torch.rand(given.answer.shape, generator=generator) < level)
    if network.shape.kind != "block":
        return hidden
    of = (torch.arange(given.ids.shape[1]) // network.shape.block)[None]
    chosen = given.answer.float().multinomial(1, generator=generator)
    return hidden & (of == of.expand_as(hidden).gather(1, chosen))


def _pairs(network: Network, given: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(greatest probability, whether its token is right) at hidden places."""
    with torch.autocast("cpu", torch.bfloat16):
        if network.shape.kind == "causal":
            states = network(given.ids[:, :-1], given.known[:, :-1])
            hidden, target = hidden[:, 1:], given.ids[:, 1:]
        else:
            states, target = network(given.ids.masked_fill(hidden, alphabet.MASK), given.known), given.ids
        best, token = network.logits(states[hidden]).softmax(-1).max(-1)
    return best, token == target[hidden]


def _error(pairs: Sequence[tuple[Tensor, Tensor]], bins: int = 10) -> dict[str, float]:
    sure, right = torch.cat([one for one, _ in pairs]), torch.cat([two for _, two in pairs]).float()
    cell = (sure * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).index_add(0, cell, sure - right).abs().sum() / len(sure)
    return {"ece": round(float(gaps), 4), "right": round(float(right.mean()), 4)}
