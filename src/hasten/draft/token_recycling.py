"""Token recycling: draft a tree from the model's own runner-up tokens, remembered for every token it has seen."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from hasten.engine.contracts import EMPTY_DRAFT, Draft, Draws, Feedback, MethodContext, Needs, RowView
from hasten.errors import ConfigError, out_of_range
from hasten.types import MethodCard

card = MethodCard(
    slug="token-recycling",
    title="Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    paper="2408.08696",
    date="2024-08",
    plugs_into="draft",
    exactness="exact",
    claim="About 2.1x on Spec-Bench (Vicuna-7B, one A100-class GPU) with a table of 2 MB and no training.",
    no_help="Where a pass over a few more tokens costs as many times more: large batches, slow processors at float32.",
    knobs={
        "nodes": "most nodes of a draft (1..80); the request's budget caps it further",
        "k": "runner-up tokens kept per token (1..32), at least the tree's widest rank + 1",
        "tree": "best (the likeliest nodes), 2.2.2 (the published tree), or paths of ranks joined by '/', as in 0/1/0.0",
        "learn_prompt": "fill the table from the prompt too (true or false; the paper: false)",
        "adapt": "in a given tree, choose the nodes by how often each rank was right (true), or in its order (false)",
        "fill": "what an unknown entry drafts: skip (nothing) or zero (token 0, the published code)",
        "table": "shared by all requests of the model, or one per row",
    },
    needs=("causal",),
)

# Children of each node, level by level in breadth-first order (the official "2.2.2" tree; spec section 3).
_PUBLISHED = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)
_PRIOR = (0.5, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01)  # acceptance by rank before anything was seen
_PRIOR_WEIGHT = 20.0
_FAINT = 0.01  # nodes less likely than this are not drafted
_REORDER = 32  # cycles between two choices of the nodes


def paths(tree: str) -> tuple[tuple[int, ...], ...]:
    """The rank paths of a tree, parents first; raises ConfigError naming a path that is malformed or has no parent."""
    if tree == "2.2.2":
        found: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for counts in _PUBLISHED:
            level = [(*path, rank) for path, count in zip(level, counts, strict=True) for rank in range(count)]
            found += level
        return tuple(found)
    found = []
    for text in tree.split("/"):
        try:
            path = tuple(int(rank) for rank in text.split("."))
        except ValueError:
            raise out_of_range("token-recycling.tree", text, "ranks joined by dots, as in 0.1") from None
        if min(path) < 0:
            raise out_of_range("token-recycling.tree", text, "ranks of 0 or more")
        if path in found:
            raise out_of_range("token-recycling.tree", text, "every path once")
        if len(path) > 1 and path[:-1] not in found:
            raise out_of_range("token-recycling.tree", text, "every parent listed before its children")
        found.append(path)
    if len(found) > 80:
        raise out_of_range("token-recycling.tree", f"{len(found)} paths", "at most 80")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of token recycling; the paper's are nodes 80, tree 2.2.2, learn_prompt false, adapt false, fill zero."""

    nodes: int = 24
    k: int = 8
    tree: str = "best"
    learn_prompt: bool = False
    adapt: bool = True
    fill: str = "skip"
    table: str = "shared"

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 80:
            raise out_of_range("token-recycling.nodes", self.nodes, "an integer in [1, 80]")
        widest = 1 if self.tree == "best" else 1 + max(max(path) for path in paths(self.tree))
        if not widest <= self.k <= 32:
            raise out_of_range("token-recycling.k", self.k, f"an integer in [{widest}, 32] for this tree")
        if self.fill not in ("skip", "zero"):
            raise out_of_range("token-recycling.fill", self.fill, "skip or zero")
        if self.table not in ("shared", "row"):
            raise out_of_range("token-recycling.table", self.table, "shared or row")


@dataclass(slots=True)
class _Drafted:
    """The shape of a row's last draft: parent and rank of every node."""

    parents: tuple[int, ...] = ()
    ranks: list[int] = field(default_factory=list)


