"""Several ways to answer the same prompts, timed in turn in one process: the shared part of benchmarks and reproductions.

Every prompt is answered by every method before the next prompt comes, and the order of methods turns from prompt to prompt,
so that a machine that slows down slows all of them. Seeds draw disjoint prompts; a figure is worked out for each seed and
stated as the median over seeds with the least and the greatest. Ratios of two methods' times are the only speed claims.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hasten.bench.report import Progress, Spread
from hasten.bench.suites import draws
from hasten.errors import out_of_range, unknown_name

if TYPE_CHECKING:
    from hasten.engine.engine import Parts
    from hasten.llm import LLM
    from hasten.types import Event

SEEDS = (0, 1, 2)
BASELINES = {"plain": "plain", "prompt-lookup": "prompt-lookup"}  # what every drafter is compared with


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer by one method: its tokens and what it cost. `seconds` is the whole request, `decode_s` without reading
    the prompt, `passes` target passes after the prompt (0 where a peer does not tell), `draft_s` time spent drafting.
    `computed`: query tokens through the model. `drafts`: (depth of a draft, how many of its tokens were kept) of every pass
    that verified one. `commits`: (place after the prompt, forward in which it became final) of a canvas."""

    tokens: tuple[int, ...]
    seconds: float
    decode_s: float
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    computed: int = 0
    drafts: tuple[tuple[int, int], ...] = ()
    commits: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one prompt, the seed and the group of tasks it was drawn from."""

    seed: int
    group: str
    ids: tuple[int, ...]


Runner = Callable[[Prompt, int], Answer]  # (prompt, new tokens) -> the answer


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with the answers of all methods, by name."""

    prompt: Prompt
    answers: Mapping[str, Answer]


def prompts(llm: LLM, per_group: int, seeds: Sequence[int] = SEEDS, groups: Sequence[str] = ()) -> list[Prompt]:
    """`per_group` chat prompts of each group for each seed, disjoint, through the model's chat template."""
    out = []
    for seed in seeds:
        drawn = draws(per_group, seed, tuple(groups)) if groups else draws(per_group, seed)
        for group, texts in drawn.items():
            out += [Prompt(seed, group, tuple(llm.chat_ids([{"role": "user", "content": text}]))) for text in texts]
    return out


def runner(
    llm: LLM,
    method: str | Sequence[str] | Callable[[], Parts],
    *,
    ends: bool = False,
    whole: bool = False,
    **sampling: Any,
) -> Runner:
    """Answers by hasten with a method, named as in `generate`, or given as a function that makes its parts.

    The engine's random numbers for a prompt are seeded by the prompt, alike for all methods. `ends`: an answer ends where
    the model ends it, else it goes on past end tokens. `whole`: all that is drafted is verified, not only what pays here.
    """
    from hasten.types import Request, SamplingParams

    def run(prompt: Prompt, tokens: int) -> Answer:
        names = (method,) if isinstance(method, str) else () if callable(method) else tuple(method)
        parts = method() if callable(method) else llm.parts(names)
        parts = replace(parts, measured=False) if whole else parts
        seed = (prompt.seed * 1_000_003 + sum(prompt.ids)) % 2**31
        params = SamplingParams(max_tokens=tokens, ignore_eos=not ends, seed=seed, **sampling)
        events: list[Event] = []
        start = time.perf_counter()
        [[out]] = llm.engine.run([(Request(prompt.ids, params, names or ("given",)), parts)], events.append)
        seconds = time.perf_counter() - start
        u = out.usage
        counts = (u.forwards, u.drafted_tokens, u.accepted_tokens, u.draft_s, u.computed_tokens)
        commits = _commits(events, len(prompt.ids)) if llm.model.capabilities.kind == "masked" else ()
        return Answer(out.tokens, seconds, u.decode_s, *counts, drafts=_drafts(events), commits=commits)

    return run


def _drafts(events: Sequence[Event]) -> tuple[tuple[int, int], ...]:
    """(depth, tokens kept) of every draft."""
    found: list[tuple[int, int]] = []
    for event in events:
        if event.kind == "draft":
            depths: list[int] = []
            for parent in event.parents:
                depths.append(1 if parent < 0 else depths[parent] + 1)
            found.append((max(depths), 0))
        elif event.kind == "accept":
            found[-1] = (found[-1][0], len(event.tokens))
    return tuple(found)


def _commits(events: Sequence[Event], start: int) -> tuple[tuple[int, int], ...]:
    """(place after the prompt, forward) of what is final at the end, in the order of places."""
    forwards, final = 0, {}
    for event in events:
        if event.kind == "forward":
            forwards += 1
        elif event.kind == "commit" and event.token >= 0:
            final[event.position - start] = forwards
        elif event.kind == "commit":  # taken back
            final.pop(event.position - start, None)
    return tuple(sorted(final.items()))


