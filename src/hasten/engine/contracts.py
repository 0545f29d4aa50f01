"""Who calls what: the contracts between the engine, the models and the methods.

    Backbone       run(rows, needs) -> Pass              models/*; the torch stack is the oracle and carries every hook,
                                                         other backbones serve the requests whose needs they meet
    Drafter        open / propose / observe / close      draft/*; proposes nodes, never touches the target's cache
    LogitsRule     open / apply / advance / forced       logits/*; grammars, contrastive rules, per row and stateful
    canvas parts, TokenReducer, Compressor               engine/parts.py

A part says what it needs and what it cannot be combined with; LLM refuses at construction, naming both sides.
Words (root, node, law, feedback, canvas, commit) are those of the design. Tensors handed out are row-local views: they
are left alone after the call, so keep a clone if you keep anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from hasten.engine.cache import CachePool, Past, RowCache
from hasten.engine.masks import CAUSAL, Visibility

ModelKind = Literal["causal", "masked", "encoder-decoder"]
CacheKind = Literal["kv", "kv_sparse", "recurrent", "cross"]
Draws = Literal["point", "iid", "swor"]
Law = Literal["greedy", "match", "rejection", "typical", "trust"]


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model offers, declared once; ids live here and nowhere else.

    `visibilities` names the attention rules it can honour; `cache_exact` those under which its KV cache is exact.
    `logit_shift` is 1 when the hidden state at p-1 predicts token p of a canvas (Dream), else 0. `mask_id` is None for
    models without a mask token; `block` is the block size of block-causal ones, `eot_id` ends a chat turn. `truncate` is
    False for caches that can only snapshot and restore (recurrent layers). `self_conditioning`: a pass over a canvas of
    `block` positions is told the logits of the one before, for models whose open positions hold random ids. `canvas` is the
    number of slots of an answer whose length nobody gave.
    """

    kind: ModelKind
    vocab_size: int
    max_len: int
    layers: int
    hidden: int
    visibilities: frozenset[str] = frozenset({"causal"})
    cache_exact: frozenset[str] = frozenset({"causal", "tree"})
    cache_kinds: tuple[CacheKind, ...] = ("kv",)
    truncate: bool = True
    hidden_states: bool = False
    embeds: bool = False
    hooks: bool = False
    self_conditioning: bool = False
    logit_shift: int = 0
    mask_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    eot_id: int | None = None
    block: int | None = None
    canvas: int | None = None

    def has(self, need: str) -> bool:
        """Whether the named need is met: a model kind, a flag, a visibility, or `mask_id`."""
        if need in ("causal", "masked", "encoder-decoder"):
            return self.kind == need
        if need in ("hidden_states", "embeds", "hooks", "self_conditioning", "truncate"):
            return bool(getattr(self, need))
        if need == "mask_id":
            return self.mask_id is not None
        return need in self.visibilities


