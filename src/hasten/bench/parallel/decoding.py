"""One way to decode for all methods and models: requests in, outputs with the order of their commits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.bench.parallel.oracle import Oracle
from hasten.bench.parallel.questions import Question, Task
from hasten.bench.parallel.theory import Law
from hasten.combine import combine
from hasten.engine.contracts import MethodContext
from hasten.engine.engine import Engine, Parts
from hasten.errors import HastenError
from hasten.types import Event, Output, Request, SamplingParams


@dataclass(slots=True)
class Decoded:
    """An answer: its output, and the engine step that made each position final (0 = first after the prompt).

    Steps that one forward checked together, as FreeDave's, count as one.
    """

    output: Output
    steps: dict[int, int] = field(default_factory=dict)

    def parallel(self, places: Sequence[int]) -> list[list[int]] | None:
        """The indices of `places` by the steps that filled them, in order; None where one stayed open."""
        if not set(places) <= set(self.steps):
            return None
        made: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            made.setdefault(self.steps[place], []).append(i)
        return [made[step] for step in sorted(made)]


def decode(engine: Engine, requests: Sequence[Request], parts: Parts) -> list[Decoded]:
    """All requests in one batch; raises HastenError for one that fails."""
    order: list[int] = []
    steps: dict[int, dict[int, int]] = {}
    failed: list[str] = []

    def watch(event: Event) -> None:
        if event.kind == "queue":
            order.append(event.request)
            steps[event.request] = {}
        elif event.kind == "commit":
            if event.token < 0:
                steps[event.request].pop(event.position, None)
            else:
                steps[event.request][event.position] = event.step
        elif event.kind == "error":
            failed.append(event.text)

    outputs = engine.run([(request, parts) for request in requests], watch)
    if failed:
        raise HastenError(failed[0])
    out = []
    for request, number, (output, *_) in zip(requests, order, outputs, strict=True):
        first = len(request.prompt)
        out.append(Decoded(output, {position - first: step for position, step in steps[number].items()}))
    return out


def ask_oracle(
    task: Task, asked: Sequence[Question], methods: Sequence[str], *, temperature: float = 1.0, seed: int = 0
) -> list[tuple[str, Decoded]]:
    """(text, how it was decoded) of the oracle's answer to each question, through the engine's canvas loop."""
    oracle = Oracle([Law.of(list(task.pieces(question))) for question in asked])
    engine = Engine(oracle, cache_bytes=64_000_000)
    parts = combine(tuple(methods), MethodContext(oracle.name, oracle), lambda: engine.pass_cost)
    requests = [
        Request(oracle.prompt(i), SamplingParams(max_tokens=law.places, temperature=temperature, seed=seed + i))
        for i, law in enumerate(oracle.laws)
    ]
    made = decode(engine, requests, parts)
    return [(task.render(oracle.decode(one.output.tokens), q), one) for one, q in zip(made, asked, strict=True)]
