"""The suites of `hasten bench` whose prompts are answered by every arm in turn: what a case is, and one file per suite.

A suite's file holds `suite` (a Suite) and `cases(llm, options, seeds)`, which gives the same cases for the same arguments.
One that can be refused before a model is loaded has `ready(options)` too. `NAMES` are the suites by name; `find` imports
one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hasten.bench.compare import Prompt
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, out_of_range, unknown_name

if TYPE_CHECKING:
    from hasten.llm import LLM

NAMES = ("spec", "canvas", "humaneval", "tasks", "prompts")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer: `score` in [0, 1], 1 for a right answer, and a `note` that says why."""

    score: float
    note: str = ""


Judge = Callable[[str], Verdict]


@dataclass(frozen=True, slots=True)
class Case(Prompt):
    """One prompt of a suite: `ids` (what the model reads), drawn by `seed`, in `group`, answered with at most `tokens`
    tokens.

    `text` is what people read of it. `judge` scores an answer; without one, answers are compared with those of the first
    arm. Raises ConfigError naming the field.
    """

    tokens: int = 64
    text: str = ""
    judge: Judge | None = None

    def __post_init__(self) -> None:
        if not self.ids or not all(type(one) is int and one >= 0 for one in self.ids):
            raise out_of_range("ids", self.ids, "token ids >= 0, at least one")
        if type(self.tokens) is not int or not 1 <= self.tokens <= LIMITS.max_tokens:
            raise out_of_range("tokens", self.tokens, f"an integer in [1, {LIMITS.max_tokens}]")
        if type(self.seed) is not int or self.seed < 0:
            raise out_of_range("seed", self.seed, "an integer >= 0")
        if not self.group:
            raise out_of_range("group", self.group, "a name")


@dataclass(frozen=True, slots=True)
class Suite:
    """What a suite is: its name, one sentence about it, what its quality figure is, and the options that it knows.

    `options` maps the name of an option to its default; others are refused. `kinds` are the kinds of models it asks
    ("causal", "masked"). `fixed`: every answer has exactly as many tokens as asked, past the model's end token, so that
    speeds compare token by token. `methods`: the arms compared where none are named, by kind of model.
    """

    name: str
    summary: str
    quality_is: str
    options: Mapping[str, Any]
    kinds: tuple[str, ...] = ("causal", "masked")
    fixed: bool = False
    methods: Mapping[str, str] | None = None


ARMS: Mapping[str, str] = {"causal": "plain,auto", "masked": "plain,auto,fast"}


def find(name: str) -> ModuleType:
    """The module of a suite; raises UnknownNameError."""
    if name not in NAMES:
        raise unknown_name("suite", name, NAMES)
    return importlib.import_module(f"hasten.bench.cases.{name}")


def chat_ids(llm: LLM, text: str) -> tuple[int, ...]:
    """Token ids of a user's message, through the model's chat template where it has one."""
    tokenizer: Any = llm.tokenizer
    if tokenizer is None:
        raise ConfigError(f"model {llm.name!r} has no tokenizer, and suites are text", field="model")
    if tokenizer.chat_template is None:
        return tuple(llm.encode(text))
    return tuple(llm.chat_ids([{"role": "user", "content": text}]))


def parts_of(items: Sequence[Any], per_group: int, seed: int, what: str) -> list[Any]:
    """The `seed`-th part of `per_group` items, so that no two seeds share one; raises ConfigError where there is none."""
    if per_group < 1:
        raise out_of_range("per_group", per_group, "at least 1")
    part = list(items[seed * per_group : (seed + 1) * per_group])
    if len(part) < per_group:
        raise out_of_range("seeds", seed, f"below {len(items) // per_group} for {per_group} of the {len(items)} of {what}")
    return part
