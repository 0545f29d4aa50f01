"""A suite of one's own: a .jsonl file, one JSON object a line with "prompt" or "messages".

Optional are "answer" (a text that a right answer holds), "max_tokens" and "group". Every seed asks every prompt once, so
that the spread over seeds is that of repeated runs. Every line that is not such an object is an error with its number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.bench.cases import Case, Suite, Verdict, chat_ids
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from hasten.llm import LLM

LINE_BYTES = 8_000_000
KEYS = ("prompt", "messages", "answer", "max_tokens", "group")
ROLES = ("system", "user", "assistant")
SHOWN = 5  # wrong lines that an error names

suite = Suite(
    name="prompts",
    summary="prompts of your own, from a .jsonl file",
    quality_is="answers that hold the expected text, percent; without one, texts equal to the first arm's",
    options={"tokens": 128, "file": ""},
)


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt of a file: `prompt` or `messages`, and what is known of its answer."""

    prompt: str
    messages: tuple[Mapping[str, str], ...] = ()
    answer: str | None = None
    max_tokens: int | None = None
    group: str = "prompts"


def parse(raw: bytes) -> Line:
    """One line; raises ConfigError that says what is wrong with it."""
    if len(raw) > LINE_BYTES:
        raise ConfigError(f"it has {len(raw)} bytes; a line must have at most {LINE_BYTES}")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise ConfigError(f"it is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise ConfigError("it is not a JSON object")
    for key in value:
        if key not in KEYS:
            raise ConfigError(f"it has the unknown key {key[:40]!r}; known are {', '.join(KEYS)}")
    if ("prompt" in value) == ("messages" in value):
        raise ConfigError('it must have one of "prompt" and "messages"')
    prompt = _text("prompt", value.get("prompt", "-"))
    messages = value.get("messages", [])
    if "messages" in value:
        if not isinstance(messages, list) or not 1 <= len(messages) <= LIMITS.messages:
            raise ConfigError(f'"messages" must be a list of 1 to {LIMITS.messages} messages')
        for one in messages:
            if not isinstance(one, dict) or set(one) != {"role", "content"} or one["role"] not in ROLES:
                raise ConfigError('every message must have exactly "role" (system, user or assistant) and "content"')
            _text("content", one["content"])
    tokens = value.get("max_tokens")
    if tokens is not None and (type(tokens) is not int or not 1 <= tokens <= LIMITS.max_tokens):
        raise ConfigError(f'"max_tokens" must be an integer in [1, {LIMITS.max_tokens}]')
    answer = None if value.get("answer") is None else _text("answer", value["answer"])
    return Line(prompt, tuple(messages), answer, tokens, _text("group", value.get("group", "prompts")))


def read(path: Path) -> list[Line]:
    """All lines of a file, empty ones left out; raises FormatError naming every wrong line (the first few) by number."""
    lines, wrong = [], []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    lines.append(parse(raw))
                except ConfigError as error:
                    wrong.append(f"line {number}: {error.message}")
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", path=str(path), field="suite") from None
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise FormatError("; ".join(wrong[:SHOWN]) + more, path=str(path), field="suite")
    if not lines:
        raise FormatError("it holds no prompt", path=str(path), hint='a line is {"prompt": "..."}', field="suite")
    return lines


def ready(options: Mapping[str, Any]) -> None:
    """Raise FormatError naming every wrong line of the file, before a model is loaded."""
    read(Path(options["file"]))


def cases(llm: LLM, options: Mapping[str, Any], seeds: Sequence[int]) -> list[Case]:
    """Every prompt of the file once for each seed; raises as `read`, and ConfigError for messages without a template."""
    out = []
    for line in read(Path(options["file"])):
        text = line.prompt if not line.messages else "\n".join(f"{one['role']}: {one['content']}" for one in line.messages)
        ids = tuple(llm.chat_ids(line.messages)) if line.messages else chat_ids(llm, line.prompt)
        judge = None if line.answer is None else holds(line.answer)
        out.append(Case(0, line.group, ids, line.max_tokens or options["tokens"], text, judge))
    return [Case(seed, one.group, one.ids, one.tokens, one.text, one.judge) for seed in seeds for one in out]


def holds(expected: str) -> Any:
    """A judge: whether the words of `expected` stand together in the answer, case and spaces aside."""
    words = _words(expected)

    def verdict(text: str) -> Verdict:
        found = _words(text)
        right = any(found[i : i + len(words)] == words for i in range(len(found) - len(words) + 1))
        return Verdict(float(right), "" if right else f"expected {expected}")

    return verdict


def _words(text: str) -> list[str]:
    """Words in lower case without the punctuation around them; punctuation alone is a word too."""
    return [word.strip(".,;:!?\"'()[]{}*`") or word for word in text.casefold().split()]


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f'"{name}" must be a text that is not empty')
    if len(value) > LIMITS.prompt_chars or any("\ud800" <= char <= "\udfff" for char in value):
        raise ConfigError(f'"{name}" must be Unicode text of at most {LIMITS.prompt_chars} characters')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