class TokenRecycling:
    """A table [V, k] of the best next tokens last seen after each token, their chances, and trees read off it.

    Memory: V * k * 6 bytes, once per model or once per row. Ids of -1 are unknown. A chance is the softmax over the k
    logits that were kept: a little too high, which is all the same for an order, and the engine corrects it.
    """

    name = "token-recycling"
    draws: Draws = "point"

    def __init__(self, config: Config, context: MethodContext) -> None:
        vocab = context.capabilities.vocab_size
        if config.k > vocab:
            raise out_of_range("token-recycling.k", config.k, f"at most the vocabulary of {vocab}")
        self.config, self.vocab, self.model = config, vocab, context.model
        self.needs = Needs(topk=config.k, feedback="all", prompt=config.learn_prompt, prompt_logits=config.learn_prompt)
        self.scope: Literal["row", "shared"] = "shared" if config.table == "shared" else "row"
        self._paths = () if config.tree == "best" else paths(config.tree)
        self._empty = 0 if config.fill == "zero" else -1
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self._shared = self._new_table()
        self._last: dict[int, _Drafted] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything learnt: the shared table and the ranks' acceptance."""
        self._shared = self._new_table()
        self._tries = torch.zeros(self.config.k, dtype=torch.float64)
        self._hits = torch.zeros(self.config.k, dtype=torch.float64)
        self._cycles = 0
        self._order = self._benefit_order()

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(t.numel() * t.element_size() for pair in (self._shared, *self._tables.values()) for t in pair)

    def max_nodes(self, budget: int) -> int:
        """The configured number of nodes, or the budget if that is less."""
        return min(self.config.nodes, len(self._paths) or budget, budget)

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """Give the row its own table where rows do not share one."""
        if self.scope == "row":
            self._tables[row] = self._new_table()

    def close(self, row: int) -> None:
        """Forget the row; a shared table stays."""
        self._tables.pop(row, None)
        self._last.pop(row, None)

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One tree per row: the most useful paths first, without what the table does not know."""
        draft = self._given if self._paths else self._likeliest
        return [draft(row, self.max_nodes(budget)) for row, budget in zip(rows, budgets, strict=True)]

    def _likeliest(self, row: RowView, budget: int) -> Draft:
        """The nodes with the highest product of remembered chances, best first."""
        ids, chances = (kept.numpy() for kept in self._tables.get(row.id, self._shared))
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        read: dict[int, list[tuple[float, int]]] = {}
        heap: list[tuple[float, int, int, float]] = []  # (-chance of the path, parent, token, chance given the parent)

        def expand(token: int, node: int, reach: float) -> None:
            if token not in read:
                entries = zip(chances[token].tolist(), ids[token].tolist(), strict=True)
                read[token] = [(chance, child) for chance, child in entries if child >= 0]
            for chance, child in read[token]:
                if reach * chance >= _FAINT:
                    heapq.heappush(heap, (-reach * chance, node, child, chance))

        expand(row.tokens[-1], -1, 1.0)
        while heap and len(tokens) < budget:
            reach, parent, token, chance = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            scores.append(chance)
            expand(token, len(tokens) - 1, -reach)
        return Draft(tuple(tokens), tuple(parents), scores=tuple(scores)) if tokens else EMPTY_DRAFT

    def _given(self, row: RowView, budget: int) -> Draft:
        """The nodes of the configured tree, the most useful paths first."""
        table, _ = self._tables.get(row.id, self._shared)
        tokens: list[int] = []
        parents: list[int] = []
        ranks: list[int] = []
        place: dict[tuple[int, ...], int] = {(): -1}
        children: dict[int, list[int]] = {}
        for path in self._order:
            if len(tokens) >= budget:
                break
            parent = place.get(path[:-1])
            if parent is None:
                continue
            token = row.tokens[-1] if parent < 0 else tokens[parent]
            if token not in children:
                children[token] = table[token].tolist()
            child = children[token][path[-1]]
            if child < 0:
                continue
            place[path] = len(tokens)
            tokens.append(child)
            parents.append(parent)
            ranks.append(path[-1])
        self._last[row.id] = _Drafted(tuple(parents), ranks)
        rates = self._rates()
        scores = tuple(rates[rank] for rank in ranks)
        return Draft(tuple(tokens), tuple(parents), scores=scores) if tokens else EMPTY_DRAFT

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Remember the ranking at every node: refused nodes first, so that the accepted path has the last word."""
        for report in sorted(feedback, key=lambda report: report.row):
            if report.topk is None or report.topk_logits is None:
                continue
            # after every pass, for a few numbers: numpy takes a fraction of torch's time for them
            table, chances = (kept.numpy() for kept in self._tables.get(report.row, self._shared))
            best, logits = report.topk.numpy(), report.topk_logits.float().numpy()
            shares = np.exp(logits - logits.max(1, keepdims=True))
            sure = (shares / shares.sum(1, keepdims=True)).astype(np.float16)
            if len(report.tokens) == 1:
                table[report.tokens[0]], chances[report.tokens[0]] = best[0], sure[0]
                continue
            accepted = [0, *(node + 1 for node in report.path)] if report.nodes else range(len(report.tokens))
            refused = sorted(set(range(len(report.tokens))) - set(accepted))
            last: dict[int, int] = {}
            for i in (*refused, *accepted):
                last[report.tokens[i]] = i
            at, of = list(last), list(last.values())
            table[at], chances[at] = best[of], sure[of]
            if report.nodes:
                self._count(report)
        if self.config.adapt and self._paths and self._cycles >= _REORDER:
            self._cycles, self._order = 0, self._benefit_order()

    def _count(self, report: Feedback) -> None:
        """Which ranks were tried below an accepted node, and which of them was right."""
        drafted = self._last.pop(report.row, None)
        if drafted is None or not drafted.ranks or len(drafted.ranks) != len(report.nodes) - 1:
            return
        self._cycles += 1
        accepted = {-1, *report.path}
        for node, (parent, rank) in enumerate(zip(drafted.parents, drafted.ranks, strict=True)):
            if parent in accepted:
                self._tries[rank] += 1
                self._hits[rank] += node in accepted

    def _benefit_order(self) -> tuple[tuple[int, ...], ...]:
        """The paths by estimated chance of acceptance, parents first; the tree's own order without `adapt`."""
        if not self.config.adapt or not self._paths:
            return self._paths
        rates = self._rates()
        index = {path: i for i, path in enumerate(self._paths)}
        below: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for path in self._paths:
            below.setdefault(path[:-1], []).append(path)
        heap = [(-rates[path[-1]], index[path], path) for path in below[()]]
        heapq.heapify(heap)
        order = []
        while heap:
            chance, _, path = heapq.heappop(heap)
            order.append(path)
            for child in below.get(path, ()):
                heapq.heappush(heap, (chance * rates[child[-1]], index[child], child))
        return tuple(order)

    def _rates(self) -> list[float]:
        """The chance of each rank given that its parent is accepted."""
        prior = torch.tensor([_PRIOR[min(rank, len(_PRIOR) - 1)] for rank in range(self.config.k)], dtype=torch.float64)
        return cast("list[float]", ((self._hits + prior * _PRIOR_WEIGHT) / (self._tries + _PRIOR_WEIGHT)).tolist())

    def _new_table(self) -> tuple[Tensor, Tensor]:
        """Unknown ids int32 [V, k], and their chances float16 [V, k]."""
        shape = (self.vocab, self.config.k)
        return torch.full(shape, self._empty, dtype=torch.int32), torch.full(shape, _FAINT, dtype=torch.float16)

    def state_dict(self) -> dict[str, Tensor]:
        """The shared table int32 [V, k] and its chances, the ranks' counts float64 [k], and the model's name as bytes."""
        name = torch.tensor(list(self.model.encode()), dtype=torch.uint8)
        table, chances = self._shared
        return {"table": table, "chances": chances, "tries": self._tries, "hits": self._hits, "model": name}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; raises ConfigError for another model, vocabulary or k, or ids outside it."""
        missing = {"table", "chances", "tries", "hits", "model"} - set(state)
        if missing:
            raise ConfigError(f"the saved table lacks {', '.join(sorted(missing))}", field="state")
        model = bytes(state["model"].tolist()).decode(errors="replace")
        if model != self.model:
            raise ConfigError(f"the saved table belongs to model {model!r}, not {self.model!r}", field="state.model")
        table = state["table"]
        if tuple(table.shape) != (self.vocab, self.config.k):
            shape = (self.vocab, self.config.k)
            raise out_of_range("state.table", f"shape {tuple(table.shape)}", f"[vocabulary, k] = {shape}")
        if table.dtype != torch.int32 or int(table.min()) < -1 or int(table.max()) >= self.vocab:
            raise out_of_range("state.table", table.dtype, f"int32 ids from -1 to {self.vocab - 1}")
        chances = state["chances"]
        if (
            chances.dtype != torch.float16
            or chances.shape != table.shape
            or not bool(((chances >= 0) & (chances <= 1)).all())
        ):
            raise out_of_range("state.chances", chances.dtype, "float16 in [0, 1], one per id")
        for name in ("tries", "hits"):
            if tuple(state[name].shape) != (self.config.k,) or not bool((state[name] >= 0).all()):
                raise out_of_range(f"state.{name}", f"shape {tuple(state[name].shape)}", f"[{self.config.k}] counts")
        self._shared = (table.clone(), chances.clone())
        self._tries, self._hits = state["tries"].double().clone(), state["hits"].double().clone()
        self._order = self._benefit_order()


method = TokenRecycling
