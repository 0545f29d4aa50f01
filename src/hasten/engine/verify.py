"""Verification: which drafted nodes stand, and the token that follows them.

Every law walks the draft from the root; a row without a draft walks zero nodes, so plain decoding is the same code.
Laws (specs of speculative sampling, section 3): greedy and match take the token plain decoding would take and descend
while a child carries it (token-identical to plain decoding); rejection keeps the target's distribution for drafts that
were sampled from a known q; typical and trust (which takes drafts unseen) are lossy and must be asked for by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hasten.engine.contracts import Draft, Draws, Law, Verdict
from hasten.engine.sampling import Sampler, draw, uniform
from hasten.errors import ConfigError, out_of_range

LAWS: tuple[Law, ...] = ("greedy", "match", "rejection", "typical", "trust")
_RESIDUAL = 1 << 20  # random stream of the token drawn from a residual; streams below judge siblings


def check_draft(draft: Draft, budget: int, vocab_size: int) -> None:
    """Raise ConfigError unless the draft is well formed, within the row's budget and vocabulary."""
    if len(draft.tokens) != len(draft.parents):
        raise ConfigError(f"a draft has {len(draft.tokens)} tokens and {len(draft.parents)} parents", field="draft")
    if draft.scores is not None and len(draft.scores) != len(draft.tokens):
        raise ConfigError(f"a draft has {len(draft.tokens)} tokens and {len(draft.scores)} scores", field="draft")
    if len(draft) > budget:
        raise out_of_range("draft", f"{len(draft)} nodes", f"at most the row's budget of {budget} nodes")
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if not -1 <= parent < i:
            raise out_of_range(f"draft.parents[{i}]", parent, f"in [-1, {i - 1}]: parents come before children")
        if not 0 <= token < vocab_size:
            raise out_of_range(f"draft.tokens[{i}]", token, f"below the vocabulary of {vocab_size}")


def check_law(law: Law, draws: Draws, draft: Draft | None = None) -> None:
    """Raise ConfigError for an unknown law, or a law the draft cannot be judged by."""
    if law not in LAWS:
        raise out_of_range("law", law, "one of " + ", ".join(LAWS))
    if law == "rejection" and draws != "point" and draft is not None and len(draft) and draft.q is None:
        raise ConfigError(
            "law = 'rejection' needs the distribution q that the draft was drawn from; this draft has none",
            hint="use law='match', which needs no q",
            field="law",
        )


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of every node; children of the root have depth 1."""
    out: list[int] = []
    for parent in parents:
        out.append(1 if parent < 0 else out[parent] + 1)
    return out


def _children(draft: Draft) -> dict[int, list[int]]:
    """Parent -> child nodes in draw order; a sibling that repeats an earlier one's token is skipped."""
    children: dict[int, list[int]] = {}
    taken: set[tuple[int, int]] = set()
    for node in draft.order if draft.order is not None else range(len(draft)):
        key = (draft.parents[node], draft.tokens[node])
        if key not in taken:
            taken.add(key)
            children.setdefault(draft.parents[node], []).append(node)
    return children


def verify(
    law: Law,
    logits: Tensor,
    draft: Draft,
    sampler: Sampler,
    position: int,
    draws: Draws = "point",
    best: Sequence[int] | None = None,
) -> Verdict:
    """Judge `draft` by raw target `logits` [nodes + 1, vocab] (row 0 follows the root, row i + 1 follows node i).

    `position` is the absolute position of the root's successor; the random number of every position is the one plain
    sampling uses there. `best`: the arg-max of every row, where it is known already.
    Raises ConfigError when the law does not fit the draft.
    """
    if sampler.plain and best is None:
        best = logits.argmax(-1).tolist()
    if not len(draft):
        first = best[0] if best else None
        return Verdict((), first if sampler.plain and first is not None else sampler.choose(logits[0], (), position, first))
    if law == "trust":
        return _trust(logits, draft, sampler, position)
    if law == "typical" and not sampler.params.greedy:
        return _typical(logits, draft, sampler, position)
    if law == "rejection" and not sampler.params.greedy:
        check_law(law, draws, draft)
        return _rejection(logits, draft, sampler, position, draws)
    children = {(draft.parents[node], draft.tokens[node]): node for node in reversed(range(len(draft)))}
    path: list[int] = []
    tokens: list[int] = []
    at = -1
    while True:
        here = at + 1
        if sampler.plain and best:
            token = best[here]
        else:
            token = sampler.choose(logits[here], tokens, position + len(path), best[here] if best else None)
        child = children.get((at, token))
        if child is None:
            return Verdict(tuple(path), token)
        path.append(child)
        tokens.append(token)
        at = child


