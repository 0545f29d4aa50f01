"""ADED: a table of three-token statistics that adapts to the text, searched by a small Monte-Carlo tree."""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hasten.draft._trigrams import Trigrams, fingerprint
from hasten.engine.contracts import EMPTY_DRAFT, NO_NEEDS, Draft, Draws, Feedback, MethodContext, Needs, RowView
from hasten.errors import ConfigError, out_of_range
from hasten.models.feature import weights_path
from hasten.types import MethodCard

card = MethodCard(
    slug="aded",
    title="Adaptive Draft-Verification for Efficient LLM Decoding",
    paper="2407.12021",
    date="2024-07",
    plugs_into="draft",
    exactness="exact",
    claim="Up to 2.5x on MT-Bench, Alpaca and HumanEval (Vicuna, CodeLlama); 1.9x with a corpus of 253 MB.",
    no_help="Text unlike the corpus the table was counted on that does not repeat itself either.",
    knobs={
        "table": "file of counted statistics, auto (built by `hasten train aded`, or shipped), or none",
        "nodes": "most nodes of a draft (1..64); the measured budget verifies what pays",
        "iterations": "walks of the tree search (1..1000; the published code: 150)",
        "depth": "tokens searched ahead (1..8), one more is added greedily",
        "keep": "most visited branches kept (1..64)",
        "step": "added to a three-token statistic each time it is seen among the recent tokens",
        "cap": "largest value a statistic may reach",
        "window": "recent tokens that adapt the table (3..256)",
        "learn_prompt": "adapt to the whole prompt once (true or false; the paper: false)",
        "max_keys": "adapted pairs remembered, the least recently used go first",
        "seed": "seed of the search's random walks",
    },
    needs=("causal",),
)

_C1, _C2 = 32.0, 8.0  # exploration constants of the published code
_SPARE = 8  # followers of a pair that adaptation may add beyond those of the table


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of ADED; the paper's are nodes 64, iterations 150, learn_prompt false."""

    table: str = "auto"
    nodes: int = 24
    iterations: int = 40
    depth: int = 3
    keep: int = 24
    step: float = 0.04
    cap: float = 3.0
    window: int = 16
    learn_prompt: bool = True
    max_keys: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = (("nodes", 1, 64), ("iterations", 1, 1000), ("depth", 1, 8), ("keep", 1, 64), ("window", 3, 256),
                  ("max_keys", 1, 1 << 30))  # fmt: skip
        for name, low, high in bounds:
            if not low <= getattr(self, name) <= high:
                raise out_of_range(f"aded.{name}", getattr(self, name), f"an integer in [{low}, {high}]")
        if not 0.0 <= self.step <= self.cap < math.inf:
            raise out_of_range("aded.step", self.step, f"in [0, cap = {self.cap}]")


@dataclass(slots=True)
class _Node:
    """One node of the search: the pair of tokens it ends in, the value of the edge to it, visits and summed scores."""

    pair: tuple[int, int]
    prior: float
    above: int
    visits: int = 0
    total: float = 0.0
    below: list[int] | None = None


@dataclass(slots=True)
class _Trie:
    """Branches merged by token, each node with its chance given its parent."""

    below: dict[int, _Trie] = field(default_factory=dict)
    chance: float = 1.0