def compare(
    runners: Mapping[str, Runner],
    over: Sequence[Prompt],
    tokens: int,
    progress: Progress | None = None,
    fresh: Callable[[], None] | None = None,
    what: str = "comparing",
    warm: Sequence[str] = (),
    least: int = 2,
) -> Comparison:
    """Answer every prompt with `tokens` new tokens by every runner, in turn; `fresh` is called before each seed's first.

    The first runner is the one the others are measured against. Each seed starts with answers that are not counted: one of
    the first runner, and before `fresh` one of each of `warm`. Raises ConfigError for fewer than `least` runners, and when
    there is nothing to compare.
    """
    names = list(runners)
    if len(names) < least:
        raise out_of_range("runners", names, f"at least {'two' if least == 2 else least}")
    if not over:
        raise out_of_range("prompts", over, "at least one")
    rows: list[Row] = []
    seed = None
    for i, prompt in enumerate(over):
        if progress is not None:
            progress(what, i, len(over))
        if prompt.seed != seed:
            seed = prompt.seed
            for name in warm:
                runners[name](prompt, min(tokens, 8))
            if fresh is not None:
                fresh()
            runners[names[0]](prompt, min(tokens, 8))
        turn = i % len(names)
        answers = {name: runners[name](prompt, tokens) for name in names[turn:] + names[:turn]}
        rows.append(Row(prompt, {name: answers[name] for name in names}))
    if progress is not None:
        progress(what, len(over), len(over))
    return Comparison(tuple(rows))


@dataclass(frozen=True, slots=True)
class Comparison:
    """All answers of one comparison, and the figures worked out from them."""

    rows: tuple[Row, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The methods, the one the others are measured against first."""
        return tuple(self.rows[0].answers)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds in the order they were run."""
        return tuple(dict.fromkeys(row.prompt.seed for row in self.rows))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of prompts."""
        return tuple(dict.fromkeys(row.prompt.group for row in self.rows))

    def over_seeds(self, figure: Callable[[Sequence[Row]], float], group: str = "") -> Spread:
        """A figure of rows, worked out for each seed (and for one group, if given)."""
        if group and group not in self.groups:
            raise unknown_name("group", group, self.groups)
        per_seed = [
            [row for row in self.rows if row.prompt.seed == seed and group in ("", row.prompt.group)] for seed in self.seeds
        ]
        return Spread.of([figure(rows) for rows in per_seed if rows])

    def speedup(self, method: str, over: str = "", group: str = "", whole: bool = False) -> Spread:
        """The time of `over` (default: the first method) divided by the method's, for decoding or the `whole` request.

        All answers have the same number of tokens, so this is the ratio of tokens per second.
        """
        base = self._name(over or self.names[0])
        name = self._name(method)

        def cost(answer: Answer) -> float:
            return answer.seconds if whole else answer.decode_s

        return self.over_seeds(
            lambda rows: sum(cost(row.answers[base]) for row in rows) / sum(cost(row.answers[name]) for row in rows), group
        )

    def tokens_per_s(self, method: str, group: str = "") -> Spread:
        """Tokens per second of decoding."""
        name = self._name(method)
        return self.over_seeds(
            lambda rows: (
                sum(len(row.answers[name].tokens) - 1 for row in rows) / sum(row.answers[name].decode_s for row in rows)
            ),
            group,
        )

    def tokens_per_pass(self, method: str, group: str = "") -> Spread:
        """Tokens per target pass after the one that read the prompt (block efficiency); 0 where passes are not known."""
        name = self._name(method)

        def figure(rows: Sequence[Row]) -> float:
            passes = sum(row.answers[name].passes for row in rows)
            return sum(len(row.answers[name].tokens) - 1 for row in rows) / passes if passes else 0.0

        return self.over_seeds(figure, group)

    def pass_cost(self, method: str, group: str = "") -> Spread:
        """Seconds per pass, drafting included, as a multiple of the first method's; 0 where passes are not known."""
        name, base = self._name(method), self.names[0]

        def each(rows: Sequence[Row], which: str) -> float:
            passes = sum(row.answers[which].passes for row in rows)
            return sum(row.answers[which].decode_s for row in rows) / passes if passes else 0.0

        return self.over_seeds(lambda rows: each(rows, name) / (each(rows, base) or 1.0), group)

    def drafting(self, method: str, group: str = "") -> Spread:
        """Share of the decoding time spent drafting and choosing what to verify, in [0, 1]."""
        name = self._name(method)
        return self.over_seeds(
            lambda rows: sum(row.answers[name].draft_s for row in rows) / sum(row.answers[name].decode_s for row in rows),
            group,
        )

    def same_text(self, method: str) -> tuple[int, int]:
        """(answers equal to the first method's, token by token; all answers)."""
        name, base = self._name(method), self.names[0]
        return sum(row.answers[name].tokens == row.answers[base].tokens for row in self.rows), len(self.rows)

    def figures(self, method: str, group: str = "") -> dict[str, Any]:
        """All figures of one method, JSON-ready, spreads as {median, min, max}."""
        spreads = {
            "speedup": self.speedup(method, group=group),
            "whole_request": self.speedup(method, group=group, whole=True),
            "tokens_per_s": self.tokens_per_s(method, group),
        }
        if any(row.answers[method].passes for row in self.rows):
            spreads |= {
                "tokens_per_pass": self.tokens_per_pass(method, group),
                "pass_cost": self.pass_cost(method, group),
                "drafting": self.drafting(method, group),
            }
        return {name: spread.to_dict() for name, spread in spreads.items()}

    def to_dict(self) -> dict[str, Any]:
        """method -> figures over everything, by group, and how many texts are those of the first method; JSON-ready."""
        out: dict[str, Any] = {}
        for name in self.names:
            same, of = self.same_text(name)
            by_group = {group: self.figures(name, group) for group in self.groups}
            out[name] = {**self.figures(name), "same_text": [same, of], "groups": by_group}
        return out

    def least_helped(self, method: str) -> tuple[str, Spread]:
        """The group of prompts the method speeds up least, and by how much."""
        return min(((group, self.speedup(method, group=group)) for group in self.groups), key=lambda one: one[1].median)

    def _name(self, method: str) -> str:
        if method not in self.names:
            raise unknown_name("method", method, self.names)
        return method
