"""Prompts for a search, in two parts that share none: `dev` to choose by, `held_out` to confirm on.

They come from a person's own file, from the procedural worlds (whose verifiers say what is right), or from the prompt
suites. What has neither a verifier nor an answer is judged by how far its text agrees with the exact one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from hasten.bench import suites
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, FormatError, HastenError, UnsupportedError, out_of_range, unknown_name
from hasten.models import catalog
from hasten.models.tokenizer import read_json
from hasten.worlds import WORLDS, Sample, Split, World, split_of

if TYPE_CHECKING:
    from hasten.llm import LLM

GROUPS = ("chat", "code", "edit", "summary", "context", "arithmetic")  # those of bench/suites.py
LEAST = 8  # different prompts that a person's file must hold
_LINES = 100_000
_DRAWS = 3  # parts of a group's prompts: the first is dev
_PER_PART = 24  # prompts of a part, shared by the groups
_PER_GROUP = (24, 12, 8, 4)  # as many of one group as there are
_DEV, _HELD = 64, 1024  # tasks drawn from worlds
_KNOWN = 50.0  # percent of right answers from which a small model knows a world
_ATTEMPTS = 100  # draws per world and wanted task, until a world has no more of this split


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt as token ids; `verify` says whether a text is right (None: judged by agreement with the exact text)."""

    ids: tuple[int, ...]
    verify: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Splits:
    """The two parts, and in words what the prompts are and how quality is counted."""

    dev: tuple[Task, ...]
    held_out: tuple[Task, ...]
    what: str
    quality: str


def from_file(llm: LLM, path: Path, *, seed: int = 0, raw: bool = False, max_tokens: int = 64) -> Splits:
    """The prompts of a JSONL file, a third of them for dev: lines {"prompt": text, "answer": text or left out}.

    Through the model's chat template, unless it has none or `raw`. With an answer, exactly that text is right (spaces
    around it aside). Raises FormatError naming the line, ConfigError for fewer than 8 different prompts or one that is too
    long.
    """
    entries = read_prompts(path)
    if len(entries) < LEAST:
        raise ConfigError(
            f"{path} holds {len(entries)} different prompts; a search needs at least {LEAST}",
            hint="a third is searched on, the rest confirms: add more of what you will ask",
            field="prompts",
        )
    tasks = [_task(llm, prompt, answer, raw, max_tokens, number) for number, (prompt, answer) in enumerate(entries, 1)]
    random.Random(f"{seed} split").shuffle(tasks)  # noqa: S311 - an order of prompts, not a secret
    cut = len(tasks) // 3
    answers = sum(answer is not None for _, answer in entries)
    quality = _AGREEMENT
    if answers:
        quality = "answers equal to the given ones"
        if answers < len(entries):
            quality += f" ({answers} of {len(entries)} prompts), {_AGREEMENT} for the others"
    return Splits(tuple(tasks[:cut]), tuple(tasks[cut:]), f"{len(tasks)} prompts of {path.name}", quality)


_AGREEMENT = "agreement with the exact text (share of tokens in common, in order; nothing verifies these answers)"


def read_prompts(path: Path) -> list[tuple[str, str | None]]:
    """(prompt, answer) of every line of a JSONL file, in order, repeated prompts once.

    Raises FormatError naming the file and the line: not UTF-8, not JSON, unknown or wrong fields, two answers.
    """
    found: dict[str, str | None] = {}
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise FormatError(f"it cannot be read ({error.strerror or error})", path=str(path), field="prompts") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"it is not UTF-8 (byte {error.start})", path=str(path), field="prompts") from None
    if len(lines) > _LINES:
        raise FormatError(f"it has over {_LINES} lines", path=str(path), field="prompts")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt, answer = _entry(line)
            if found.get(prompt, answer) != answer:
                raise ConfigError("this prompt was given another answer before")
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"line {number}: {error}",
                path=str(path),
                hint='each line is {"prompt": "...", "answer": "..."}, the answer optional',
                field="prompts",
            ) from None
        found[prompt] = answer
    return list(found.items())


def _entry(line: str) -> tuple[str, str | None]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise out_of_range("the line", value, "a JSON object")
    for name, one in value.items():
        if name not in ("prompt", "answer"):
            raise unknown_name("field", name, ("prompt", "answer"))
        if not isinstance(one, str) and not (name == "answer" and one is None):
            raise out_of_range(name, one, "a text")
    prompt, answer = value.get("prompt", ""), value.get("answer")
    if not 1 <= len(prompt) <= LIMITS.prompt_chars:
        raise out_of_range("prompt", f"{len(prompt)} characters", f"1 to {LIMITS.prompt_chars} characters")
    prompt.encode("utf-8")  # a lone surrogate, which JSON can hold, is no text
    return prompt, answer


def _task(llm: LLM, prompt: str, answer: str | None, raw: bool, max_tokens: int, number: int) -> Task:
    room = llm.model.capabilities.max_len - max_tokens
    try:
        ids = _ids(llm, prompt, raw)
    except HastenError as error:
        raise ConfigError(f"prompt {number}: {error.message}", hint=error.hint, field="prompts") from None
    if not 1 <= len(ids) <= room:
        raise out_of_range("prompts", f"prompt {number} of {len(ids)} tokens", f"of 1 to {room} tokens, to leave room")
    return Task(ids, None if answer is None else lambda text: text.strip() == answer.strip())


def _ids(llm: LLM, prompt: str, raw: bool) -> tuple[int, ...]:
    chat = not raw and llm.tokenizer is not None and llm.tokenizer.chat_template is not None
    return tuple(llm.chat_ids([{"role": "user", "content": prompt}]) if chat else llm.encode(prompt))


