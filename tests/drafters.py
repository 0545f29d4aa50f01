"""Stub drafters for exactness tests: always right, never right, random trees, duplicates, sampled from a known q."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from hasten.draft.tvdpp import Config, Tvdpp
from hasten.engine.contracts import Draft, Feedback, MethodContext, Needs, RowView
from hasten.models.assistant import Assistant
from hasten.models.small import Shape, SmallLM
from hasten.pass_cost import PassCost


class Stub:
    """Base: counts calls, checks the open/close protocol, remembers feedback."""

    name = "stub"
    needs = Needs()
    scope = "row"
    draws = "point"

    def __init__(self) -> None:
        self.live: set[int] = set()
        self.opened = 0
        self.heard: list[Feedback] = []

    def max_nodes(self, budget: int) -> int:
        return budget

    def open(self, row: int, prompt: Sequence[int]) -> None:
        assert row not in self.live
        self.live.add(row)
        self.opened += 1

    def close(self, row: int) -> None:
        self.live.remove(row)

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        assert all(row.id in self.live for row in rows)
        return [self.draft(row, budget) for row, budget in zip(rows, budgets, strict=True)]

    def draft(self, row: RowView, budget: int) -> Draft:
        return Draft()

    def observe(self, feedback: Sequence[Feedback]) -> None:
        self.heard += feedback

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


class RandomTree(Stub):
    """Random trees of random size, with repeated siblings."""

    name = "random-tree"
    needs = Needs(hidden=(1,), final_hidden=True, topk=3, logits=True, feedback="all", prompt=True, prompt_logits=True)

    def __init__(self, vocab: int, seed: int = 0) -> None:
        super().__init__()
        self.vocab, self.random = vocab, random.Random(seed)

    def draft(self, row: RowView, budget: int) -> Draft:
        n = self.random.randint(0, budget)
        return Draft(
            tuple(self.random.randrange(self.vocab if self.random.random() < 0.5 else 4) for _ in range(n)),
            tuple(self.random.randint(-1, i - 1) for i in range(n)),
        )


class Oracle(Stub):
    """Knows every row's final text; right with probability `skill` per token, with decoy siblings when `wide`."""

    name = "oracle"

    def __init__(self, texts: Mapping[tuple[int, ...], Sequence[int]], vocab: int, skill: float = 1.0, wide: bool = False):
        super().__init__()
        self.texts, self.vocab, self.skill, self.wide = dict(texts), vocab, skill, wide
        self.random = random.Random(1)

    def draft(self, row: RowView, budget: int) -> Draft:
        full = next(full for full in self.texts.values() if tuple(full[: len(row.tokens)]) == tuple(row.tokens))
        tokens, parents, tip = [], [], -1
        for token in full[len(row.tokens) :]:
            right = self.random.random() < self.skill
            children = [token if right else (token + 1) % self.vocab]
            if self.wide:
                children = [(token + 2) % self.vocab, *children, children[0]]
            if len(tokens) + len(children) > budget:
                break
            for child in children:
                tokens.append(child)
                parents.append(tip)
            tip = len(tokens) - (2 if self.wide else 1)
        return Draft(tuple(tokens), tuple(parents))


class Sampled(Stub):
    """Children sampled from a given q, independently ("iid") or without replacement ("swor")."""

    name = "sampled"

    def __init__(self, q: Callable[[Sequence[int]], Tensor], draws: str, width: int, depth: int, seed: int) -> None:
        super().__init__()
        self.q, self.draws, self.width, self.depth = q, draws, width, depth
        self.generator = torch.Generator().manual_seed(seed)

    def draft(self, row: RowView, budget: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        table: dict[int, Tensor] = {}
        level = [(-1, list(row.tokens))]
        for _ in range(self.depth):
            following = []
            for parent, text in level:
                q = self.q(text)
                table[parent] = q
                drawn = torch.multinomial(q, self.width, replacement=self.draws == "iid", generator=self.generator)
                for token in drawn.tolist():
                    tokens.append(token)
                    parents.append(parent)
                    following.append((len(tokens) - 1, [*text, token]))
            level = following
        return Draft(tuple(tokens), tuple(parents), table)


def small_model(engine, kept: int, **knobs) -> Tvdpp:
    """TVD++'s drafter with a random model over the first `kept` ids, sharp enough to be sometimes right."""
    target = engine.backbone
    model = SmallLM(target, torch.arange(kept), Shape(hidden=32, layers=2, ffn=40, window=16)).reset(1)
    model.back.data *= 8
    model.requires_grad_(False).pack()
    context = MethodContext("tiny", target)
    return Tvdpp(Config(floor=0.0, **knobs), context, Assistant(model, target.config.vocab_size))


class Clock:
    """Stands in for the trace's clock: passes take what the test says, by their number of tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine, cost: Callable[[int], float]) -> None:
        self.time = 0.0
        self.passes: list[int] = []
        run = engine.backbone.run
        engine._loop.budget.cost = PassCost()  # what was measured by the real clock is of no use

        def timed(rows, needs):
            self.passes.append(sum(row.queries for row in rows))
            self.time += cost(self.passes[-1])
            return run(rows, needs)

        monkeypatch.setattr(engine.backbone, "run", timed, raising=False)
        monkeypatch.setattr(engine.trace, "now", lambda: self.time, raising=False)
