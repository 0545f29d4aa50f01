"""Questions put to a loaded model under any methods: right or wrong, forwards, order of commits, the oracle's chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from hasten.bench.parallel import curves
from hasten.bench.parallel.decoding import Decoded, decode
from hasten.bench.parallel.questions import Question, Task
from hasten.bench.parallel.theory import Law
from hasten.engine.contracts import Capabilities
from hasten.errors import ConfigError, out_of_range
from hasten.types import Request, SamplingParams

if TYPE_CHECKING:
    from hasten.llm import LLM

LISTED = 8  # items of a question whose right answers are still listed whole
_SMALL = 128  # ids of a vocabulary that can only be the small models' alphabet
_MARK = 0xE000  # first of the characters that stand for pieces while they are looked for: no text has them
_Chances = dict[tuple[int, tuple[tuple[int, ...], ...]], float]


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: whether a loose and a strict reader take it, forwards, tokens committed, and the order of commits.

    `oracle`: the chance that exact conditionals, sampled in the same steps, had given a right answer; None where that is
    not known. `tokens` counts the positions of a canvas that were filled, behind the end of the text too. `fits`: whether
    a right answer has room on the canvas.
    """

    text: str
    loose: bool
    strict: bool
    nfe: int
    tokens: int
    length: int
    order: Mapping[str, float | None]
    oracle: float | None
    fits: bool


def knows_worlds(capabilities: Capabilities) -> bool:
    """Whether the model is one of the small ones, whose alphabet is all their vocabulary."""
    return capabilities.vocab_size <= _SMALL


@dataclass(frozen=True, slots=True)
class Layout:
    """A right answer as the model's tokens `ids`; `slots` are those of its items, the others its format.

    `places`: the token of each piece of the answer, None where pieces and tokens do not correspond one to one.
    """

    ids: tuple[int, ...]
    slots: frozenset[int]
    places: tuple[int, ...] | None


def layout(llm: LLM, task: Task, question: Question) -> Layout:
    """How the model writes the example of a question; raises ConfigError for a model without a tokenizer."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ConfigError(f"model {llm.name!r} has no tokenizer", hint="load one with its tokenizer", field="model")
    ids = tokenizer.encode(question.example, bos=False)
    pieces = next(task.pieces(question))
    marked = task.render([chr(_MARK + i) * len(piece) for i, piece in enumerate(pieces)], question)
    ends = [len(tokenizer.decode(ids[: i + 1], skip_special=False)) for i in range(len(ids))]
    held = [{c for c in marked[start:end] if _MARK <= ord(c) < _MARK + len(pieces)} for start, end in pairwise([0, *ends])]
    slots = [i for i, of in enumerate(held) if of]
    alone = [held[i] for i in slots] == [{chr(_MARK + i)} for i in range(len(pieces))]
    return Layout(tuple(ids), frozenset(slots), tuple(slots) if alone else None)


def room(llm: LLM, task: Task, asked: Sequence[Question], canvas: int | None = None) -> int:
    """The canvas for these questions; by default the task's budget, doubled until the shortest right answer fits.

    Raises ConfigError for a canvas that is shorter than that.
    """
    shortest = min(len(layout(llm, task, question).ids) for question in asked)
    length = task.budget if canvas is None else canvas
    while canvas is None and length < shortest:
        length *= 2
    if length < shortest:
        raise out_of_range("canvas", length, f"at least {shortest}, the shortest answer of task {task.name!r}")
    return length


def answer(
    llm: LLM,
    task: Task,
    asked: Sequence[Question],
    methods: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 0.0,
    canvas: int | None = None,
    infill: bool = False,
) -> list[Answered]:
    """All questions of a task in one batch. `infill`: the format is given, and only the items' tokens are filled.

    Raises ConfigError as `room` and `LLM.parts` do, and for infill on a model that writes from left to right.
    """
    capabilities = llm.model.capabilities
    masked, length = capabilities.kind == "masked", room(llm, task, asked, canvas)
    if infill and not masked:
        raise ConfigError(f"infill needs a model that fills canvases; {llm.name!r} is {capabilities.kind}", field="infill")
    layouts = [layout(llm, task, question) for question in asked]
    requests = []
    for i, (question, found) in enumerate(zip(asked, layouts, strict=True)):
        template = None
        if infill:
            template = tuple(-1 if at in found.slots else token for at, token in enumerate(found.ids))
            template += capabilities.eos_ids[:1]
        sampling = SamplingParams(max_tokens=length, temperature=temperature, seed=seed * 1_000_003 + i)
        requests.append(Request(tuple(_prompt(llm, question)), sampling, tuple(methods), template=template))
    made = decode(llm.engine, requests, llm.parts(tuple(methods)))
    chances: _Chances = {}
    return [
        _answered(task, question, one, found.places, masked, chances, infill or len(found.ids) <= length)
        for question, one, found in zip(asked, made, layouts, strict=True)
    ]


def _prompt(llm: LLM, question: Question) -> list[int]:
    """Through the chat template of a model that has one; the small models read prompts as they are."""
    if not knows_worlds(llm.model.capabilities) and llm.tokenizer is not None and llm.tokenizer.chat_template is not None:
        return llm.chat_ids([{"role": "user", "content": question.prompt}])
    return llm.encode(question.prompt)


def _answered(
    task: Task,
    question: Question,
    one: Decoded,
    slots: tuple[int, ...] | None,
    masked: bool,
    chances: _Chances,
    fits: bool,
) -> Answered:
    loose, strict = task.score(question, one.output.text)
    used = one.output.usage
    text = {at: step for at, step in one.steps.items() if at < used.completion_tokens}
    order = {
        f"{name}{suffix}": measure(list(steps), list(steps.values()))
        for suffix, steps in (("", text), ("_padded", one.steps))
        for name, measure in (("kendall", curves.kendall), ("spearman", curves.spearman))
    }
    return Answered(
        text=one.output.text,
        loose=loose,
        strict=strict,
        nfe=used.forwards if masked else used.forwards + 1,  # the pass that reads a prompt gives its first token
        tokens=len(one.steps) if masked else used.completion_tokens,
        length=question.meta["length"],
        order=order,
        oracle=_chance(task, question, one, slots, chances) if masked else 1.0,
        fits=fits,
    )


def _chance(
    task: Task,
    question: Question,
    one: Decoded,
    slots: tuple[int, ...] | None,
    chances: _Chances,
) -> float | None:
    """The oracle's chance of a right answer in the steps of this one; kept, since laws of one length are alike."""
    if not task.complete or question.meta["length"] > LISTED:
        return None
    if isinstance(question.answer, str) or (task.group == "world" and task.name != "shuffle"):
        return 1.0  # one right answer: independent draws cannot disagree
    steps = one.parallel(slots) if slots else None
    if steps is None:
        return None
    key = (question.meta["length"], tuple(tuple(step) for step in steps))
    if key not in chances:
        chances[key] = Law.of(list(task.pieces(question))).validity(steps)
    return chances[key]
