"""RSD: draft trees drawn without replacement from a small model, judged so that the target's distribution is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hasten.draft._assistant import open_assistant
from hasten.engine.contracts import EMPTY_DRAFT, NO_NEEDS, Draft, Draws, Feedback, MethodContext, Needs, RowView
from hasten.engine.sampling import choice_seed
from hasten.errors import out_of_range
from hasten.models.assistant import Assistant
from hasten.types import MethodCard

card = MethodCard(
    slug="rsd",
    title="Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement",
    paper="2402.14160",
    date="2024-02",
    plugs_into="draft",
    exactness="exact",
    claim="More accepted tokens than speculative sampling and i.i.d. draft trees at equal draft length (Llama-2, OPT).",
    no_help="Greedy decoding, where a tree of the likeliest tokens does as well; targets without a much smaller model.",
    knobs={
        "model": "the draft model: catalog name, directory, hub id or file",
        "tree": "c (every node gets the same number of children) or s (stochastic beam search)",
        "branching": "children by level for tree c, as in 3.2.1",
        "width": "beam width for tree s (1..16)",
        "length": "levels for tree s (1..16)",
        "temperature": "the draft's temperature (0 up to 2; -1: that of the request)",
        "cache_mb": "memory of the draft model's keys and values, in megabytes",
    },
    needs=("causal",),
)

_STREAM = 1 << 30  # seeds of the draft's noise, apart from those of acceptance and of plain sampling


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of RSD."""

    model: str = ""
    tree: str = "s"
    branching: str = "2.2.1"
    width: int = 3
    length: int = 3
    temperature: float = -1.0
    cache_mb: int = 256

    def __post_init__(self) -> None:
        if self.tree not in ("c", "s"):
            raise out_of_range("rsd.tree", self.tree, "c or s")
        self.levels()
        for name, top in (("width", 16), ("length", 16), ("cache_mb", 1 << 20)):
            if not 1 <= getattr(self, name) <= top:
                raise out_of_range(f"rsd.{name}", getattr(self, name), f"an integer in [1, {top}]")
        if self.temperature != -1.0 and not 0.0 <= self.temperature <= 2.0:
            raise out_of_range("rsd.temperature", self.temperature, "in [0, 2], or -1")

    def levels(self) -> tuple[int, ...]:
        """Children per node by level of tree c; raises ConfigError for anything but positive numbers joined by dots."""
        try:
            counts = tuple(int(count) for count in self.branching.split("."))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1 or max(counts) > 16 or len(counts) > 16:
            raise out_of_range("rsd.branching", self.branching, "numbers from 1 to 16 joined by dots, as in 3.2.1")
        return counts


@dataclass(slots=True)
class _Tree:
    """One row's draft under way."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    q: dict[int, Tensor] = field(default_factory=dict)
    beam: list[int] = field(default_factory=lambda: [-1])
    phi: list[float] = field(default_factory=lambda: [0.0])
    g: list[float] = field(default_factory=lambda: [0.0])
    expanded: dict[int, int] = field(default_factory=dict)  # node -> its number in the draft model

    def expand(self) -> tuple[list[int], list[int]]:
        """Tokens and parents of the beam, in the draft model's numbering, which the beam now joins."""
        tokens = [self.tokens[node] for node in self.beam]
        parents = [self.expanded.get(self.parents[node], -1) for node in self.beam]
        for node in self.beam:
            self.expanded[node] = len(self.expanded)
        return tokens, parents


