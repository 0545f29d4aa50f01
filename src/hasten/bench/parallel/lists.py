"""The ten list tasks of ParallelBench (waiting line), and the repeats beside them: rules, right answers, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from random import Random

from hasten.bench.parallel import metrics
from hasten.bench.parallel.questions import Drawn, Pieces, Question, Task

Changed = tuple[list[str], dict[str, object]]  # the new list, and what the question tells besides
Rule = Callable[[Random, int, Sequence[str]], Drawn]
_LENGTHS = (3, 4, 5, 6)


def list_text(items: Sequence[str]) -> str:
    """`["a", "b"]`."""
    return "[" + ", ".join(f'"{item}"' for item in items) + "]"


def cut(pieces: Sequence[str], width: int) -> list[str]:
    """Characters as items of `width` of them; slots are joined likewise."""
    return ["".join(pieces[i : i + width]) for i in range(0, len(pieces), width)]


def _fixed(change: Callable[[list[str], Random], Changed], new: bool = False) -> Rule:
    """A rule with one right answer: `change(list, rng)` gives it and further fields; `new` puts a new word in front."""

    def draw(rng: Random, n: int, items: Sequence[str]) -> Drawn:
        drawn = rng.sample(items, n + new)
        given = drawn[new:]
        answer, more = change(drawn, rng)
        fields = {"list": list_text(given), **more}
        return Drawn(fields, list_text(answer), " ".join(given), {name: more[name] for name in more})

    return draw


def _free(change: Callable[[list[str], Random], list[str]], new: bool = False) -> Rule:
    """A rule with many right answers, of which `change` gives one."""

    def draw(rng: Random, n: int, items: Sequence[str]) -> Drawn:
        drawn = rng.sample(items, n + new)
        given = drawn[new:]
        word = {"word": drawn[0]} if new else {}
        answer = {"input": given, **word, "example": list_text(change(drawn, rng))}
        return Drawn({"list": list_text(given), **word}, answer, " ".join(given), word)

    return draw


def _other_order(given: list[str], rng: Random) -> list[str]:
    """Another order, drawn evenly; a list of one item has none and stays."""
    while len(given) > 1:
        order = rng.sample(given, len(given))
        if order != given:
            return order
    return list(given)


def _copy(given: list[str], rng: Random) -> Changed:
    return given, {}


def _reverse(given: list[str], rng: Random) -> Changed:
    return given[::-1], {}


def _sort(given: list[str], rng: Random) -> Changed:
    return sorted(given), {}


def _insert(drawn: list[str], rng: Random) -> Changed:
    word, *given = drawn
    at = rng.randint(0, len(given))
    return [*given[:at], word, *given[at:]], {"word": word, "index": at}


def _remove(given: list[str], rng: Random) -> Changed:
    at = rng.randrange(len(given))
    return [*given[:at], *given[at + 1 :]], {"index": at}


def _replace(drawn: list[str], rng: Random) -> Changed:
    word, *given = drawn
    at = rng.randrange(len(given))
    return [*given[:at], word, *given[at + 1 :]], {"word": word, "index": at}


def _repeat_each(given: list[str], rng: Random) -> Changed:
    count = rng.randint(2, 6)
    return [item for item in given for _ in range(count)], {"count": count}


def _repeat_list(given: list[str], rng: Random) -> Changed:
    count = rng.randint(2, 6)
    return given * count, {"count": count}


def one_answer(question: Question) -> Pieces:
    """The pieces of a question with one right answer: the characters of its items."""
    yield tuple("".join(metrics.parse_list(question.example) or []))


def orders(given: Sequence[str]) -> Iterator[Sequence[str]]:
    """All other orders; of lists over 8 the turned ones, all n - 1 of them, since n! are too many to list."""
    if len(given) > 8:
        yield from ([*given[i:], *given[:i]] for i in range(1, len(given)))
    else:
        yield from (order for order in permutations(given) if list(order) != list(given))


def _orders(question: Question) -> Pieces:
    yield from (tuple("".join(order)) for order in orders(question.facts["input"]))


def _anywhere(change: str) -> Callable[[Question], Pieces]:
    """Every right answer of an *_random task."""

    def make(question: Question) -> Pieces:
        given, word = list(question.facts["input"]), [question.facts.get("word", "")]
        put, after = [] if change == "remove" else word, 0 if change == "insert" else 1
        for at in range(len(given) + 1 - after):
            yield tuple("".join([*given[:at], *put, *given[at + after :]]))

    return make


def _render(pieces: Sequence[str], question: Question) -> str:
    return list_text(cut(pieces, question.meta["width"]))


_AT = "index {index} (counted from 0)"
_INSERT, _REPLACE = _fixed(_insert, new=True), _fixed(_replace, new=True)
_PUT = _free(lambda drawn, rng: _insert(drawn, rng)[0], new=True)
_DROP = _free(lambda drawn, rng: _remove(drawn, rng)[0])
_SWAP = _free(lambda drawn, rng: _replace(drawn, rng)[0], new=True)
_ONLY = " Only provide the final answer."
_LISTS: tuple[tuple[str, str, Rule, metrics.Metric, Callable[[Question], Pieces]], ...] = (
    ("copy", "Repeat {list} exactly as it is.", _fixed(_copy), metrics.same_list, one_answer),
    ("reverse", "Reverse the order of the words {list}.", _fixed(_reverse), metrics.same_list, one_answer),
    ("sort", "Sort the words {list} alphabetically.", _fixed(_sort), metrics.same_list, one_answer),
    ("shuffle", "Write the words {list} in another order, any other.", _free(_other_order), metrics.shuffled, _orders),
    ("insert_index", f'Insert the word "{{word}}" at {_AT} into {{list}}.', _INSERT, metrics.same_list, one_answer),
    ("insert_random", 'Insert the word "{word}" anywhere into {list}.', _PUT, metrics.inserted, _anywhere("insert")),
    ("remove_index", f"Remove the word at {_AT} from {{list}}.", _fixed(_remove), metrics.same_list, one_answer),
    ("remove_random", "Remove any one word from {list}.", _DROP, metrics.removed, _anywhere("remove")),
    ("replace_index", f'Replace the word at {_AT} of {{list}} by "{{word}}".', _REPLACE, metrics.same_list, one_answer),
    ("replace_random", 'Replace any one word of {list} by "{word}".', _SWAP, metrics.replaced, _anywhere("replace")),
)
_REPEATS = (
    ("repeat_each", "Write each word of {list} {count} times before the next.", _fixed(_repeat_each)),
    ("repeat_list", "Write the list {list} {count} times as one list.", _fixed(_repeat_list)),
)
LISTS = tuple(
    Task(name, "list", _LENGTHS, 32, text + _ONLY, draw, metric, pieces, _render)
    for name, text, draw, metric, pieces in _LISTS
)
REPEATS = tuple(
    Task(name, "extra", (2, 3, 4), 256, text + _ONLY, draw, metrics.same_list, one_answer, _render)
    for name, text, draw in _REPEATS
)
