"""Grammars: an answer that is valid JSON of a schema, matches a regex, or is a sentence of a Lark grammar - always.

Before every token the grammar says which tokens may follow; all others get no probability. Compiled by llguidance, once
per grammar; a row's progress is a matcher that walks between the states of its draft tree.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hasten import types
from hasten.engine.contracts import LogitsRule, MethodContext
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, IncompatibleError, RuleError
from hasten.types import MethodCard

if TYPE_CHECKING:
    from llguidance import LLMatcher

_FORCED = 64  # tokens that one draft takes from what must follow
_MASKS = 64  # states of a row whose masks are kept
_NODES = 1024  # states of a row that are found again by their parent and token
_SLOW = 3  # masks of a row that may take longer than limits.mask_s
_TRIED = 3  # tokens tried when a grammar is compiled: what is too complex shows where an object begins
_ENTRIES = 1024  # compiled grammars that are kept
_WEIGHT = 500  # bytes that a compiled grammar takes per byte of its description, at most (measured on large schemas)

card = MethodCard(
    slug="grammar",
    title="Grammar-constrained decoding (llguidance)",
    paper="",
    date="2025-02",
    plugs_into="logits",
    exactness="lossy",
    claim="Finished answers are always valid: JSON of a schema, a regex, a Lark grammar or one of a list of choices.",
    no_help="What the schema does not say: a valid answer can be wrong, and max_tokens can end it before it is whole.",
    needs=("causal",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """No settings: a grammar comes with its request."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What grammars have cost so far, in this process and for this model: numbers of things, and seconds."""

    compiled: int = 0
    compile_s: float = 0.0
    reused: int = 0
    masks: int = 0
    mask_s: float = 0.0
    kept: int = 0
    kept_bytes: int = 0


class Grammars:
    """Compiles grammars for one model, and keeps the latest used; safe to call from any thread.

    `counts()` tells what was spent. The vocabulary is read when this is built, so that no request waits for it.
    """

    name = "grammar"

    def __init__(self, config: Config, context: MethodContext) -> None:
        from hasten.logits import _compile

        if context.tokenizer is None:
            raise IncompatibleError(f"model {context.model!r} has no tokenizer, which grammars need", field="grammar")
        caps = context.capabilities
        if caps.kind != "causal":
            raise IncompatibleError(
                f"method 'grammar' writes from left to right; a {caps.kind} model does not", field="grammar"
            )
        if not caps.eos_ids:
            raise IncompatibleError(
                f"model {context.model!r} has no end token, so that no answer of a grammar could end", field="grammar"
            )
        self._trie = _compile.Trie(context.tokenizer, caps.vocab_size, caps.eos_ids)
        self._lock = threading.Lock()
        self._kept: OrderedDict[types.Grammar, tuple[Rule, int]] = OrderedDict()
        self._bytes = self._compiled = self._reused = 0
        self._compile_s = 0.0
        self.spent = Spent()

    def compile(self, grammar: types.Grammar) -> LogitsRule:
        """The rule of `grammar`; equal grammars are compiled once while they are kept.

        Raises ConfigError (field "grammar") naming what is not supported, too large or impossible to satisfy.
        """
        from hasten.logits import _compile

        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                self._reused += 1
                return self._kept[grammar][0]
        started_s, cpu_s = time.perf_counter(), time.thread_time()
        description = _compile.prepare(grammar)
        rule = Rule(self._trie, _compile.build(self._trie, description), self.spent)
        rule.check()
        if time.thread_time() - cpu_s > LIMITS.compile_s:
            raise ConfigError(f"the grammar takes more than {LIMITS.compile_s} s to compile", field="grammar")
        size = 20_000 + _WEIGHT * len(description)
        with self._lock:
            self._compiled += 1
            self._compile_s += time.perf_counter() - started_s
            if grammar not in self._kept:
                self._kept[grammar] = (rule, size)
                self._bytes += size
            while self._kept and (self._bytes > LIMITS.grammar_cache_bytes or len(self._kept) > _ENTRIES):
                _, (_, gone) = self._kept.popitem(last=False)
                self._bytes -= gone
        return rule

    def counts(self) -> Counts:
        """What was spent so far."""
        with self._lock:
            return Counts(
                self._compiled, self._compile_s, self._reused, self.spent.masks, self.spent.seconds, len(self._kept),
                self._bytes,
            )  # fmt: skip


