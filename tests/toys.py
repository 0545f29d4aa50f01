"""Toy targets and draft models over a few tokens, whose exact laws can be written out, and a chi-square test."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from hasten.engine.contracts import Capabilities, Draft, MethodContext, RowView
from hasten.engine.sampling import Sampler
from hasten.engine.verify import verify
from hasten.types import SamplingParams


def law(vocab: int, seed: int, sharp: float = 1.0) -> Callable[[Sequence[int]], Tensor]:
    """Logits [vocab] for any text, a pure function of its last two tokens."""

    @cache
    def known(last: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1009 + sum(7**i * (token + 1) for i, token in enumerate(last)))
        return torch.randn(vocab, generator=generator) * sharp

    return lambda text: known(tuple(text[-2:]))


class ToyAssistant:
    """Stands in for the draft model: answers by a written-out law instead of a network."""

    def __init__(self, logits: Callable[[Sequence[int]], Tensor]) -> None:
        self.logits = logits
        self.texts: dict[int, list[tuple[int, ...]]] = {}
        self.base: dict[int, tuple[int, ...]] = {}

    def open(self, row: int) -> None:
        pass

    def close(self, row: int) -> None:
        pass

    def begin(self, rows: Sequence[RowView], depth: int, nodes: int) -> list[Tensor]:
        for row in rows:
            self.base[row.id], self.texts[row.id] = tuple(row.tokens), []
        return [self.logits(row.tokens) for row in rows]

    def grow(self, asks) -> list[Tensor]:
        out = []
        for row, tokens, parents in asks:
            known = list(self.texts[row])
            new = [(*(known[p] if p >= 0 else self.base[row]), token) for token, p in zip(tokens, parents, strict=True)]
            self.texts[row] += new
            out.append(torch.stack([self.logits(text) for text in new]))
        return out


def context(vocab: int) -> MethodContext:
    from types import SimpleNamespace

    caps = Capabilities(kind="causal", vocab_size=vocab, max_len=999, layers=1, hidden=1)
    return MethodContext("toy", SimpleNamespace(capabilities=caps, name="toy"))  # type: ignore[arg-type]


def two_tokens(drafter, target: Callable, prompt: tuple[int, ...], vocab: int, seed: int, temperature: float, spoil=None):
    """The first two tokens of one sampled answer by drafting and verification; `spoil` may change the draft first."""
    text = list(prompt)
    params = SamplingParams(temperature=temperature, seed=seed)
    sampler = Sampler(params, seed, prompt, vocab)
    while len(text) < len(prompt) + 2:
        drafter.open(1, prompt)
        [draft] = drafter.propose([RowView(1, text, 9, temperature, seed)], [64])
        draft = spoil(draft) if spoil else draft
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        logits = torch.stack([target([*text, *path]) for path in ((), *paths)])
        verdict = verify("rejection", logits, draft, sampler, len(text), drafter.draws)
        text += [*(draft.tokens[node] for node in verdict.path), verdict.next]
    return tuple(text[len(prompt) : len(prompt) + 2])


def exact(target: Callable, prompt: tuple[int, ...], vocab: int, temperature: float) -> dict[tuple[int, int], float]:
    """The law of the first two tokens, written out."""
    out = {}
    first = (target(prompt) / temperature).softmax(-1)
    for a in range(vocab):
        second = (target([*prompt, a]) / temperature).softmax(-1)
        for b in range(vocab):
            out[a, b] = float(first[a] * second[b])
    return out


def chi_square(counts: Counter, law: dict, runs: int) -> tuple[float, float]:
    """(statistic, the value it exceeds once in a hundred times); rare outcomes are pooled."""
    cells: list[tuple[float, float]] = []
    rare = [0.0, 0.0]
    for outcome, chance in law.items():
        if chance * runs < 8:
            rare[0] += counts[outcome]
            rare[1] += chance * runs
        else:
            cells.append((counts[outcome], chance * runs))
    if rare[1] >= 5:
        cells.append((rare[0], rare[1]))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    degrees = len(cells) - 1
    # Wilson and Hilferty: the cube root of a chi-square variable is close to normal
    bound = degrees * (1 - 2 / (9 * degrees) + 2.326 * (2 / (9 * degrees)) ** 0.5) ** 3
    return statistic, bound


def sample(
    make: Callable, target: Callable, vocab: int, runs: int, temperature: float = 1.0, spoil=None
) -> tuple[float, float]:
    """The chi-square statistic of `runs` answers against the exact law, and its 1 % bound."""
    prompt = (1, 0)
    drafter = make()
    counts = Counter(two_tokens(drafter, target, prompt, vocab, seed, temperature, spoil) for seed in range(runs))
    return chi_square(counts, exact(target, prompt, vocab, temperature), runs)


def by_token(draft: Draft) -> Draft:
    """The error to be caught: siblings judged in the order of their ids instead of the order they were drawn in."""
    order = sorted(range(len(draft)), key=lambda node: (draft.parents[node], draft.tokens[node]))
    return Draft(draft.tokens, draft.parents, draft.q, tuple(order))


def acceptance(p: Tensor, q: Tensor, children: int, replace: bool) -> float:
    """The chance that one of `children` siblings drawn from q is accepted under p, by enumeration of all draws."""
    vocab = len(p)
    total = 0.0
    for drawn in itertools.product(range(vocab), repeat=children):
        if not replace and len(set(drawn)) < children:
            continue
        chance, rest, missed, kept = 1.0, q.clone(), 1.0, 0.0
        residual = p.clone()
        for token in drawn:
            chance *= float(rest[token])
            if chance == 0:
                break
            take = min(1.0, float(residual[token] / rest[token]))
            kept += missed * take
            missed *= 1 - take
            residual = (residual - rest).clamp(min=0)
            residual = residual / residual.sum() if residual.sum() > 0 else p
            if not replace:
                rest = rest.clone()
                rest[token] = 0
                rest = rest / rest.sum() if rest.sum() > 0 else rest
        total += chance * kept
    return total


def random_law(vocab: int, r: random.Random) -> Tensor:
    """A distribution float64 [vocab] with large and small entries."""
    values = torch.tensor([r.random() ** 3 + 0.02 for _ in range(vocab)], dtype=torch.float64)
    return values / values.sum()
