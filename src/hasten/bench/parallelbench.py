"""ParallelBench (2510.04767): tasks whose tokens depend on each other, which show what decoding several at once costs.

`measure` runs any model under any methods and gives quality over tokens per step, task by task; `protocol` lists the
settings of the published grid. Theory, oracle, tasks and metrics are in `bench.parallel`. Two sets of tasks: in plain words
for any model, and in the words of `hasten.worlds` for hasten's small models, which know no others.

Published protocol: greedy, canvases of 32 tokens for lists and 64 for the rest, mean tokens per step as the axis. The
theory is for sampling with exact conditionals, so `oracle` figures compare with temperature 1; at temperature 0 tasks with
many right answers test whether tokens of one step are coordinated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.bench.parallel import curves
from hasten.bench.parallel.answers import LISTED, Answered, answer, knows_worlds, room
from hasten.bench.parallel.lists import LISTS, REPEATS
from hasten.bench.parallel.puzzles import EXTRA, PUZZLES
from hasten.bench.parallel.questions import Items, Question, Task, questions
from hasten.bench.parallel.sentences import TEXTS
from hasten.bench.parallel.worlds import WORLD_TASKS
from hasten.bench.report import Progress, machine
from hasten.engine.contracts import MethodContext
from hasten.errors import out_of_range, unknown_name
from hasten.types import MethodCard

if TYPE_CHECKING:
    from hasten.llm import LLM

card = MethodCard(
    slug="parallelbench",
    title="ParallelBench: Understanding the Trade-offs of Parallel Decoding in Diffusion LLMs",
    paper="2510.04767",
    date="2025-10",
    plugs_into="bench",
    exactness="model",
    claim="Decoding several tokens at once must fail on tasks whose tokens depend on each other, trivial as these are one "
    "by one, and no unmasking strategy adapts its speed to that.",
    no_help="A model that does not know a task one token per step: then the loss says little about parallel decoding.",
)

MAIN: Mapping[str, Task] = {task.name: task for task in (*LISTS, *TEXTS, *PUZZLES)}
TASKS: Mapping[str, Task] = {**MAIN, **{task.name: task for task in (*REPEATS, *EXTRA)}}
WORLDS: Mapping[str, Task] = {task.name: task for task in WORLD_TASKS}
SCORES = ("random", "prob", "margin", "entropy")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FACTORS = (0.7, 1.0, 1.3, 1.6, 1.9)


def fixed(score: str, length: int, block: int, steps: int) -> tuple[str, ...]:
    """The methods for `steps` even steps on a canvas of `length` tokens in blocks, positions ranked by `score`.

    Raises ConfigError unless blocks divide the canvas and steps are at most its tokens and divide among its blocks.
    """
    if score not in SCORES:
        raise unknown_name("score", score, SCORES)
    if length < 1:
        raise out_of_range("length", length, "at least 1")
    if block < 1 or length % block:
        allowed = ", ".join(str(b) for b in range(1, length + 1) if length % b == 0)
        raise out_of_range("block", block, f"a divisor of {length}: {allowed}")
    blocks = length // block
    if steps % blocks or not blocks <= steps <= length:
        allowed = ", ".join(str(s) for s in range(blocks, length + 1, blocks))
        raise out_of_range("steps", steps, f"a multiple of {blocks}, the number of blocks, up to {length}: {allowed}")
    return (f"reference:block={block},steps={steps},score={score}",)


def protocol(length: int) -> dict[str, list[tuple[str, ...]]]:
    """Family of settings -> methods of the published grid for a canvas of `length` tokens (32 or 64): for each score
    all powers of two as blocks and steps, for threshold and factor all blocks, and remasking beside the threshold."""
    if length not in (32, 64):
        raise out_of_range("length", length, "32 or 64")
    powers = [2**i for i in range(int(math.log2(length)) + 1)]
    grid = {
        score: [fixed(score, length, block, s) for block in powers for s in powers if s >= length // block]
        for score in SCORES
    }
    grid["threshold"] = [(f"reference:block={block}", f"threshold:tau={tau}") for block in powers for tau in THRESHOLDS]
    grid["factor"] = [(f"reference:block={block}", f"factor:f={f}") for block in powers for f in FACTORS]
    grid["remask"] = [
        (f"reference:block={block}", f"threshold:tau={tau}", "remask") for block in powers for tau in THRESHOLDS
    ]
    return grid


@dataclass(frozen=True, slots=True)
class Config:
    """Nothing to set: what is measured is asked of `measure`."""


class ParallelBench:
    """The suite for one model: the tasks in the words that it knows. It takes no part in decoding."""

    name = "parallelbench"

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.known, self.default = (WORLDS, WORLDS) if knows_worlds(context.capabilities) else (TASKS, MAIN)

    def choose(self, names: Sequence[str] | None = None) -> list[Task]:
        """The tasks of these names (default: all of the main suite); raises UnknownNameError."""
        for name in names or ():
            if name not in self.known:
                raise unknown_name("task", name, self.known, "known: " + ", ".join(self.known))
        return [self.known[name] for name in (self.default if names is None else names)]


method = ParallelBench


def measure(
    llm: LLM,
    methods: Sequence[Sequence[str]],
    *,
    seed: int,
    per_task: int,
    progress: Progress,
    tasks: Sequence[str] | None = None,
    items: Items = "symbols",
    lengths: Sequence[int] = (),
    temperature: float = 0.0,
    canvas: int | None = None,
    infill: bool = False,
) -> dict[str, Any]:
    """Quality over tokens per step of `methods` (each a list of parts, as for `llm.generate`) on the tasks; JSON-ready.

    `tasks`: names (default: the main suite); small models are asked in the words of `hasten.worlds`. Per task
    `per_task` test questions, drawn by `seed`, `lengths` (default: the task's) in turn, answered in one batch; `items`:
    symbols (one character) or names (two). `infill` gives the format and leaves the items, for models that fill canvases.
    `canvas`: tokens of an answer (default: 32 for lists, 64 for the rest, more where no right answer would fit).
    200 questions give +-3.5 points at 95 percent for scores near 93.

    Raises ConfigError for no methods, settings out of range, unknown tasks, a canvas shorter than the shortest answer.
    """
    if not methods or not all(methods):
        raise out_of_range("methods", list(methods), "at least one list of method names")
    if seed < 0:
        raise out_of_range("seed", seed, "at least 0")
    chosen = ParallelBench(Config(), MethodContext(llm.name, llm.model, llm.tokenizer)).choose(tasks)
    names = [tuple(one) for one in methods]
    for one in names:
        llm.parts(one)  # refuses what cannot be combined before anything runs
    asked = {task.name: questions(task, per_task, items=items, seed=42 + seed, lengths=lengths) for task in chosen}
    rooms = {task.name: room(llm, task, asked[task.name], canvas) for task in chosen}
    rows: dict[str, dict[str, Any]] = {task.name: {} for task in chosen}
    total = len(chosen) * len(names)
    for i, task in enumerate(chosen):
        for j, one in enumerate(names):
            progress("answering questions", i * len(names) + j, total)
            start = time.perf_counter()
            made = answer(
                llm, task, asked[task.name], one, seed=seed, temperature=temperature, canvas=rooms[task.name], infill=infill
            )  # fmt: skip
            rows[task.name]["+".join(one)] = summary(made, time.perf_counter() - start)
    progress("answering questions", total, total)
    judged = {task.name: {"canvas": rooms[task.name], **_task(task, asked[task.name], rows[task.name])} for task in chosen}
    return {
        "suite": card.slug,
        "model": llm.name,
        "words": "worlds" if knows_worlds(llm.model.capabilities) else "plain",
        "items": items,
        "infill": infill,
        "temperature": temperature,
        "seed": seed,
        "per_task": per_task,
        "methods": {"+".join(one): list(one) for one in names},
        "tasks": judged,
        "facts": _facts(judged),
        "machine": machine(),
    }


def summary(made: Sequence[Answered], seconds: float | None = None) -> dict[str, Any]:
    """The figures of one task under one setting; scores in percent, `seconds` of the batch per answer."""

    def mean(values: Sequence[float | None], factor: float = 1.0) -> float | None:
        known = [value for value in values if value is not None]
        return round(factor * sum(known) / len(known), 3) if known else None

    known = [one for one in made if one.oracle is not None]
    gap = [100 * (one.oracle or 0.0) - 100 * one.loose for one in known]
    nfe = sum(one.nfe for one in made)
    return {
        "answers": len(made),
        "too_long": sum(not one.fits for one in made),
        "score": mean([one.loose for one in made], 100),
        "score_strict": mean([one.strict for one in made], 100),
        "by_length": {
            str(n): mean([a.loose for a in made if a.length == n], 100) for n in sorted({a.length for a in made})
        },
        "nfe": mean([one.nfe for one in made]),
        "tokens_per_step": round(sum(one.tokens for one in made) / nfe, 3) if nfe else 0.0,
        **({} if seconds is None else {"seconds_per_answer": round(seconds / len(made), 4)}),
        **{name: mean([one.order[name] for one in made]) for name in made[0].order},
        "oracle": mean([one.oracle for one in known], 100),
        "validity_gap": mean(gap),
    }


def _task(task: Task, asked: Sequence[Question], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A task's rows by method, and what they say together."""
    points = [(row["tokens_per_step"], row["score"]) for row in rows.values()]
    mean = curves.area(points)
    return {
        "group": task.group,
        "total_correlation": correlation(task, asked),
        "area": None if mean is None else round(mean, 3),
        "adaptivity": curves.adaptive(points),
        "methods": dict(rows),
    }


def correlation(task: Task, asked: Sequence[Question]) -> dict[str, float]:
    """Length -> total correlation of a question's right answers in nats; empty where they cannot all be listed."""
    from hasten.bench.parallel.theory import Law

    if not task.complete:
        return {}
    first: dict[int, Question] = {}
    for question in asked:
        first.setdefault(question.meta["length"], question)
    laws = {n: Law.of(list(task.pieces(question))) for n, question in sorted(first.items()) if n <= LISTED}
    return {str(n): round(law.total_correlation(), 4) for n, law in laws.items()}


def _facts(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what, figures) of every task and method, for people."""
    out = []
    for name, task in tasks.items():
        for setting, row in task["methods"].items():
            text = f"{row['score']:.1f} percent right at {row['tokens_per_step']:.2f} tokens per step"
            if row["oracle"] is not None:
                text += f", exact conditionals {row['oracle']:.1f}"
            out.append((f"{name}, {setting}", text))
        known = task["total_correlation"].values()
        least = f"total correlation {min(known):.2f} to {max(known):.2f} nats; " if known else ""
        most = "nothing to lose" if task["adaptivity"] is None else f"{task['adaptivity']:.2f} tokens per step"
        out.append((name, f"{least}within a point of the slowest: {most}"))
    return out