@dataclass(slots=True)
class Spent:
    """Masks computed and the seconds they took; written by the engine's thread alone."""

    masks: int = 0
    seconds: float = 0.0


class State:
    """Where a row stands in its grammar: one more token than its parent. A value: nothing of it ever changes."""

    __slots__ = ("depth", "parent", "serial", "token", "walker")

    def __init__(self, walker: Walker, parent: State | None, token: int, serial: int) -> None:
        self.walker, self.parent, self.token, self.serial = walker, parent, token, serial
        self.depth: int = 0 if parent is None else parent.depth + 1


class Rule:
    """One compiled grammar as a rule over logits; rows share it, each has its own walker."""

    name = "grammar"

    def __init__(self, trie: Any, matcher: LLMatcher, spent: Spent) -> None:
        self.trie, self.spent = trie, spent
        self._matcher = matcher

    def check(self) -> None:
        """Raise ConfigError unless some text satisfies the grammar, as far as its first tokens tell."""
        walker = Walker(self.trie, self._matcher.deep_copy(), Spent())
        try:
            allowed = walker.mask(walker.root)
            if not allowed.any():
                raise ConfigError("no text satisfies the grammar", field="grammar")
            state, bits = walker.root, allowed
            for _ in range(_TRIED):
                inner = [int(token) for token in np.flatnonzero(bits)[:8] if token not in self.trie.end_ids]
                if not inner:
                    break
                state = walker.after(state, inner[0])
                bits = walker.mask(state)
        except RuleError as error:
            message = (
                "the grammar leads to where no token of this model fits" if "forbids" in error.message else error.message
            )
            raise ConfigError(message, hint=error.hint, field="grammar") from None
        if self.trie.spaced and bool((allowed & self.trie.begins_spaced).any()):
            raise ConfigError(
                "the grammar lets an answer begin with a space, which this model's tokenizer cannot show", field="grammar"
            )

    def open(self, prompt: Sequence[int], max_tokens: int) -> State:
        """The state before the first token of an answer; the prompt is no part of it."""
        return Walker(self.trie, self._matcher.deep_copy(), self.spent).root

    def apply(self, state: State, logits: Tensor) -> Tensor:
        """`logits` [vocab] with -inf for every token that may not follow; raises RuleError when the grammar gives up."""
        allowed = torch.from_numpy(state.walker.mask(state))
        return logits.masked_fill(~allowed, -torch.inf)

    def allows(self, state: State, token: int) -> bool:
        """Whether `token` may follow; much cheaper than a mask."""
        return state.walker.allows(state, token)

    def advance(self, state: State, token: int) -> State:
        """The state one token on."""
        return state.walker.after(state, token)

    def forced(self, state: State) -> Sequence[int]:
        """The tokens by which a text that must follow is usually written; () when there is a choice."""
        return state.walker.forced(state)


