"""What a task of the suite is made of: questions drawn from rules, the split they belong to, and their text.

Deterministic: the questions of a task depend on its name, the items, the split and the seed alone. A list that occurs in
one split occurs in no other (by its hash), and the solved example before a question is of the training split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from hasten.bench.parallel.metrics import Answer, Metric
from hasten.errors import out_of_range
from hasten.worlds import Split, split_of

Items = Literal["symbols", "names"]
Pieces = Iterator[tuple[str, ...]]  # right answers, each as the tokens that a model without format would write
ITEMS: Mapping[str, tuple[str, ...]] = {
    "symbols": tuple("abcdefghijklmnopqrstuvwxyz0123456789"),
    "names": tuple(a + b for a in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for b in "abcdefghijklmnopqrstuvwxyz"),
}
_TRIES = 2_000  # per question wanted, before a task counts as exhausted


@dataclass(frozen=True, slots=True)
class Drawn:
    """One question as a rule draws it: `fields` of its text, the `answer`, the `key` that decides its split.

    `meta` is what is told about it (length, index, word); `key` is the same for questions about the same list.
    """

    fields: Mapping[str, Any]
    answer: Answer
    key: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """One question: `prompt` (a solved example and the question), `answer` (a text, or what its metric must know),
    `output_format` (a right answer with a slot for every item), `meta` (length, index, word, width of an item)."""

    task: str
    prompt: str
    answer: Answer
    output_format: str
    meta: Mapping[str, Any]

    @property
    def example(self) -> str:
        """A right answer."""
        return str(self.facts["example"])

    @property
    def facts(self) -> Mapping[str, Any]:
        """The answer as what its metric knows."""
        return {"example": self.answer} if isinstance(self.answer, str) else self.answer

    def line(self) -> str:
        """The question as one line of JSON."""
        names = ("task", "prompt", "answer", "output_format", "meta")
        return json.dumps({name: getattr(self, name) for name in names}, ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question. `group`: list, text, puzzle, extra or world. `lengths` are its usual numbers of items, `budget`
    the tokens of an answer's canvas. `draw(rng, n, items)` draws one, `pieces(question)` gives right answers as equally
    many tokens: all of them where `complete`; `render(pieces, question)` writes one of them.
    """

    name: str
    group: Literal["list", "text", "puzzle", "extra", "world"]
    lengths: tuple[int, ...]
    budget: int
    text: str
    draw: Callable[[Random, int, Sequence[str]], Drawn]
    metric: Metric
    pieces: Callable[[Question], Pieces]
    render: Callable[[Sequence[str], Question], str]
    range: tuple[int, int] | None = None  # of lengths; None: as many as there are items
    complete: bool = True
    repeats: bool = False  # whether questions may occur twice: where there are few
    shown: bool = True  # whether a solved example precedes the question

    def score(self, question: Question, text: str) -> tuple[bool, bool]:
        """(right to a loose reader, to a strict one)."""
        return self.metric(text, question.answer, False), self.metric(text, question.answer, True)


def seed_of(task: str, seed: int) -> int:
    """The seed of a task's questions: sha256 of its name, and the base seed, mod 65535."""
    return (int.from_bytes(hashlib.sha256(task.encode()).digest(), "big") + seed) % 65535


def questions(
    task: Task, count: int, *, items: Items = "symbols", split: Split = "test", seed: int = 42, lengths: Sequence[int] = ()
) -> list[Question]:
    """`count` questions of a task, different ones, their lengths in turn; more of a count begins with the fewer ones.

    Raises ConfigError for a count below 1, unknown items, a length the task has not, and where the rules have not so many.
    """
    if count < 1:
        raise out_of_range("count", count, "at least 1")
    if items not in ITEMS:
        raise out_of_range("items", items, " or ".join(ITEMS))
    chosen = tuple(lengths) or task.lengths
    least, most = task.range or (1, len(ITEMS[items]) - 1)
    for n in chosen:
        if not least <= n <= most:
            raise out_of_range("length", n, f"in [{least}, {most}] for task {task.name!r}")
    rng, out, known = Random(f"{seed_of(task.name, seed)} {items} {split}"), [], set()  # noqa: S311 - tasks, not secrets
    for i in range(count):
        n = chosen[i % len(chosen)]
        for _ in range(_TRIES):
            drawn = _draw(task, rng, n, items, split)
            text = _ask(task, drawn)
            if task.repeats or text not in known:
                break
        else:
            raise out_of_range("count", count, f"at most about {i}: the {split} questions of {task.name!r} run out")
        known.add(text)
        if task.shown:
            before = _draw(task, rng, n, items, "train")
            text = f"{_ask(task, before)}\n{_example(before)}\n\n{text}"
        out.append(_question(task, drawn, text, n, items))
    return out


def _draw(task: Task, rng: Random, n: int, items: Items, split: Split) -> Drawn:
    """A question of this split; raises ConfigError where no draw is of it."""
    for _ in range(_TRIES):
        drawn = task.draw(rng, n, ITEMS[items])
        if split_of(drawn.key) == split:
            return drawn
    raise out_of_range("length", n, f"one of which the split {split!r} has questions of {task.name!r}")


def _ask(task: Task, drawn: Drawn) -> str:
    return task.text.format(**drawn.fields)


def _example(drawn: Drawn) -> str:
    return drawn.answer if isinstance(drawn.answer, str) else str(drawn.answer["example"])


def _question(task: Task, drawn: Drawn, prompt: str, n: int, items: Items) -> Question:
    meta = {"length": n, "width": len(ITEMS[items][0]), **drawn.meta}
    made = Question(task.name, prompt, drawn.answer, "", meta)
    blank = tuple("<mask>" for _ in next(task.pieces(made)))
    return Question(task.name, prompt, drawn.answer, task.render(blank, made), meta)


def lines(asked: Sequence[Question]) -> str:
    """The questions as JSON lines: equal for equal seeds, to the byte."""
    return "".join(question.line() + "\n" for question in asked)
