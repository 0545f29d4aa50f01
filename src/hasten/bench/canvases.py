"""The experiment that reproductions of canvas methods share: mini-dlm on procedural worlds, every answer verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from hasten.bench.compare import SEEDS
from hasten.bench.report import Progress, Reproduction, Spread, machine
from hasten.errors import out_of_range, unknown_name
from hasten.worlds import WORLDS as CATALOG
from hasten.worlds import Sample, split_of

if TYPE_CHECKING:
    from hasten.llm import LLM

WORLDS = ("copy", "reverse", "sort", "close", "records")  # of what mini-dlm knows; its sums are weak
_CACHE_BYTES = 400_000_000


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt: the seed it was drawn by, its world, and the sample that knows how to verify an answer."""

    seed: int
    world: str
    sample: Sample


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer by one arm: its text, whether the verifier accepts all of it, and what it cost."""

    text: str
    right: bool
    seconds: float
    nfe: int
    computed: int


@dataclass(frozen=True, slots=True)
class Row:
    """One task with the answers of all arms, by name."""

    task: Task
    answers: Mapping[str, Answer]


def open_mini(progress: Progress, name: str = "mini-dlm") -> LLM:
    """A small model that comes with hasten."""
    import hasten

    return hasten.load(name, cache_bytes=_CACHE_BYTES, progress=progress)


def tasks(worlds: Sequence[str], canvas: int, per_world: int, seeds: Sequence[int] = SEEDS) -> list[Task]:
    """`per_world` unseen samples of each world for each seed, all different, as long as the canvas allows.

    Answers need more than half the canvas where the world has such; else they are its longest, end tokens behind.
    Raises UnknownNameError, and ConfigError for a world whose shortest answer does not fit.
    """
    out, known = [], set()
    for seed in seeds:
        for name in worlds:
            if name not in CATALOG:
                raise unknown_name("world", name, CATALOG)
            world = CATALOG[name]
            sizes = world.fitting(canvas, canvas // 2) or world.fitting(canvas)[-2:]
            if not sizes:
                raise out_of_range("canvas", canvas, f"at least {world.length(world.sizes[0]) + 1} for world {name}")
            rng, found = Random(f"{name} {canvas} {seed} bench"), 0  # noqa: S311 - tasks, not secrets
            while found < per_world:
                sample = world.generate(rng, world.difficulty(rng.choice(sizes)))
                if split_of(sample.prompt) == "test" and sample.prompt not in known:
                    known.add(sample.prompt)
                    out.append(Task(seed, name, sample))
                    found += 1
    return out


@dataclass(frozen=True, slots=True)
class Trial:
    """All answers of one comparison, and the figures worked out from them."""

    rows: tuple[Row, ...]
    canvas: int

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms, the one the others are measured against first."""
        return tuple(self.rows[0].answers)

    @property
    def worlds(self) -> tuple[str, ...]:
        """The worlds of the tasks."""
        return tuple(dict.fromkeys(row.task.world for row in self.rows))

    def _of(self, arm: str) -> str:
        if arm not in self.arms:
            raise unknown_name("arm", arm, self.arms)
        return arm

    def over_seeds(self, figure: Callable[[Sequence[Row]], float], world: str = "") -> Spread:
        """A figure of rows, worked out for each seed (and for one world, if given)."""
        seeds = dict.fromkeys(row.task.seed for row in self.rows)
        per_seed = [[r for r in self.rows if r.task.seed == seed and world in ("", r.task.world)] for seed in seeds]
        return Spread.of([figure(rows) for rows in per_seed if rows])

    def accuracy(self, arm: str, world: str = "") -> Spread:
        """Answers that are right in full, in percent."""
        name = self._of(arm)
        return self.over_seeds(lambda rows: 100 * sum(row.answers[name].right for row in rows) / len(rows), world)

    def nfe(self, arm: str, world: str = "") -> Spread:
        """Forwards per answer."""
        name = self._of(arm)
        return self.over_seeds(lambda rows: sum(row.answers[name].nfe for row in rows) / len(rows), world)

    def computed(self, arm: str, world: str = "") -> Spread:
        """Query tokens through the model per answer."""
        name = self._of(arm)
        return self.over_seeds(lambda rows: sum(row.answers[name].computed for row in rows) / len(rows), world)

    def speedup(self, arm: str, over: str = "", world: str = "") -> Spread:
        """The wall time of `over` (default: the first arm) divided by the arm's, over the same tasks."""
        name, base = self._of(arm), self._of(over or self.arms[0])

        def ratio(rows: Sequence[Row]) -> float:
            return sum(row.answers[base].seconds for row in rows) / sum(row.answers[name].seconds for row in rows)

        return self.over_seeds(ratio, world)

    def same_text(self, arm: str, over: str = "") -> tuple[int, int]:
        """(answers whose text is that of `over` (default: the first arm), all answers)."""
        name, base = self._of(arm), self._of(over or self.arms[0])
        return sum(row.answers[name].text == row.answers[base].text for row in self.rows), len(self.rows)

    def by_world(self, arm: str) -> dict[str, dict[str, float]]:
        """World -> {"accuracy", "nfe", "speedup"}, medians over seeds."""
        return {
            world: {
                "accuracy": self.accuracy(arm, world).median,
                "nfe": self.nfe(arm, world).median,
                "speedup": self.speedup(arm, world=world).median,
            }
            for world in self.worlds
        }

    def to_dict(self) -> dict[str, Any]:
        """arm -> figures; JSON-ready."""
        return {
            arm: {
                "accuracy": self.accuracy(arm).to_dict(),
                "nfe": self.nfe(arm).to_dict(),
                "computed_tokens": self.computed(arm).to_dict(),
                "speedup": self.speedup(arm).to_dict(),
                "same_text": list(self.same_text(arm)),
                "worlds": self.by_world(arm),
            }
            for arm in self.arms
        }


