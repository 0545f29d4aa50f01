"""Placeholder queries in the decoder stack: they enter at some layer, look at what their anchor saw, and read out guesses.

A row's placeholders lie behind the queries of all rows of a pass, so that those are reported as without them. Their keys
take the row's free cache slots after its queries and are dead after the pass, as those of rejected draft nodes are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from hasten.engine.cache import Past
from hasten.engine.contracts import Needs, Pass, Pseudo, RowInput
from hasten.engine.masks import CAUSAL, Tree
from hasten.models.transformer import TILE, Block, RowPlan, Transformer, plus


@torch.inference_mode()
def look_ahead(target: Transformer, rows: Sequence[tuple[Past, Mapping[int, Tensor]]], pseudo: Pseudo) -> Tensor:
    """Final states [R, placeholders, hidden] of placeholders behind the newest committed token of every row.

    `rows` are (past, {layer: state [hidden] of that token entering the layer}), with one state for each layer in
    `pseudo.layers`. It is what a pass with placeholders would have added, run by itself from the first of those layers on:
    committed keys are read, one free slot per placeholder is scratch, nothing is committed. Raises MemoryFitError when
    there are not so many.
    """
    plans, none = [], torch.empty(0, dtype=torch.int64)
    for past, known in rows:
        row = RowInput(none, none, past.cache, logits="none", pseudo=pseudo)
        plans.append(RowPlan(row, past.length, past.length, past.length, slice(0, 0), none, CAUSAL, known=known))
    h = torch.empty(0, target.config.hidden, dtype=target.dtype)
    h = through(target, h, plans, lambda i, states: None, min(pseudo.layers))
    return torch.cat([states for states in finals(target, h, plans) if states is not None])


def widened(target: Transformer, h: Tensor, plans: list[RowPlan], needs: Needs, embeds: Tensor | None) -> Pass:
    """A pass over the rows' queries h [N, hidden] and placeholders; of the queries it tells what it would without."""
    real, taps = len(h), {}

    def tap(i: int, states: Tensor) -> None:
        if i in needs.hidden:
            taps[i] = states[:real]

    h = through(target, h, plans, tap)
    done = target._output(h[:real], plans, needs, taps, embeds)
    done.pseudo = tuple(finals(target, h, plans))
    return done


def through(
    target: Transformer, h: Tensor, plans: Sequence[RowPlan], tap: Callable[[int, Tensor], None], first: int = 0
) -> Tensor:
    """The layers from `first` on over the rows' queries h [N, hidden]; states [N + M, hidden], placeholders last.

    `tap(i, states)` sees what enters layer i, and at the end what leaves the last.
    """
    real = len(h)
    rotary: list[tuple[Tensor, Tensor]] = []
    adapt = next((plan.row.pseudo.adapt for plan in plans if plan.row.pseudo is not None), None)
    for i in range(first, len(target.layers) + 1):
        new = [_entering(plan, i, h) for plan in plans]
        if i == first or any(part is not None for part in new):
            h = _joined(h, real, plans, new)
            rotary = [table.at(_positions(plans), target.dtype) for table in target.ropes]
        tap(i, h)
        if i == len(target.layers):
            break
        block = cast(Block, target.layers[i])
        normed = block.attn_norm(h)
        turn = None if block.rope is None else rotary[block.rope]
        if adapt is None or len(h) == real:
            h = block.finish(h, block.ragged(normed, turn, plans))
        else:
            mixed = block.ragged(normed, turn, plans, adapt(i, "qkv", normed[real:]))
            h = finish(block, h, mixed, lambda x, i=i: adapt(i, "ffn", x[real:]))  # type: ignore[misc]
    return h


def finish(block: Block, h: Tensor, mixed: Tensor, beside: Callable[[Tensor], Tensor | None]) -> Tensor:
    """As `Block.finish`; what `beside` makes of the normed input is added to the last rows of the feed-forward output."""
    h = h + (mixed if block.post_attn_norm is None else block.post_attn_norm(mixed))
    x = block.ffn_norm(h)
    y = plus(block.feed_forward(x), beside(x))
    return h + (y if block.post_ffn_norm is None else block.post_ffn_norm(y))


def finals(target: Transformer, h: Tensor, plans: Sequence[RowPlan]) -> list[Tensor | None]:
    """States after the final norm [anchors, placeholders, hidden] of every row's placeholders, None where it has none."""
    first = min(plan.extra.start for plan in plans)
    final = target.norm(h[first:]) if len(h) > first else h[first:]
    found: list[Tensor | None] = []
    for plan in plans:
        own, pseudo = final[plan.extra.start - first : plan.extra.stop - first], plan.row.pseudo
        known = pseudo is not None and len(own)
        found.append(own.unflatten(0, (len(pseudo.layers), -1)).transpose(0, 1) if pseudo and known else None)
    return found


def _entering(plan: RowPlan, layer: int, h: Tensor) -> Tensor | None:
    """States [steps * anchors, hidden] of the row's placeholders that enter here, after it has made room for them."""
    pseudo = plan.row.pseudo
    steps = [] if pseudo is None else [step for step, at in enumerate(pseudo.layers) if at == layer]
    if pseudo is None or not steps:
        return None
    t, anchors = plan.row.queries, list(plan.row.anchors)
    behind = plan.row.positions[anchors] if t else plan.row.positions.new_tensor([plan.start - 1])
    states = h[plan.span][anchors] if plan.known is None else plan.known[layer][None]
    parents = list(plan.visibility.parents) if isinstance(plan.visibility, Tree) else list(range(-1, t - 1))
    for step in steps:
        before = t + (step - 1) * len(behind)  # step i of an anchor sees step i - 1 of it, as a node its parent
        parents += range(before, before + len(behind)) if step else anchors if t else [-1]
    plan.visibility = Tree(tuple(parents))
    plan.positions = torch.cat((plan.positions, *(behind + step + 1 for step in steps)))
    plan.masks.clear()
    plan.visible = plan.read = len(plan.positions)
    if plan.row.cache is not None:
        plan.visible = plan.row.cache.reserve(plan.start, plan.positions)
        plan.read = min(-(-plan.visible // TILE) * TILE, plan.row.cache.capacity)
    return torch.cat([pseudo.enter(step, states).to(h.dtype) for step in steps])


def _joined(h: Tensor, real: int, plans: Sequence[RowPlan], new: Sequence[Tensor | None]) -> Tensor:
    """States of the queries and, row by row, of the placeholders with those that have just entered."""
    parts, at = [h[:real]], real
    for plan, part in zip(plans, new, strict=True):
        had = h[plan.extra]
        parts += [had] if part is None else [had, part]
        size = len(had) + (0 if part is None else len(part))
        plan.extra, at = slice(at, at + size), at + size
    return torch.cat(parts)


def _positions(plans: Sequence[RowPlan]) -> Tensor:
    """Positions [N + M] of all queries, then of all placeholders."""
    t = [plan.span.stop - plan.span.start for plan in plans]
    queries = [plan.positions[:n] for plan, n in zip(plans, t, strict=True)]
    return torch.cat(queries + [plan.positions[n:] for plan, n in zip(plans, t, strict=True)])