def from_suites(llm: LLM, names: Sequence[str] = (), *, seed: int = 0, raw: bool = False, max_tokens: int = 64) -> Splits:
    """Tasks of worlds or prompts of suites, by their names; without names those that suit the model.

    A small model that comes with hasten is asked what it knows, any other the prompts of bench/suites.py. Raises
    UnknownNameError, ConfigError for worlds beside suites and for worlds whose answers need more tokens.
    """
    chosen = tuple(names) or known_worlds(llm.name, max_tokens) or GROUPS
    for name in chosen:
        check_suite(name)
    worlds = [name for name in chosen if name in WORLDS]
    if worlds and len(worlds) < len(chosen):
        other = next(name for name in chosen if name not in WORLDS)
        raise ConfigError(f"suites {worlds[0]!r} and {other!r} are judged in different ways; take one kind", field="suite")
    return _worlds(llm, worlds, seed, max_tokens) if worlds else _prompts(llm, chosen, seed, raw, max_tokens, bool(names))


def check_suite(name: str) -> None:
    """Refuse what is neither a world nor a group of prompts; raises UnknownNameError."""
    if name not in (*WORLDS, *GROUPS):
        raise unknown_name("suite", name, (*WORLDS, *GROUPS))


def known_worlds(model: str, max_tokens: int) -> tuple[str, ...]:
    """Worlds that a model of this name knows, by its card, and whose answers fit; empty for other models."""
    if model not in catalog.names() or (folder := catalog.get(model).folder) is None:
        return ()
    measured = read_json(folder / "card.json").get("exact_match", {}).get("worlds", {})
    out = []
    for name, by_size in measured.items():
        shares = [one["exact"] for canvas, one in by_size.items() if int(canvas) <= max_tokens]
        if name in WORLDS and WORLDS[name].fitting(max_tokens) and shares and min(shares) >= _KNOWN:
            out.append(name)
    return tuple(out)


def _worlds(llm: LLM, names: Sequence[str], seed: int, max_tokens: int) -> Splits:
    parts: dict[str, tuple[Task, ...]] = {}
    for split, count in (("dev", _DEV), ("test", _HELD)):
        by_world = [_draw(llm, name, split, -(-count // len(names)), seed, max_tokens) for name in names]  # type: ignore[arg-type]
        turns = range(max(len(one) for one in by_world))
        parts[split] = tuple(one[i] for i in turns for one in by_world if i < len(one))
    if min(len(one) for one in parts.values()) < LEAST // 2:
        raise out_of_range("suite", list(names), "worlds with more tasks of this length")
    quality = "answers that the verifier finds right in full"
    return Splits(parts["dev"], parts["test"], f"tasks of {', '.join(names)}", quality)


def _draw(llm: LLM, name: str, split: Split, count: int, seed: int, max_tokens: int) -> list[Task]:
    """At most `count` different tasks of one world and split."""
    world = WORLDS[name]
    sizes = world.fitting(max_tokens)
    if not sizes:
        raise out_of_range("max_tokens", max_tokens, f"at least {world.length(world.sizes[0]) + 1} for {name}")
    rng, known, out = Random(f"{name} {split} {seed} tune"), set(), []  # noqa: S311 - tasks, not secrets
    for _ in range(_ATTEMPTS * count):
        sample = world.generate(rng, world.difficulty(rng.choice(sizes)))
        if split_of(sample.prompt) == split and sample.prompt not in known:
            known.add(sample.prompt)
            out.append(Task(tuple(llm.encode(sample.prompt)), _verifier(world, sample)))
            if len(out) == count:
                break
    return out


def _group(name: str, most: int) -> list[list[str]]:
    """Parts of one group that share no prompt, of up to `most` prompts or of 4."""
    for count in _PER_GROUP:
        if count <= max(most, _PER_GROUP[-1]):
            with suppress(ConfigError):  # it has not so many
                return [suites.draws(count, part, (name,))[name] for part in range(_DRAWS)]
    return [suites.draws(1, part, (name,))[name] for part in range(_DRAWS)]


def _verifier(world: World, sample: Sample) -> Callable[[str], bool]:
    return lambda text: world.verify(sample.meta, text) == 1


def _prompts(llm: LLM, names: Sequence[str], seed: int, raw: bool, max_tokens: int, asked: bool) -> Splits:
    drawn: list[list[str]] = [[] for _ in range(_DRAWS)]
    kept, left = [], []
    for name in names:
        try:
            for part, texts in enumerate(_group(name, _PER_PART // len(names))):
                drawn[part] += texts
            kept.append(name)
        except UnsupportedError:
            if asked:
                raise
            left.append(name)
    room = llm.model.capabilities.max_len - max_tokens
    parts = [[Task(_ids(llm, text, raw)) for text in one] for one in drawn]
    fit = [[task for task in one if len(task.ids) <= room] for one in parts]
    dev, held = fit[0], [task for one in fit[1:] for task in one]
    for one in (dev, held):  # groups mixed, for a run that ends early
        random.Random(f"{seed} split").shuffle(one)  # noqa: S311 - an order of prompts, not a secret
    if min(len(dev), len(held)) < LEAST // 2:
        raise out_of_range("max_tokens", max_tokens, f"less, to leave room for prompts in a window of {room + max_tokens}")
    what = f"prompts of {', '.join(kept)}" + (f" (without {', '.join(left)}, which needs hasten[bench])" if left else "")
    return Splits(tuple(dev), tuple(held), what, _AGREEMENT)
