"""ParallelBench on mini-dlm: what a task loses when all its tokens are written in one step, by its total correlation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.bench.compare import SEEDS
from hasten.bench.report import Progress, Reproduction, Spread, machine

if TYPE_CHECKING:
    from hasten.bench.parallel.oracle import Conditional
    from hasten.llm import LLM

claim_checked = (
    "On unseen lists of three to five items, their format given, mini-dlm loses right answers on shuffle (total "
    "correlation above 0) between one token per step and all in one, and a larger share of them than on the average of "
    "copy, reverse and sort (total correlation 0), in each of three seeds; beside it the oracle against theory."
)

DEPENDENT, INDEPENDENT = "shuffle", ("copy", "reverse", "sort")
LENGTHS = (3, 4, 5)
STEPS = {"one token per step": 0, "two steps": 2, "one step": 1}
FIRST, LAST = "one token per step", "one step"
QUESTIONS = {True: (36, 12), False: (120, 30)}  # per seed, of shuffle and of each other task: shuffle is seldom right
DRAWS = 20_000


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of ParallelBench (2510.04767) on this machine; nothing is timed."""
    from hasten.bench.canvases import open_mini
    from hasten.registry import card

    started = time.perf_counter()
    llm = open_mini(progress)
    rows = trial(llm, quick, progress)
    lost = {task: [_lost(rows[task], i) for i in range(len(SEEDS))] for task in rows}
    others = [sum(lost[task][i] for task in INDEPENDENT) / len(INDEPENDENT) for i in range(len(SEEDS))]
    holds = all(mine > max(0.0, rest) for mine, rest in zip(lost[DEPENDENT], others, strict=True))
    score = {
        task: {arm: Spread.of([one["score"] for one in found]) for arm, found in arms.items()}
        for task, arms in rows.items()
    }
    pace = {task: Spread.of([one["tokens_per_step"] for one in arms["threshold"]]) for task, arms in rows.items()}
    adapts = pace[DEPENDENT].median < min(pace[task].median for task in INDEPENDENT)
    first, last = score[DEPENDENT][FIRST], score[DEPENDENT][LAST]
    worst = max(INDEPENDENT, key=lambda task: Spread.of(lost[task]).median)
    return Reproduction(
        slug="parallelbench",
        claim=card("parallelbench").claim,
        direction_holds=holds,
        speedup=None,
        quality={"baseline": first.median, "method": last.median},
        extra={
            "model": llm.name,
            "quick": quick,
            "quality_is": f"right answers on {DEPENDENT}, percent (median over seeds), one token per step and all in one",
            "note": f"mini-dlm knows {DEPENDENT} badly even one token per step ({first} percent), so shares of what it "
            "gets right are compared; the oracle shows what exact conditionals would give. The claim's other half is not "
            "tried, but the threshold of 0.9 writes "
            + ", ".join(f"{pace[task].median:.1f} tokens per step on {task}" for task in rows)
            + (" here: it adapts." if adapts else " here: it does not adapt."),
            "threshold_tokens_per_step": {task: spread.to_dict() for task, spread in pace.items()},
            "share_lost": {task: Spread.of(values).to_dict() for task, values in lost.items()},
            "bars_of": "right answers, percent",
            "bars": [
                {"label": f"{task}, {arm}", **spread.to_dict()}
                for task, arms in score.items()
                for arm, spread in arms.items()
            ],
            "oracle": oracle(),
            "tasks": rows,
        },
        no_help=f"On {worst} here total correlation 0 is no promise: its marginals are not exact, and one step loses "
        f"{100 * Spread.of(lost[worst]).median:.0f} percent of its right answers. {card('parallelbench').no_help}",
        machine=machine(),
        seeds=SEEDS,
        seconds=round(time.perf_counter() - started, 1),
    )


def _lost(arms: Mapping[str, list[dict[str, Any]]], seed: int) -> float:
    """The share of the right answers at one token per step that one step loses; 0 where there are none to lose."""
    before, after = arms[FIRST][seed]["score"], arms[LAST][seed]["score"]
    return float(1 - after / before) if before else 0.0


def trial(llm: LLM, quick: bool, progress: Progress) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Task -> arm -> figures of each seed, greedily; the threshold beside the fixed numbers of steps."""
    from hasten.bench.parallel.answers import answer
    from hasten.bench.parallel.questions import questions
    from hasten.bench.parallelbench import WORLDS, summary

    arms: dict[str, tuple[str, ...]] = {name: (f"reference:block=64,steps={n}",) for name, n in STEPS.items()}
    arms["threshold"] = ("reference:block=64", "threshold")
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    names = (DEPENDENT, *INDEPENDENT)
    total, done = len(names) * len(SEEDS) * len(arms), 0
    for task in names:
        rows[task] = {arm: [] for arm in arms}
        count = QUESTIONS[quick][task != DEPENDENT]
        for seed in SEEDS:
            asked = questions(WORLDS[task], count, seed=seed, lengths=LENGTHS)
            for arm, methods in arms.items():
                progress("answering questions", done, total)
                made = answer(llm, WORLDS[task], asked, methods, seed=seed, infill=True)
                rows[task][arm].append(summary(made))
                done += 1
    progress("answering questions", total, total)
    return rows


def oracle() -> list[dict[str, Any]]:
    """What exact conditionals give by simulation, beside the closed forms: five items, each number of tokens per step."""
    from hasten.bench.parallel.oracle import Orders, simulate
    from hasten.bench.parallel.theory import quotas, replace_random_law, replace_random_validity, shuffle_validity

    out = []
    laws: tuple[tuple[str, Conditional, Callable[[int, Sequence[int]], float]], ...] = (
        ("shuffle", Orders(5), shuffle_validity),
        ("replace_random", replace_random_law(5), replace_random_validity),
    )
    for task, law, closed in laws:
        for k in (1, 2, 5):
            steps = quotas(5, k)
            drawn = simulate(law, steps, DRAWS, seed=k)
            out.append(
                {"task": task, "items": 5, "tokens_per_step": k, "simulated": drawn, "exact": round(closed(5, steps), 4)}
            )
    return out
