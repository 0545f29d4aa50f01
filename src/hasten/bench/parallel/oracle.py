"""A model that knows the truth: exact conditionals of laws, as a backbone of the engine and as a simulation.

It tests samplers without any training: what goes wrong with it is what the sampler does, since every forward gives
p(y_i | question, what stands there) exactly (ParallelBench, 2510.04767, section on the theory of parallel decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.bench.parallel.theory import Law
from hasten.engine.cache import CacheLayout, CachePool
from hasten.engine.contracts import NO_NEEDS, Capabilities, Needs, Pass, RowInput
from hasten.errors import IncompatibleError, out_of_range

MASK = 0
_NEVER = -1e4  # the engine takes finite logits only; its exp is 0
_CELLS = 20_000_000  # comparisons of states with answers that are made at once


class Conditional(Protocol):
    """What a simulation draws from: `places` tokens, and their distributions given what stands there."""

    @property
    def places(self) -> int:
        """L."""

    def conditional(self, committed: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(p [D, L, V], whether an answer fits [D]) for `committed` [D, L], -1 = open."""


class Orders:
    """All orders of n different items, worked out without listing them: open places take what is unused, evenly."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise out_of_range("n", n, "at least 1")
        self.places = n

    def conditional(self, committed: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """As of `theory.shuffle_law(n)`."""
        n = self.places
        used = (committed[:, :, None] == np.arange(n)).sum(1)
        fits = (used <= 1).all(1)
        free = (used == 0).astype(np.float32)
        probs = np.repeat((free / np.maximum(free.sum(1, keepdims=True), 1))[:, None], n, 1)
        placed = committed >= 0
        probs[placed] = np.eye(n, dtype=np.float32)[committed[placed]]
        probs[~fits] = 1 / n
        return probs, fits


def simulate(law: Conditional, steps: Sequence[int], draws: int, seed: int = 0) -> float:
    """The share of right answers among `draws` at temperature 1, with these numbers of tokens per step, random positions.

    Raises ConfigError unless the steps sum to the places of the law.
    """
    if sum(steps) != law.places or min(steps) < 1:
        raise out_of_range("steps", list(steps), f"positive numbers that sum to {law.places}")
    if draws < 1:
        raise out_of_range("draws", draws, "at least 1")
    rng = np.random.default_rng(seed)
    answers = len(law.answers) if isinstance(law, Law) else law.places
    at_once = max(1, _CELLS // (answers * law.places))
    right = 0
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        right += _right(law, steps, rng, count)
    return right / draws


def _right(law: Conditional, steps: Sequence[int], rng: np.random.Generator, draws: int) -> int:
    committed = np.full((draws, law.places), -1)
    order = rng.random((draws, law.places)).argsort(1)
    done = 0
    for quota in steps:
        probs, _ = law.conditional(committed)
        at = order[:, done : done + quota]
        cumulated = np.take_along_axis(probs, at[:, :, None], 1).cumsum(2)
        cumulated /= cumulated[:, :, -1:]
        drawn = (rng.random((draws, quota, 1)) >= cumulated).sum(2)
        np.put_along_axis(committed, at, drawn, 1)
        done += quota
    return int(law.conditional(committed)[1].sum())


class Oracle:
    """A masked-diffusion model of the given laws: the prompt `prompt(i)` asks for an answer of law i.

    The canvas is an answer's tokens and nothing else; token 0 is the mask, `tokens` and `text` translate pieces.
    """

    name = "oracle"

    def __init__(self, laws: Sequence[Law]) -> None:
        if not laws:
            raise out_of_range("laws", list(laws), "at least one")
        self.laws = tuple(laws)
        self.pieces = tuple(dict.fromkeys(piece for law in laws for piece in law.pieces))
        self._ids = {piece: i for i, piece in enumerate(self.pieces, 1)}
        self._first = 1 + len(self.pieces)  # token of the first law
        self._tokens = [torch.tensor([self._ids[piece] for piece in law.pieces]) for law in laws]
        self.capabilities = Capabilities(
            kind="masked",
            vocab_size=self._first + len(laws),
            max_len=1 + max(law.places for law in laws),
            layers=1,
            hidden=1,
            visibilities=frozenset({"full"}),
            cache_exact=frozenset(),
            mask_id=MASK,
        )

    def prompt(self, law: int) -> tuple[int, ...]:
        """The prompt that asks for an answer of this law."""
        if not 0 <= law < len(self.laws):
            raise out_of_range("law", law, f"in [0, {len(self.laws) - 1}]")
        return (self._first + law,)

    def decode(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """The pieces of an answer's tokens."""
        return tuple(self.pieces[token - 1] for token in tokens)

    def pool(self, budget_bytes: int) -> CachePool:
        """Row caches that stay empty: every forward sees the whole canvas."""
        return CachePool(CacheLayout(1, 1, 1, torch.float32), budget_bytes)

    def serves(self, rows: Sequence[RowInput], needs: Needs) -> bool:
        """Whole canvases, and logits alone."""
        return needs == NO_NEEDS and all(row.cache is None and row.embeds is None for row in rows)

    def run(self, rows: Sequence[RowInput], needs: Needs = NO_NEEDS) -> Pass:
        """Logits ln p(token | what stands there) of every wanted position.

        Raises IncompatibleError for methods that keep keys: there are none.
        """
        if not self.serves(rows, needs):
            raise IncompatibleError("the oracle has no keys to keep and no layers to see", field="method")
        out, starts, spans, done, first = [], [], [], 0, 0
        for row in rows:
            wanted = list(row.wanted())
            starts.append(done)
            spans.append((first, first + row.queries))
            out.append(self._logits(row.tokens)[wanted])
            done += len(wanted)
            first += row.queries
        return Pass(torch.cat(out), tuple(starts), tuple(spans), backbone=self.name)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [T, vocab] of a prompt and its canvas."""
        number = int(tokens[0]) - self._first
        law, ids = self.laws[number], self._tokens[number]
        committed = np.full(law.places, -1)
        for place, token in enumerate(tokens[1:].tolist()):
            if token != MASK:  # a token of another law fits no answer
                committed[place] = next(iter((ids == token).nonzero()[:, 0].tolist()), len(ids))
        probs = torch.from_numpy(law.conditional(committed[None])[0][0])
        logits = torch.full((len(tokens), self.capabilities.vocab_size), _NEVER)
        logits[1:, ids] = probs.log().clamp(min=_NEVER)
        return logits