@dataclass(frozen=True, slots=True, eq=False)
class Pseudo:
    """Placeholder queries behind real ones: len(`layers`) of them behind each anchor, never seen by a real query.

    Placeholder i (counted from 0) of the anchor v stands at position pos(v) + i + 1 and runs from layer `layers[i]` on
    (0-based and never falling; the number of layers = only the final norm). It sees what v sees, v, and the placeholders of
    v before it. `enter(i, states [A, hidden]) -> [A, hidden]` makes its state from the anchors' states entering that layer.
    `adapt(layer, where, x [M, hidden]) -> Tensor | None` is added for placeholders alone to the output of "qkv" (before
    norms and rotation) or "ffn"; x is that part's normed input. `anchors`: a row's last query, its root and last query
    ("ends"), or its root and all nodes; rows that are still reading a prompt have none.
    """

    layers: tuple[int, ...]
    enter: Callable[[int, Tensor], Tensor]
    adapt: Callable[[int, str, Tensor], Tensor | None] | None = None
    anchors: Literal["last", "ends", "all"] = "all"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a part wants back from a target pass.

    `hidden`: hidden states entering these layers (0-based; `layers` = after the last). `final_hidden`: after the final
    norm. `topk`: ids and logits of the k best tokens at every verified node. `logits`: raw logits of every node.
    `embeds`: fused input embeddings. `feedback`: report accepted nodes only, or all, or nothing. `prompt`: also report the
    prompt as it is read, and with `prompt_logits` the asked topk or logits there too, which costs the output layer over all
    of it. `pseudo`: placeholder queries that run beside a row's own for one pass; see Pseudo.
    """

    hidden: tuple[int, ...] = ()
    final_hidden: bool = False
    topk: int = 0
    logits: bool = False
    embeds: bool = False
    feedback: Literal["none", "accepted", "all"] = "accepted"
    prompt: bool = False
    prompt_logits: bool = False
    pseudo: Pseudo | None = None

    def union(self, other: Needs) -> Needs:
        """The least that satisfies both."""
        return Needs(
            hidden=tuple(sorted({*self.hidden, *other.hidden})),
            final_hidden=self.final_hidden or other.final_hidden,
            topk=max(self.topk, other.topk),
            logits=self.logits or other.logits,
            embeds=self.embeds or other.embeds,
            feedback=max(self.feedback, other.feedback, key=("none", "accepted", "all").index),
            prompt=self.prompt or other.prompt,
            prompt_logits=self.prompt_logits or other.prompt_logits,
            pseudo=self.pseudo or other.pseudo,
        )


NO_NEEDS = Needs(feedback="none")


@dataclass(slots=True)
class LayerHooks:
    """Optional side doors into one row's layer loop; an absent hook costs nothing.

    before_layer(i, h [T, hidden], pos [T], types [T] | None) -> (h', pos', types', index): may shorten or lengthen the
        sequence from layer i on; `index` [T'] maps new rows to old ones (-1 for inserted ones).
    mixer(i, x [T, hidden]) -> [T, hidden] | None: replaces attention of layer i (None = ordinary attention).
    after_attention(i, h, types, memory) -> h: e.g. gated cross-attention before the feed-forward part.
    ffn(i, x, types) -> [T, hidden] | None: replaces the feed-forward part (None = ordinary).
    parallel(i, where, x) -> [T, hidden] | None: added to the output of `where` in "attention", "ffn", "layer".
    kv_write(i, k [kv_heads, T, head_dim], v) -> bool [T] | None: which of the pass's keys stay stored after it.
    """

    before_layer: Callable[[int, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None, Tensor]] | None = None
    mixer: Callable[[int, Tensor], Tensor | None] | None = None
    after_attention: Callable[[int, Tensor, Tensor | None, Tensor | None], Tensor] | None = None
    ffn: Callable[[int, Tensor, Tensor | None], Tensor | None] | None = None
    parallel: Callable[[int, str, Tensor], Tensor | None] | None = None
    kv_write: Callable[[int, Tensor, Tensor], Tensor | None] | None = None
    types: Tensor | None = None
    memory: Tensor | None = None


@dataclass(slots=True)
class RowInput:
    """One row's share of a pass: T queries over its own cache.

    `tokens` int64 [T] (or `embeds` [T, hidden] instead), `positions` int64 [T] for the rotary embedding. Keys and values
    are written to slots `start`..`start + T - 1` (`start` None = after the committed ones) and the committed length is
    left alone: the engine commits with `cache.advance / gather`, so an uncommitted pass leaves no trace. `logits` names
    the queries whose logits are wanted: "none", "last", "all" or indices. `cache` None = no past and nothing stored.
    `pseudo` adds placeholders behind the queries `anchors`; their keys take the slots after, for this pass only.
    `before` [block, vocab]: what the pass before thought of the canvas at the end of `tokens`, None in the first one.
    """

    tokens: Tensor
    positions: Tensor
    cache: RowCache | None = None
    visibility: Visibility = CAUSAL
    logits: Literal["none", "last", "all"] | tuple[int, ...] = "last"
    start: int | None = None
    embeds: Tensor | None = None
    hooks: LayerHooks | None = None
    pseudo: Pseudo | None = None
    anchors: tuple[int, ...] = ()
    before: Tensor | None = None

    @property
    def queries(self) -> int:
        """T, the number of query positions."""
        return self.positions.shape[0]  # len() of a tensor takes a detour through Python

    def wanted(self) -> range | tuple[int, ...]:
        """Indices of the queries whose logits are wanted."""
        if isinstance(self.logits, tuple):
            return self.logits
        t = self.queries
        return range(t) if self.logits == "all" else range(t - 1, t) if self.logits == "last" else range(0)


@dataclass(slots=True)
class Pass:
    """What one target pass over R rows returns.

    `logits` float32 [sum of wanted, vocab]: row r's block starts at `logit_starts[r]`. `spans[r]` is row r's (start, end)
    in `hidden[layer]` and `final_hidden` [N, hidden] (N = all queries), present as asked. A backbone that has them at hand
    also gives the arg-max `best` of every logit row (-1 where a logit is not finite), its log-probability `best_logprob`,
    the `log_sum_exp` of the row, and `top`, its own way to the k best of some rows. `backbone` says who ran the pass.
    `pseudo[r]`: row r's placeholders after the final norm [anchors, placeholders, hidden], or None.
    """

    logits: Tensor
    logit_starts: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    hidden: dict[int, Tensor] = field(default_factory=dict)
    final_hidden: Tensor | None = None
    embeds: Tensor | None = None
    best: list[int] | None = None
    log_sum_exp: list[float] | None = None
    best_logprob: list[float] | None = None
    top: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
    backbone: str = ""
    pseudo: tuple[Tensor | None, ...] = ()

    def topk(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(ids, logits) [n, k] of the k best of every row of `logits` [n, vocab]."""
        if self.top is not None:
            return self.top(logits, k)
        return logits.topk(k)[::-1]

    def row_logits(self, row: int) -> Tensor:
        """Logits [wanted of this row, vocab]."""
        if len(self.logit_starts) == 1:
            return self.logits
        ends = (*self.logit_starts[1:], self.logits.shape[0])
        return self.logits[self.logit_starts[row] : ends[row]]


@runtime_checkable
class Backbone(Protocol):
    """A model the engine can run: the torch stack, the transformers adapter, and later the native stack."""

    name: str
    capabilities: Capabilities

    def pool(self, budget_bytes: int) -> CachePool:
        """A pool of row caches of this model's layout, at most `budget_bytes` large."""

    def serves(self, rows: Sequence[RowInput], needs: Needs) -> bool:
        """Whether this backbone can honour every row's visibility, hooks and the needs (else the oracle runs)."""

    def run(self, rows: Sequence[RowInput], needs: Needs = NO_NEEDS) -> Pass:
        """One forward pass over ragged rows; a row's result does not depend on the other rows beyond rounding."""


# --- logits ----------------------------------------------------------------------------------------------------------


class LogitsRule(Protocol):
    """A stateful change of one row's logits (grammar, contrastive decoding, format steering).

    States are values: `advance` returns the next state and leaves the old one usable, so branches and roll-back are free.
    Applied after penalties and bias, before temperature; never sees other rows. A rule that cannot go on raises RuleError,
    which ends its row alone. One that only forbids tokens may also have `allows(state, token) -> bool`: it spares greedy
    rows the masks of tokens that are allowed anyway.
    """

    name: str

    def open(self, prompt: Sequence[int], max_tokens: int) -> Any:
        """The state before the first generated token."""

    def apply(self, state: Any, logits: Tensor) -> Tensor:
        """New logits [vocab] for the next token; forbidden tokens get -inf, and at least one stays finite."""

    def advance(self, state: Any, token: int) -> Any:
        """The state after `token` was committed (or tried along a draft path)."""

    def forced(self, state: Any) -> Sequence[int]:
        """Tokens that must follow (empty when there is a choice); the engine may commit them without sampling."""


# --- drafting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    """Nodes proposed for one row: `tokens[i]` with `parents[i]` (-1 = root), parents before children.

    `q` maps an expanded parent (-1 = root) to the distribution float32 [vocab] its children were drawn from; None for
    deterministic drafts. `order`: node indices in draw order when it is not the index order. `scores[i]` is the drafter's
    estimate of the chance that node i is accepted given that its parent is, in [0, 1]; the engine corrects it by what it
    measures and verifies only the nodes that pay. None: nothing is known but the node's place in the draft.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    q: Mapping[int, Tensor] | None = None
    order: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


EMPTY_DRAFT = Draft()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier decided: the accepted root-to-node `path` (node indices, may be empty) and the `next` token."""

    path: tuple[int, ...]
    next: int


@dataclass(slots=True)
class Feedback:
    """What a drafter learns after verification of one row (after truncation at stop or limit).

    `nodes`: indices reported into [root, node 0, ...] (0 = root), `tokens`: their tokens, `path`: accepted nodes, `next`:
    the token emitted after them (-1 when cut). Tensors, as asked in `Needs`, have one row per reported node. A report
    without nodes is a part of the prompt that was read: one row per entry of `tokens`, `next` follows the last of them.
    `pseudo` [placeholders, hidden]: final states of the placeholders behind the last accepted node, where it had any.
    A further choice (n > 1) copies its first one's reading, so only that one hears of the prompt.
    """

    row: int
    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    path: tuple[int, ...]
    next: int
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None
    topk: Tensor | None = None
    topk_logits: Tensor | None = None
    logits: Tensor | None = None
    pseudo: Tensor | None = None


@dataclass(slots=True)
class RowView:
    """A drafter's read-only view of one row: its id, all committed tokens (prompt included), and how many may follow.

    `past` stands for the row's keys; a drafter only hands it on, to a backbone that can look ahead from it.
    """

    id: int
    tokens: Sequence[int]
    remaining: int
    temperature: float
    seed: int
    past: Past | None = None


class Drafter(Protocol):
    """Guesses the next tokens of a row; wrong guesses cost time, never correctness.

    `scope` "row" or "shared" says where state lives; state is keyed by row id, never by batch index. `draws` says how
    siblings were chosen (decides the law). `max_nodes(budget)` is the largest draft it will make for that budget.
    A drafter may have an attribute `law` that its drafts are judged by unless the request says otherwise: "trust" is lossy,
    and refused for sampled requests unless the drafter's attribute `sampled` is true.
    """

    name: str
    scope: Literal["row", "shared"]
    draws: Draws

    @property
    def needs(self) -> Needs:
        """What it wants to hear of every pass; asked before each pass, so that it may change."""

    def max_nodes(self, budget: int) -> int:
        """Nodes this drafter proposes at most when `budget` are affordable."""

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """A row joins; called once, before any draft or report of it."""

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One draft per row, at most its budget of nodes; an empty draft is ordinary decoding."""

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """What came of the last drafts."""

    def close(self, row: int) -> None:
        """A row leaves; its state is dropped."""

    def state_dict(self) -> dict[str, Tensor]:
        """Shared state worth keeping between runs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave; raises ConfigError when it belongs to another model."""


@dataclass(frozen=True, slots=True)
class MethodContext:
    """What a method is built for: the model's name, its capabilities, and the backbone and tokenizer themselves."""

    model: str
    backbone: Backbone
    tokenizer: Any = None

    @property
    def capabilities(self) -> Capabilities:
        """The model's capabilities."""
        return self.backbone.capabilities
