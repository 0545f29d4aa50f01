"""How one row's next token is chosen: processors in a fixed order, and random numbers keyed by seed and position.

The random number of a position is a pure function of (seed, position, stream), so a request gives the same text alone,
in a batch, with or without drafts, and after a restart. Draws invert the cumulative distribution in float64 over ids in
ascending order: rounding differences between batch shapes change a token only at near-ties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.engine.contracts import LogitsRule
from hasten.errors import ConfigError, RuleError
from hasten.types import MAX_SEED, SamplingParams, TokenLogprob

_MASK = 2**64 - 1
_NUCLEUS = 1024  # candidates sorted first; the whole vocabulary is sorted only when they hold less than top_p


def _mix(x: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit words whose output bits all depend on all input bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A float64 in [0, 1) that depends on nothing but its arguments; streams are independent of one another."""
    return (_mix(_mix(_mix(seed) ^ position) ^ (stream + 1)) >> 11) * 2.0**-53


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the given choice of a request with n > 1; choice 0 keeps the request's own."""
    return seed if choice == 0 else _mix(_mix(seed) ^ (choice << 32)) & MAX_SEED


def draw(probs: Tensor, u: float) -> int:
    """The id at which the cumulative distribution of `probs` [vocab] (need not sum to one) exceeds u in [0, 1)."""
    cumulative = probs.double().cumsum(0)
    total = cumulative[-1:]
    index = int(torch.searchsorted(cumulative, u * total, right=True))
    if index < len(probs) and probs[index] > 0:
        return index
    return int(probs.nonzero()[-1])  # u within rounding of 1


def truncate(probs: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """`probs` [vocab] with the tail cut by top_k, then top_p, then min_p; kept entries are not renormalised.

    Equal probabilities at the top_k border are all kept; inside the nucleus the lower id comes first.
    """
    if 0 < top_k < len(probs):
        border = probs.topk(top_k).values[-1]
        probs = probs.where(probs >= border, 0.0)
    if top_p < 1.0:
        target = top_p * float(probs.sum(dtype=torch.float64))
        size = min(_NUCLEUS, len(probs))
        border = probs.topk(size).values[-1]
        ids = (probs >= border).nonzero()[:, 0]
        if float(probs[ids].sum(dtype=torch.float64)) < target:
            ids = torch.arange(len(probs))
        order = torch.sort(probs[ids], descending=True, stable=True)
        before = order.values.double().cumsum(0) - order.values
        kept = ids[order.indices[before < target]]
        probs = torch.zeros_like(probs).index_copy_(0, kept, probs[kept])
    if min_p > 0.0:
        probs = probs.where(probs >= min_p * probs.max(), 0.0)
    return probs


class Sampler:
    """One row's way from logits to a token, with the history that penalties and logit rules depend on.

    `path` arguments are tokens tried after the committed ones (ancestors of a draft node, never its siblings).
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int],
        vocab_size: int,
        rules: Sequence[LogitsRule] = (),
        max_tokens: int = 0,
    ) -> None:
        for name in ("logit_bias", "stop_ids"):
            wrong = [token for token in getattr(params, name) if token >= vocab_size]
            if wrong:
                raise ConfigError(
                    f"{name} names token {wrong[0]}; {name} must hold ids below the vocabulary of {vocab_size}",
                    field=name,
                )
        self.params, self.seed, self.rules = params, seed, tuple(rules)
        self.states: list[Any] = [rule.open(prompt, max_tokens) for rule in self.rules]
        self._counts: Counter[int] = Counter()
        self._prompt = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        self._bias = None
        if params.logit_bias:
            ids, values = zip(*sorted(params.logit_bias.items()), strict=True)
            self._bias = (torch.tensor(ids), torch.tensor(values, dtype=torch.float32))
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        self._shaped = bool(penalised or self._bias)
        self.raw = not (self._shaped or self.rules)  # logits reach the choice untouched
        self._forbids = not self._shaped and all(hasattr(rule, "allows") for rule in self.rules)

    @property
    def plain(self) -> bool:
        """True when the choice is the arg-max of the raw logits, so that many rows can be decided at once."""
        return self.raw and self.params.greedy

    def states_after(self, path: Sequence[int]) -> list[Any]:
        """Rule states after `path`; the committed states are left alone."""
        states = self.states
        for token in path:
            states = [rule.advance(state, token) for rule, state in zip(self.rules, states, strict=True)]
        return states

    def process(self, logits: Tensor, path: Sequence[int] = ()) -> Tensor:
        """Penalties, bias and rules applied to float32 `logits` [vocab]; a new tensor unless nothing applies."""
        if self.raw:
            return logits
        p = self.params
        logits = logits.clone() if self._shaped else logits
        counts = self._counts + Counter(path) if path else self._counts
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(self._prompt.union(counts)))
            if len(seen):
                values = logits[seen]
                logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if counts and (p.presence_penalty or p.frequency_penalty):
            ids = torch.tensor(list(counts))
            often = torch.tensor(list(counts.values()), dtype=logits.dtype)
            logits[ids] -= p.presence_penalty + p.frequency_penalty * often
        if self._bias is not None:
            logits[self._bias[0]] += self._bias[1]
        for rule, state in zip(self.rules, self.states_after(path), strict=True):
            logits = rule.apply(state, logits)
            if not bool(torch.isfinite(logits).any()):
                raise RuleError(f"logit rule {rule.name!r} forbids every token", field="method")
        return logits

    def distribution(self, logits: Tensor, path: Sequence[int] = ()) -> Tensor:
        """The target distribution float32 [vocab] after all processing; one-hot when greedy."""
        p = self.params
        logits = self.process(logits, path)
        if p.greedy:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        # the best logit is moved to 0 first, so that tiny temperatures do not overflow
        probs = ((logits - logits.max()) / p.temperature).softmax(-1)
        probs = truncate(probs, p.top_k, p.top_p, p.min_p)
        return probs / probs.sum()

    def choose(self, logits: Tensor, path: Sequence[int], position: int, best: int | None = None) -> int:
        """The token at absolute `position` given raw `logits` [vocab]: what plain decoding picks there.

        `best` is their arg-max where it is known: rules that only forbid are then asked about that token alone.
        """
        if self.params.greedy:
            if best is not None and self._forbids:
                states = zip(self.rules, self.states_after(path), strict=True)
                if all(rule.allows(state, best) for rule, state in states):  # type: ignore[attr-defined]
                    return best
            return int(self.process(logits, path).argmax())
        return draw(self.distribution(logits, path), uniform(self.seed, position))

    def commit(self, token: int) -> None:
        """Extend the history by a final token."""
        self._counts[token] += 1
        if self.rules:
            self.states = self.states_after((token,))

    def forced(self) -> tuple[int, ...]:
        """Tokens that a rule says must follow; () when there is a choice or several rules speak."""
        return tuple(self.rules[0].forced(self.states[0])) if len(self.rules) == 1 else ()


def token_logprob(logits: Tensor, lse: float, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` under raw `logits` [vocab] with log-sum-exp `lse`, and the `top` best alternatives."""
    best: tuple[tuple[int, float], ...] = ()
    if top:
        values, ids = logits.topk(min(top, len(logits)))
        best = tuple((int(i), float(v) - lse) for i, v in zip(ids, values, strict=True))
    return TokenLogprob(token, float(logits[token]) - lse, best)