def _q(draft: Draft, parent: int, vocab: int) -> Tensor | None:
    """The distribution the children of `parent` were drawn from, over the target vocabulary."""
    table: Mapping[int, Tensor] = draft.q or {}
    q = table.get(parent)
    if q is None:
        return None
    if q.shape != (vocab,):
        raise out_of_range("draft.q", tuple(q.shape), f"shape ({vocab},), zero outside a reduced draft vocabulary")
    return q.double()


def _rejection(logits: Tensor, draft: Draft, sampler: Sampler, position: int, draws: Draws) -> Verdict:
    """Sibling-wise rejection sampling: i.i.d. siblings, without replacement, or point masses (q = one-hot)."""
    children = _children(draft)
    path: list[int] = []
    tokens: list[int] = []
    at = -1
    while True:
        p = sampler.distribution(logits[at + 1], tokens).double()
        where = position + len(path)
        drawn_from = _q(draft, at, len(p)) if draws != "point" else None
        accepted = None
        for j, node in enumerate(_siblings(draft, children, at, draws)):
            token = draft.tokens[node]
            q = torch.zeros_like(p) if drawn_from is None else drawn_from
            if drawn_from is None:
                q[token] = 1.0
            if float(q[token]) > 0 and uniform(sampler.seed, where, 1 + j) * float(q[token]) < float(p[token]):
                accepted = node
                break
            rest = (p - q).clamp_(min=0)
            mass = float(rest.sum())
            p = rest / mass if mass > 0 else p  # p == q up to rounding: nothing is left to correct
            if drawn_from is not None and draws == "swor":
                drawn_from = drawn_from.clone()
                drawn_from[token] = 0
                left = float(drawn_from.sum())
                if left <= 0:
                    break
                drawn_from /= left
        if accepted is None:
            # a position where siblings were judged must not reuse the number that plain sampling draws there
            stream = _RESIDUAL if at in children else 0
            return Verdict(tuple(path), draw(p, uniform(sampler.seed, where, stream)))
        path.append(accepted)
        tokens.append(draft.tokens[accepted])
        at = accepted


def _siblings(draft: Draft, children: dict[int, list[int]], parent: int, draws: Draws) -> list[int]:
    """The children of `parent` to judge; i.i.d. draws keep repeated tokens, each was a draw of its own."""
    if draws != "iid":
        return children.get(parent, [])
    order = draft.order if draft.order is not None else range(len(draft))
    return [node for node in order if draft.parents[node] == parent]


def _trust(logits: Tensor, draft: Draft, sampler: Sampler, position: int) -> Verdict:
    """Lexical units' acceptance (lossy): every first child stands, unless a logit rule forbids it there."""
    children = _children(draft)
    path: list[int] = []
    tokens: list[int] = []
    at = -1
    while at in children:
        node = children[at][0]
        allowed = sampler.process(logits[at + 1], tokens) if sampler.rules else None
        if allowed is not None and float(allowed[draft.tokens[node]]) == -math.inf:
            break
        path.append(node)
        tokens.append(draft.tokens[node])
        at = node
    return Verdict(tuple(path), sampler.choose(logits[at + 1], tokens, position + len(path)))


def _typical(
    logits: Tensor, draft: Draft, sampler: Sampler, position: int, threshold: float = 0.09, alpha: float = 0.3
) -> Verdict:
    """Medusa's typical acceptance (lossy): keep x if p(x) > min(threshold, alpha exp(-H(p))); the deepest path wins."""
    best: tuple[int, float, tuple[int, ...]] = (0, 0.0, ())
    frontier: list[tuple[int, tuple[int, ...], tuple[int, ...], float]] = [(-1, (), (), 0.0)]
    children = _children(draft)
    while frontier:
        at, path, tokens, likelihood = frontier.pop()
        best = max(best, (len(path), likelihood, path), key=lambda entry: entry[:2])
        if at not in children:
            continue
        p = sampler.distribution(logits[at + 1], tokens)
        entropy = -float((p * (p + 1e-5).log()).sum())
        bar = min(threshold, alpha * math.exp(-entropy))
        for node in children[at]:
            if float(p[draft.tokens[node]]) > bar:
                gain = math.log(float(p[draft.tokens[node]]))
                frontier.append((node, (*path, node), (*tokens, draft.tokens[node]), likelihood + gain))
    path = best[2]
    tokens = tuple(draft.tokens[node] for node in path)
    last = path[-1] + 1 if path else 0
    return Verdict(path, sampler.choose(logits[last], tokens, position + len(path)))
