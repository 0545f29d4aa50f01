"""The same kinds of task in the words of hasten's procedural worlds, for the small models, which know no others.

Of `hasten.worlds`: lists of letters for reverse, sort, shuffle, replace and remove (the letter is named, so these two have
one right answer), words for copy, brackets, arithmetic and records. Questions are of the worlds' own splits. Shuffle is
stricter than its world: as in ParallelBench the given order is no answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from hasten.bench.parallel.lists import cut, orders
from hasten.bench.parallel.questions import Drawn, Pieces, Question, Task
from hasten.worlds import WORLDS, World

_LISTS = {"copy": 3, "reverse": 1, "sort": 1, "shuffle": 1, "replace": 1, "remove": 1}  # characters of an item
_LENGTHS = {"close": (6, 7, 8, 9), "add": (2, 3), "subtract": (2, 3), "sums": (4, 5), "records": (1, 2)}


def _task(world: World) -> Task:
    width = _LISTS.get(world.name, 0)

    def draw(rng: Random, n: int, items: Sequence[str]) -> Drawn:
        sample = world.generate(rng, world.difficulty(n))
        answer = {"example": sample.answer, **sample.meta}
        return Drawn({"prompt": sample.prompt}, answer, sample.prompt, {"width": width or 1})

    def metric(text: str, answer: Mapping[str, Any], strict: bool) -> bool:
        if not strict:
            text = text.strip()
        kept = world.name == "shuffle" and text == " ".join(answer["items"])
        return world.verify(answer, text) == 1 and not kept

    def pieces(question: Question) -> Pieces:
        if world.name == "shuffle":
            yield from (tuple(order) for order in orders(question.facts["items"]))
        else:
            yield tuple(question.example.replace(" ", "") if width else question.example)

    def render(given: Sequence[str], question: Question) -> str:
        return " ".join(cut(given, width)) if width else "".join(given)

    lengths = _LENGTHS.get(world.name, (3, 4, 5, 6))
    budget = 64 if world.name == "records" else 32
    return Task(
        world.name, "world", lengths, budget, "{prompt}", draw, metric, pieces, render, range=world.sizes, shown=False
    )  # fmt: skip


WORLD_TASKS = tuple(_task(world) for world in WORLDS.values())