class Aded:
    """Drafts the branches that a PUCT search over P(c | a, b) visits most; the statistics follow the recent tokens.

    The counted table is read-only; what is added to it is shared by all requests of the model.
    """

    name = "aded"
    needs: Needs = NO_NEEDS
    scope: Literal["row", "shared"] = "shared"
    draws: Draws = "point"

    def __init__(self, config: Config, context: MethodContext, table: Trigrams | None = None) -> None:
        self.config, self.vocab = config, context.capabilities.vocab_size
        self._vocabulary = fingerprint(context.tokenizer, self.vocab)
        self.table = table
        if table is None and config.table != "none":
            try:
                path = weights_path("aded", context.backbone, context.model, "" if config.table == "auto" else config.table)
            except ConfigError:
                path = None  # nothing was counted for this model: it starts from the text alone
            if path is not None:
                self.table = Trigrams.load(path, self._vocabulary, self.vocab)
        self._added: OrderedDict[tuple[int, int], dict[int, float]] = OrderedDict()
        self._known: dict[tuple[int, int], list[tuple[int, float]]] = {}
        self._read: dict[int, int] = {}

    def max_nodes(self, budget: int) -> int:
        """The configured number of nodes, or the budget if that is less."""
        return min(self.config.nodes, budget)

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """Adapt to the prompt, if that is wanted."""
        if self.config.learn_prompt:
            self.adapt(prompt)

    def close(self, row: int) -> None:
        """What was learnt stays."""

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Nothing to learn from the model: the next search reads the committed tokens."""

    def adapt(self, tokens: Sequence[int]) -> None:
        """Raise the value of every three tokens in a row, up to the cap (spec section 3)."""
        c = self.config
        for a, b, following in zip(tokens, tokens[1:], tokens[2:], strict=False):
            pair = (a, b)
            own = self._added.get(pair)
            if own is None:
                own = self._added[pair] = {}
                if len(self._added) > c.max_keys:
                    gone, _ = self._added.popitem(last=False)
                    self._known.pop(gone, None)
            else:
                self._added.move_to_end(pair)
            base = dict(self._counted(pair)).get(following, 0.0)
            own[following] = min(c.cap - base, own.get(following, 0.0) + c.step)
            if len(own) > 12 + _SPARE:
                del own[min(own, key=lambda token: own[token])]
            self._known.pop(pair, None)

    def _counted(self, pair: tuple[int, int]) -> list[tuple[int, float]]:
        return [] if self.table is None else self.table.followers(*pair)

    def followers(self, pair: tuple[int, int]) -> list[tuple[int, float]]:
        """(token, value) of what may follow a pair, counted and added, highest value first."""
        known = self._known.get(pair)
        if known is None:
            values = dict(self._counted(pair))
            for token, extra in self._added.get(pair, {}).items():
                values[token] = values.get(token, 0.0) + extra
            known = sorted(
                ((token, value) for token, value in values.items() if value > 0), key=lambda entry: (-entry[1], entry[0])
            )
            if len(self._known) > self.config.max_keys:
                self._known.clear()
            self._known[pair] = known
        return known

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One tree per row, likeliest paths first; empty where nothing is known of the last two tokens."""
        drafts = []
        for row, budget in zip(rows, budgets, strict=True):
            recent = row.tokens[-self.config.window :]
            self.adapt(recent)
            if len(recent) < 2 or budget < 1:
                drafts.append(EMPTY_DRAFT)
                continue
            nodes = self.search((recent[-2], recent[-1]), len(row.tokens))
            drafts.append(self._draft(nodes, self.max_nodes(budget)))
        return drafts

    def search(self, pair: tuple[int, int], position: int) -> list[_Node]:
        """The PUCT tree below a pair of tokens; `position` and the seed fix its random walks."""
        c = self.config
        r = random.Random(c.seed * 1_000_003 + position)  # noqa: S311 - a search, not a secret
        nodes = [_Node(pair, 0.0, -1)]
        if not self.followers(pair):
            return nodes
        for _ in range(c.iterations):
            at, length, score = 0, 0, 1.0
            while length < c.depth:
                node = nodes[at]
                if node.below is None:
                    first = len(nodes)
                    for token, value in self.followers(node.pair):
                        nodes.append(_Node((node.pair[1], token), value, at))
                    node.below = list(range(first, len(nodes)))
                    if node.below:
                        at, length = node.below[-1], length + 1
                        score += nodes[at].prior
                    break
                if not node.below:
                    break
                at, length = self._best(nodes, node), length + 1
                score += nodes[at].prior
            ends = nodes[at].pair
            while length < c.depth:
                options = self.followers(ends)
                if not options:
                    break
                token, value = r.choices(options, weights=[value for _, value in options])[0]
                ends, length, score = (ends[1], token), length + 1, score + value
            while at >= 0:
                nodes[at].visits += 1
                nodes[at].total += score
                at = nodes[at].above
        return nodes

    @staticmethod
    def _best(nodes: Sequence[_Node], node: _Node) -> int:
        """The child with the highest upper confidence bound; one that was never visited comes first."""
        scale = math.sqrt(node.visits) * (_C1 + math.log((node.visits + _C2 + 1) / _C2))
        best, chosen = -math.inf, -1
        for child in node.below or ():
            one = nodes[child]
            bound = math.inf if not one.visits else one.total / one.visits + one.prior * scale / (1 + one.visits)
            if bound > best:
                best, chosen = bound, child
        return chosen

    def _draft(self, nodes: Sequence[_Node], budget: int) -> Draft:
        """The `keep` most visited branches, each with one greedy token more, merged; the likeliest nodes of that tree."""
        order = sorted(range(1, len(nodes)), key=lambda i: (-nodes[i].visits, i))[: self.config.keep]
        root = _Trie()
        for i in order:
            if not nodes[i].visits:
                break
            branch: list[int] = []
            at = i
            while at > 0:
                branch.append(nodes[at].pair[1])
                at = nodes[at].above
            branch.reverse()
            tail = self.followers(nodes[i].pair)
            self._insert(root, nodes[0].pair, [*branch, tail[0][0]] if tail else branch)
        heap: list[tuple[float, int, int, int, _Trie]] = []
        made = 0
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        open_ = [(1.0, -1, root)]
        while len(tokens) < budget:
            for reach, place, trie in open_:
                for token, child in trie.below.items():
                    made += 1
                    heapq.heappush(heap, (-reach * child.chance, made, token, place, child))
            if not heap:
                break
            reach, _, token, parent, trie = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            scores.append(trie.chance)
            open_ = [(-reach, len(tokens) - 1, trie)]
        return Draft(tuple(tokens), tuple(parents), scores=tuple(scores)) if tokens else EMPTY_DRAFT

    def _insert(self, trie: _Trie, pair: tuple[int, int], branch: Sequence[int]) -> None:
        for token in branch:
            child = trie.below.get(token)
            if child is None:
                options = self.followers(pair)
                value = dict(options)[token]
                child = trie.below[token] = _Trie(chance=min(1.0, value / sum(v for _, v in options)))
            trie, pair = child, (pair[1], token)

    def state_dict(self) -> dict[str, Tensor]:
        """What adaptation added: `pairs` int64 [N, 3] (a, b, c) and `values` float32 [N], and the vocabulary's hash."""
        entries = [(a, b, c, value) for (a, b), own in self._added.items() for c, value in own.items()]
        name = torch.tensor(list(self._vocabulary.encode()), dtype=torch.uint8)
        pairs = torch.tensor([entry[:3] for entry in entries], dtype=torch.int64).reshape(-1, 3)
        return {"pairs": pairs, "values": torch.tensor([entry[3] for entry in entries]), "vocabulary": name}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; raises ConfigError for another vocabulary or ids and values outside theirs."""
        missing = {"pairs", "values", "vocabulary"} - set(state)
        if missing:
            raise ConfigError(f"the saved statistics lack {', '.join(sorted(missing))}", field="state")
        pairs, values = state["pairs"], state["values"]
        if bytes(state["vocabulary"].tolist()).decode(errors="replace") != self._vocabulary:
            raise ConfigError("the saved statistics belong to another vocabulary", field="state.vocabulary")
        if pairs.ndim != 2 or pairs.shape[1:] != (3,) or len(pairs) != len(values):
            raise out_of_range("state.pairs", tuple(pairs.shape), "[N, 3] with N values")
        if len(pairs) and (int(pairs.min()) < 0 or int(pairs.max()) >= self.vocab or not bool((values >= 0).all())):
            raise out_of_range("state.pairs", "ids or values", f"ids below {self.vocab} and values of 0 or more")
        self._added.clear()
        self._known.clear()
        for (a, b, c), value in zip(pairs.tolist(), values.tolist(), strict=True):
            self._added.setdefault((a, b), {})[c] = value


method = Aded