def gumbel(size: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise float32 [size]."""
    return -torch.empty(size).exponential_(generator=generator).log()


def conditioned(phi: Tensor, noise: Tensor, g: float) -> Tensor:
    """Perturbed log-probabilities of children, conditioned on their largest being the parent's `g` (2402.14160, RSD-S).

    `phi` float32 [vocab] holds the children's log-probabilities along the path, -inf for impossible ones.
    """
    t = phi + noise
    best = int(t.argmax())
    u = g - t + torch.log1p(-torch.exp(t - t[best]))
    out = g - u.clamp(min=0) - torch.log1p(torch.exp(-u.abs()))
    out[best] = g
    return out.masked_fill(torch.isinf(phi), -torch.inf)


class Rsd:
    """Draws RSD-C or RSD-S trees from a draft model; a greedy request gets the likeliest children instead."""

    name = "rsd"
    needs: Needs = NO_NEEDS
    scope: Literal["row", "shared"] = "row"
    draws: Draws = "swor"

    def __init__(self, config: Config, context: MethodContext, assistant: Assistant | None = None) -> None:
        self.config, self.vocab = config, context.capabilities.vocab_size
        self.assistant = assistant or open_assistant("rsd", config.model, config.cache_mb, context)

    def shape(self, budget: int) -> tuple[int, ...]:
        """Nodes per beam node (c) or per level (s), level by level, within `budget`: decided before anything is drawn."""
        c = self.config
        wanted = c.levels() if c.tree == "c" else (c.width,) * c.length
        out: list[int] = []
        used, level = 0, 1
        for count in wanted:
            level = level * count if c.tree == "c" else count
            if used + level > budget:
                break
            used += level
            out.append(count)
        return tuple(out) if out or budget < 1 else (min(budget, wanted[0]),)

    def max_nodes(self, budget: int) -> int:
        """Nodes of the shape that fits the budget."""
        total, level = 0, 1
        for count in self.shape(budget):
            level = level * count if self.config.tree == "c" else count
            total += level
        return total

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """The draft model follows the row."""
        self.assistant.open(row)

    def close(self, row: int) -> None:
        """The draft model forgets the row."""
        self.assistant.close(row)

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Nothing to learn: the draft model reads the committed text before the next draft."""

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One tree per row, with the distribution every parent's children were drawn from; rows grow level by level."""
        drafts: list[Draft] = [EMPTY_DRAFT] * len(rows)
        shapes = [self.shape(budget) for budget in budgets]
        asked = [i for i, shape in enumerate(shapes) if shape]
        if not asked:
            return drafts
        deepest, most = max(map(len, shapes)), max(self.max_nodes(budget) for budget in budgets)
        logits = dict(zip(asked, self.assistant.begin([rows[i] for i in asked], deepest, most), strict=True))
        trees = {i: _Tree() for i in asked if logits[i] is not None}
        tips: dict[int, Tensor] = {i: one[None] for i, one in logits.items() if one is not None}
        for level in range(deepest):
            for i in tips:
                self._draw(trees[i], tips[i], rows[i], shapes[i][level], level)
            growing = [i for i in tips if level + 1 < len(shapes[i])]
            if not growing:
                break
            grown = self.assistant.grow([(rows[i].id, *trees[i].expand()) for i in growing])
            tips = dict(zip(growing, grown, strict=True))
        for i, tree in trees.items():
            drafts[i] = Draft(tuple(tree.tokens), tuple(tree.parents), tree.q or None)
        return drafts

    def _draw(self, tree: _Tree, logits: Tensor, row: RowView, count: int, level: int) -> None:
        """Children of the beam's nodes, from logits [beam, vocab]: `count` for each (c), or in all (s)."""
        temperature = row.temperature if self.config.temperature < 0 else self.config.temperature
        sampled = row.temperature > 0 and temperature > 0
        log_q = (logits.float() / temperature if sampled else logits.float()).log_softmax(-1)
        found: list[tuple[float, float, int, int]] = []  # (g, phi, token, parent), in draw order per parent
        for j, parent in enumerate(tree.beam):
            phi = log_q[j] + (tree.phi[j] if self.config.tree == "s" else 0.0)
            if sampled:
                tree.q[parent] = log_q[j].exp()
                seed = choice_seed(row.seed, _STREAM + (len(row.tokens) + level) * 4096 + parent + 1)
                noise = gumbel(len(phi), torch.Generator().manual_seed(seed))
                g = phi + noise if self.config.tree == "c" else conditioned(phi, noise, tree.g[j])
            else:
                g = phi
            best = g.topk(min(count, self.vocab))
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if value > -torch.inf:  # fewer tokens than asked for are possible
                    found.append((value, float(phi[token]), token, parent))
        if self.config.tree == "s":
            found = sorted(found, key=lambda child: -child[0])[:count]
        first = len(tree.tokens)
        for _, _, token, parent in found:
            tree.tokens.append(token)
            tree.parents.append(parent)
        tree.beam = list(range(first, len(tree.tokens)))
        tree.g, tree.phi = [child[0] for child in found], [child[1] for child in found]
        for parent in [parent for parent in tree.q if parent not in tree.parents]:
            del tree.q[parent]

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is learnt."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


method = Rsd