def trial(
    llm: LLM,
    arms: Mapping[str, Sequence[str]],
    *,
    quick: bool,
    progress: Progress,
    worlds: Sequence[str] = WORLDS,
    canvas: int = 64,
    per_world: int | None = None,
    models: Mapping[str, LLM] | None = None,
) -> Trial:
    """Answer unseen tasks by every arm (a name and its methods), in turn, on a canvas of so many tokens.

    The first arm is the one the others are measured against; the order of arms turns from task to task. `models` names arms
    that another model answers. Each seed starts with an answer that is not counted.
    """
    names = list(arms)
    if len(names) < 2:
        raise out_of_range("arms", names, "at least two")
    chosen = tasks(worlds, canvas, per_world or (2 if quick else 10))
    rows: list[Row] = []
    seed = None
    for i, task in enumerate(chosen):
        progress("answering tasks", i, len(chosen))
        turn = i % len(names)
        if task.seed != seed:
            seed = task.seed
            for name in names:
                answer(_model(llm, models, name), task, arms[name], canvas)
        answers = {
            name: answer(_model(llm, models, name), task, arms[name], canvas) for name in names[turn:] + names[:turn]
        }
        rows.append(Row(task, {name: answers[name] for name in names}))
    progress("answering tasks", len(chosen), len(chosen))
    return Trial(tuple(rows), canvas)


def _model(llm: LLM, models: Mapping[str, LLM] | None, name: str) -> LLM:
    return llm if models is None else models.get(name, llm)


def answer(llm: LLM, task: Task, methods: Sequence[str], canvas: int) -> Answer:
    """One answer to a task, greedily, and whether it is right."""
    start = time.perf_counter()
    out = llm.generate(task.sample.prompt, method=list(methods), max_tokens=canvas, seed=0)
    seconds = time.perf_counter() - start
    right = CATALOG[task.world].verify(task.sample.meta, out.text) == 1
    return Answer(out.text, right, seconds, out.usage.forwards, out.usage.computed_tokens)


def conclude(
    slug: str, done: Trial, main: str, holds: bool, started: float, *, over: str = "", quick: bool = False, **extra: Any
) -> Reproduction:
    """The record of a trial: `main` is the method's own arm, `holds` whether the claim's direction came out.

    The speed-up and the baseline's quality are those of `over` (default: the first arm). `started` is `time.perf_counter()`
    at the beginning. Where it does not help is the world it speeds up least, as measured.
    """
    from hasten.registry import card

    base = over or done.arms[0]
    least = min(done.worlds, key=lambda world: done.speedup(main, base, world).median)
    return Reproduction(
        slug=slug,
        claim=card(slug).claim,
        direction_holds=holds,
        speedup=done.speedup(main, base),
        quality={"baseline": done.accuracy(base).median, "method": done.accuracy(main).median},
        extra={
            "model": "mini-dlm",
            "quick": quick,
            "quality_is": "answers right in full, percent (median over seeds)",
            "against": base,
            "canvas": done.canvas,
            "tasks": len(done.rows),
            **extra,
            "bars_of": "speedup",
            "bars": [{"label": arm, **done.speedup(arm).to_dict()} for arm in done.arms],
            "methods": done.to_dict(),
        },
        no_help=f"Least on the world {least!r} here: {done.speedup(main, base, least)}x. {card(slug).no_help}",
        machine=machine(),
        seeds=tuple(dict.fromkeys(row.task.seed for row in done.rows)),
        seconds=round(time.perf_counter() - started, 1),
    )