class Walker:
    """One row's matcher, moved between states: back to where two paths part, then forward."""

    def __init__(self, trie: Any, matcher: LLMatcher, spent: Spent) -> None:
        self.trie, self.spent = trie, spent
        self._matcher = matcher
        self._serial = 0
        self._slow = 0
        self.root = self._at = State(self, None, -1, 0)
        self._nodes: OrderedDict[tuple[int, int], State] = OrderedDict()
        self._masks: OrderedDict[int, tuple[bytes, bool]] = OrderedDict()

    def after(self, state: State, token: int) -> State:
        """The child of `state`: the same object while it is remembered, so that its mask is."""
        key = (state.serial, token)
        found = self._nodes.get(key)
        if found is None:
            self._serial += 1
            found = self._nodes[key] = State(self, state, token, self._serial)
            if len(self._nodes) > _NODES:
                self._nodes.popitem(last=False)
        return found

    def _move(self, to: State) -> bool:
        """Bring the matcher to a state; False when an end token or a forbidden token lies on the way."""
        at, path = self._at, []
        while to.depth > at.depth and to.parent is not None:
            path.append(to)
            to = to.parent
        back = 0
        while at is not to and at.parent is not None:
            if at.depth == to.depth and to.parent is not None:
                path.append(to)
                to = to.parent
            back += 1
            at = at.parent
        if back and not self._matcher.rollback(back):
            self._fail()
        self._at = at
        for state in reversed(path):
            leaf = self.trie.leaf.get(state.token)
            if leaf is None or self._matcher.try_consume_tokens([leaf]) != 1:
                self._fail()
                return False
            self._at = state
        return True

    def _fail(self) -> None:
        """Raise RuleError when the matcher has broken down; its limits on time and memory do that."""
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().replace("<non-verbose/>", "").split())[:200]
            if reason.startswith("NoExtension"):
                raise RuleError(
                    "the grammar lets nothing follow: no text satisfies it", hint="check what it refers to", field="grammar"
                )
            raise RuleError(f"the grammar became too complex on the way ({reason})", hint="simplify it", field="grammar")

    def allows(self, state: State, token: int) -> bool:
        """Whether `token` may follow `state`."""
        started_s = time.perf_counter()
        alive = self._move(state)
        if token in self.trie.end_ids:
            allowed = state.token in self.trie.end_ids or (alive and self._matcher.is_accepting())
        else:
            leaf = self.trie.leaf.get(token)
            allowed = alive and leaf is not None and self._matcher.validate_tokens([leaf]) == 1
        self.spent.seconds += time.perf_counter() - started_s
        self._fail()
        return bool(allowed)

    def mask(self, state: State) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tokens may follow, bool [vocab]; after an end token only end tokens do."""
        ends = list(self.trie.end_ids)
        if state.serial not in self._masks:
            self._masks[state.serial] = self._compute(state)
            if len(self._masks) > _MASKS:
                self._masks.popitem(last=False)
        packed, complete = self._masks[state.serial]
        bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
        allowed = bits[: self.trie.vocab_size].view(np.bool_)
        allowed[ends] = complete
        others, leaves = self.trie.twins
        allowed[others] = allowed[leaves]
        return allowed

    def _compute(self, state: State) -> tuple[bytes, bool]:
        """The packed mask of a state, and whether the answer may end there."""
        started_s, cpu_s = time.perf_counter(), time.thread_time()
        if state.token in self.trie.end_ids:
            return bytes((self.trie.vocab_size + 7) // 8), True
        if not self._move(state):
            raise RuleError("the grammar forbids a token of the answer", field="grammar")
        complete = self._matcher.is_accepting()
        packed = self._matcher.compute_bitmask()
        self._fail()
        self.spent.masks += 1
        self.spent.seconds += time.perf_counter() - started_s
        self._slow += time.thread_time() - cpu_s > LIMITS.mask_s
        if self._slow > _SLOW:
            raise RuleError(
                f"the grammar took more than {LIMITS.mask_s} s for a token, {self._slow} times",
                hint="simplify it",
                field="grammar",
            )
        return packed, complete

    def forced(self, state: State) -> tuple[int, ...]:
        """The tokens that must follow `state`, as far as they are looked at; () when there is a choice."""
        started_s = time.perf_counter()
        try:
            tokens = self._matcher.compute_ff_tokens() if self._move(state) else []
        except RuleError:  # said again, and then raised, when the mask is asked for
            tokens = []
        self.spent.seconds += time.perf_counter() - started_s
        return tuple(tokens[:_FORCED])


method = Grammars
