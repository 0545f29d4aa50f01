"""The drafting loop shared by EAGLE-style drafters: a beam of continuations by one layer over the target's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hasten.engine.cache import CachePool, RowCache
from hasten.engine.contracts import EMPTY_DRAFT, Draft, Draws, Feedback, Needs, RowInput, RowView
from hasten.engine.masks import Explicit
from hasten.errors import MemoryFitError
from hasten.models.feature import FeatureModel
from hasten.models.stack import DecoderStack

_CHUNK = 512  # elements of a prompt read in one pass of the layer


@dataclass(slots=True)
class _Row:
    """One row's own cache and the features not read yet; a `lost` row missed some, or found no room, and drafts nothing."""

    missing: int  # features of prompt tokens that were not heard yet
    cache: RowCache | None = None
    waiting: list[Tensor] = field(default_factory=list)
    lost: bool = False


@dataclass(slots=True)
class _Tree:
    """A draft under way: nodes by creation, and the beam that grows next."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reach: list[float] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)  # slots (after the prefix) of each expanded node's ancestors


class FeatureTree:
    """Drafts the likeliest nodes of a beam search by `layer` over the features of `target` (EAGLE-2's dynamic tree).

    Reads the target's final states of prompt and accepted tokens; keeps its own one-layer cache per row, at most
    `cache_bytes` in all: a row that finds no room drafts nothing. `width` nodes grow per level, `depth` levels at most,
    and a level whose best path is less likely than `floor` is the last.
    """

    name = "feature-tree"
    scope: Literal["row", "shared"] = "row"
    draws: Draws = "point"
    needs = Needs(final_hidden=True, feedback="accepted", prompt=True)

    def __init__(
        self,
        layer: FeatureModel,
        target: DecoderStack,
        *,
        nodes: int,
        depth: int,
        width: int,
        floor: float,
        cache_bytes: int,
    ) -> None:
        self.layer, self.target = layer, target
        self.nodes, self.depth, self.width, self.floor = nodes, depth, width, floor
        self._pool: CachePool = layer.pool(cache_bytes)
        self._rows: dict[int, _Row] = {}
        self._room = 1 + width * depth

    def max_nodes(self, budget: int) -> int:
        """The configured number of nodes, or the budget if that is less."""
        return min(self.nodes, budget)

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """Nothing is read before the first draft."""
        self._rows[row] = _Row(len(prompt) - 1)

    def close(self, row: int) -> None:
        """Give the row's cache back."""
        gone = self._rows.pop(row, None)
        if gone is not None and gone.cache is not None:
            gone.cache.release()

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Keep the true features of the prompt and of accepted tokens, to be read before the next draft."""
        for report in feedback:
            own = self._rows.get(report.row)
            if own is None or own.lost or report.final is None:
                continue
            if not report.nodes:
                own.missing -= len(report.tokens)
            elif own.missing > 0:  # a further choice is not told of its prompt
                own.lost = True
                continue
            own.waiting.append(report.final.clone())

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One tree per row, likeliest nodes first; rows grow level by level together."""
        drafts: list[Draft] = [EMPTY_DRAFT] * len(rows)
        live: list[int] = []
        tips: list[tuple[Tensor, Tensor]] = []  # (state, logits) the next level grows from
        for i, (row, budget) in enumerate(zip(rows, budgets, strict=True)):
            if min(budget, self.nodes) > 0:
                tip = self._read(row)
                if tip is not None:
                    live.append(i)
                    tips.append(tip)
        if not live:
            return drafts
        trees = [_Tree() for _ in live]
        beams = [[-1] for _ in live]
        for level in range(self.depth):
            grown = [
                self._grow(tree, beam, logits, budgets[i], rows[i].remaining)
                for tree, beam, (_, logits), i in zip(trees, beams, tips, live, strict=True)
            ]
            if level + 1 == self.depth or not any(grown):
                break
            tips, beams = self._level(rows, live, trees, beams, tips, grown, level)
        for tree, i in zip(trees, live, strict=True):
            drafts[i] = _best(tree, min(budgets[i], self.nodes))
        return drafts

    def _read(self, row: RowView) -> tuple[Tensor, Tensor] | None:
        """Read all waiting features; (state [1, ...], logits [1, draft vocab]) at the last token, None for a lost row."""
        own = self._rows[row.id]
        have = sum(len(part) for part in own.waiting)
        if own.lost or not have or (0 if own.cache is None else own.cache.length) + have != len(row.tokens) - 1:
            return None  # among others: the prompt is being read in this very pass
        if own.cache is None:
            try:
                own.cache = self._pool.open(len(row.tokens) + row.remaining + self._room)
            except MemoryFitError:
                own.lost = True
                own.waiting.clear()
                return None
        cache, features = own.cache, torch.cat(own.waiting)
        own.waiting.clear()
        tip = None
        with torch.inference_mode():
            for start in range(0, have, _CHUNK):
                part = features[start : start + _CHUNK]
                base = cache.length
                following = torch.tensor(row.tokens[base + 1 : base + 1 + len(part)])
                z = self.layer.inputs(part, self.target.embeddings(following))
                inputs = RowInput(following, torch.arange(base, base + len(part)), cache, embeds=z)
                states, done = self.layer.run_layer([inputs])
                cache.advance(len(part))
                tip = states[-1:], done.logits
        return tip

    def _grow(self, tree: _Tree, beam: list[int], logits: Tensor, budget: int, remaining: int) -> list[int]:
        """Add the best children of the beam's nodes; the new beam, empty when nothing likely enough is left."""
        values, ids = logits.topk(min(self.width, logits.shape[-1]))
        chances = (values - logits.logsumexp(-1, keepdim=True)).exp().tolist()
        kept = self.layer.kept[ids].tolist()
        first = len(tree.tokens)
        for parent, tokens, row in zip(beam, kept, chances, strict=True):
            above = tree.reach[parent] if parent >= 0 else 1.0
            for token, chance in zip(tokens, row, strict=True):
                tree.tokens.append(token)
                tree.parents.append(parent)
                tree.scores.append(chance)
                tree.reach.append(above * chance)
        new = sorted(range(first, len(tree.tokens)), key=lambda node: -tree.reach[node])[: self.width]
        return [node for node in new if tree.reach[node] >= self.floor]

    def _level(
        self,
        rows: Sequence[RowView],
        live: list[int],
        trees: list[_Tree],
        beams: list[list[int]],
        tips: list[tuple[Tensor, Tensor]],
        grown: list[list[int]],
        level: int,
    ) -> tuple[list[tuple[Tensor, Tensor]], list[list[int]]]:
        """One pass of the layer over the new beams of all rows; the tips and beams of the next level."""
        inputs: list[RowInput] = []
        with torch.inference_mode():
            for i, tree, beam, (states, _), new in zip(live, trees, beams, tips, grown, strict=True):
                cache = self._rows[rows[i].id].cache
                if cache is None or not new:
                    continue
                base, offset = cache.length, 0 if level == 0 else len(tree.seen)
                place = {node: j for j, node in enumerate(beam)}
                from_ = [place[tree.parents[node]] for node in new]
                tokens = torch.tensor([tree.tokens[node] for node in new])
                z = self.layer.inputs(self.layer.fed_back(states)[from_], self.target.embeddings(tokens))
                allowed = torch.zeros(len(new), base + offset + len(new), dtype=torch.bool)
                allowed[:, :base] = True
                for j, origin in enumerate(from_):
                    above = tree.seen[offset - len(beam) + origin] if level else []
                    own = [*above, offset + j]
                    tree.seen.append(own)
                    allowed[j, [base + slot for slot in own]] = True
                positions = torch.full((len(new),), base + level)
                inputs.append(RowInput(tokens, positions, cache, Explicit(allowed), "all", start=base + offset, embeds=z))
            if not inputs:
                return [], []
            states, done = self.layer.run_layer(inputs)
        out_tips: list[tuple[Tensor, Tensor]] = []
        at = 0
        for new in grown:
            block = slice(at, at + len(new))
            out_tips.append((states[block], done.logits[block]))
            at += len(new)
        return out_tips, grown

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is shared between rows."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


def _best(tree: _Tree, count: int) -> Draft:
    """The `count` nodes with the likeliest paths, in that order; ties go to the earlier node, so parents come first."""
    order = sorted(range(len(tree.tokens)), key=lambda node: (-tree.reach[node], node))[:count]
    place = {node: i for i, node in enumerate(order)}
    place[-1] = -1
    return Draft(
        tuple(tree.tokens[node] for node in order),
        tuple(place[tree.parents[node]] for node in order),
        scores=tuple(tree.scores[node] for node in order),
    )
