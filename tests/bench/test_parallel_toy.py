"""A small masked-diffusion model trained here on the suite's own lists: right one token at a time, lost on shuffle at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.bench import parallelbench as bench
from hasten.bench.parallel.decoding import decode
from hasten.bench.parallel.questions import ITEMS, Question, questions
from hasten.bench.parallel.theory import shuffle_validity
from hasten.combine import combine
from hasten.engine.cache import CacheLayout, CachePool
from hasten.engine.contracts import Capabilities, MethodContext, Pass
from hasten.engine.engine import Engine
from hasten.types import Request, SamplingParams

N, SYMBOLS = 5, ITEMS["symbols"]
TASKS = ("copy", "reverse", "replace_index", "shuffle")
MASK, TASK, INDEX = len(SYMBOLS), len(SYMBOLS) + 1, len(SYMBOLS) + 1 + len(TASKS)
VOCAB = INDEX + N
STEPS, BATCH, RATE = 1500, 128, 2e-3


class Toy(nn.Module):
    """A bidirectional transformer over [task, index, word, list, canvas], and what the engine asks of a model."""

    name = "toy"

    def __init__(self, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, width), nn.Parameter(0.1 * torch.randn(3 + 2 * N, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, VOCAB)
        self.capabilities = Capabilities(
            kind="masked", vocab_size=VOCAB, max_len=3 + 2 * N, layers=1, hidden=1, visibilities=frozenset({"full"}),
            cache_exact=frozenset(), mask_id=MASK,
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(self.layers(self.embed(ids) + self.place)))

    def pool(self, budget_bytes: int) -> CachePool:
        return CachePool(CacheLayout(1, 1, 1, torch.float32), budget_bytes)

    def run(self, rows, needs=None) -> Pass:
        logits = self(torch.stack([row.tokens for row in rows]))
        logits[..., len(SYMBOLS) :] = -1e4
        picked = [one[list(row.wanted())] for one, row in zip(logits, rows)]
        starts = torch.tensor([0, *map(len, picked)]).cumsum(0)[:-1]
        width = 3 + 2 * N
        return Pass(
            torch.cat(picked), tuple(starts.tolist()), tuple((i * width, (i + 1) * width) for i in range(len(rows)))
        )


def prompt(question: Question) -> tuple[int, ...]:
    given = question.facts.get("input") or question.prompt.split("[")[-1].split("]")[0].replace('"', "").split(", ")
    word, index = question.meta.get("word", SYMBOLS[0]), question.meta.get("index", 0)
    ids = [SYMBOLS.index(one) for one in (word, *given)]
    return (TASK + TASKS.index(question.task), INDEX + index, *ids)


def batch(generator: torch.Generator, held_out: set[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """(prompts, answers): random lists that are no test list, a task each, for shuffle one random order."""
    drawn = torch.rand(BATCH, len(SYMBOLS), generator=generator).argsort(1)[:, : N + 1]
    drawn = drawn[[tuple(row[:N]) not in held_out for row in drawn.tolist()]]
    given, word = drawn[:, :N], drawn[:, N:]
    task = torch.randint(0, len(TASKS), (len(drawn),), generator=generator)
    at = torch.randint(0, N, (len(drawn), 1), generator=generator)
    order = torch.rand(len(drawn), N, generator=generator).argsort(1)
    made = torch.stack([given, given.flip(1), given.scatter(1, at, word), given.gather(1, order)])
    answers = made[task, torch.arange(len(drawn))]
    return torch.cat([TASK + task[:, None], INDEX + at, word, given], 1), answers


def train(held_out: set[tuple[int, ...]]) -> Toy:
    torch.manual_seed(0)
    generator, toy = torch.Generator().manual_seed(1), Toy()
    optimiser = torch.optim.AdamW(toy.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * max(0.05, 1 - step / STEPS)
        asked, answers = batch(generator, held_out)
        count = torch.randint(1, N + 1, (len(asked), 1), generator=generator)
        hidden = torch.rand(len(asked), N, generator=generator).argsort(1) < count
        logits = toy(torch.cat([asked, answers.masked_fill(hidden, MASK)], 1))[:, -N:, : len(SYMBOLS)]
        optimiser.zero_grad()
        F.cross_entropy(logits[hidden], answers[hidden]).backward()
        nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimiser.step()
    return toy.eval()


@pytest.mark.slow
def test_a_trained_model_does_what_theory_says():
    asked = {name: questions(bench.TASKS[name], 300, lengths=(N,)) for name in TASKS}
    toy = train({prompt(question)[3:] for some in asked.values() for question in some})
    engine = Engine(toy, cache_bytes=64_000_000)  # type: ignore[arg-type]

    def score(name: str, method: str, temperature: float) -> float:
        requests = [
            Request(prompt(question), SamplingParams(max_tokens=N, temperature=temperature, seed=i))
            for i, question in enumerate(asked[name])
        ]
        parts = combine((method,), MethodContext("toy", toy), lambda: engine.pass_cost)  # type: ignore[arg-type]
        texts = [[SYMBOLS[token] for token in one.output.tokens] for one in decode(engine, requests, parts)]
        task = bench.TASKS[name]
        right = [task.score(question, task.render(text, question))[0] for question, text in zip(asked[name], texts)]
        return sum(right) / len(right)

    found = {
        (name, arm): score(name, method, 1.0)
        for name in TASKS
        for arm, method in (("one by one", "reference:score=random"), ("at once", "reference:steps=1"))
    }
    print(found, {name: score(name, "reference", 0.0) for name in TASKS})
    for name in TASKS[:3]:
        assert found[name, "one by one"] >= 0.95
    assert found["shuffle", "one by one"] >= 0.9
    assert found["shuffle", "at once"] < 0.1
    assert abs(found["shuffle", "at once"] - shuffle_validity(N, (N,))) < 0.04, "theory: 3.8 percent"
    assert min(found[name, "at once"] for name in TASKS[:3]) > 0.8, "nothing depends there"
