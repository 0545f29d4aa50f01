"""Sentences from given words, checked by a small grammar: they stand in for ParallelBench's writing tasks.

The published tasks score grammar with LanguageTool, and paraphrases and summaries with models that must be fetched. Here
a sentence is right when it is of the context-free grammar below and holds every given word; the grammar is meant to be
learnable from examples, not to be English.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations, product
from random import Random
from typing import Any

from hasten.bench.parallel.questions import Drawn, Pieces, Question, Task

WORDS: Mapping[str, tuple[str, ...]] = {
    "determiner": ("the", "every", "one"),
    "noun": (
        "baker", "cat", "dog", "farmer", "garden", "horse", "house", "lamp", "letter", "painter", "river", "sailor",
        "table", "teacher", "tree", "wolf",
    ),
    "adjective": (
        "brave", "clever", "green", "happy", "hungry", "old", "quiet", "red", "small", "tall", "warm", "young",
    ),
    "verb": (
        "called", "carried", "drew", "followed", "found", "liked", "met", "missed", "saw", "sold", "watched", "wanted",
    ),
    "preposition": ("behind", "beside", "near", "under"),
}  # fmt: skip
GRAMMAR: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "sentence": (("clause",), ("clause", "and", "sentence")),
    "clause": (("thing", "verb", "thing"), ("thing", "verb", "thing", "place")),
    "place": (("preposition", "thing"), ("preposition", "thing", "place")),
    "thing": (("determiner", "named"),),
    "named": (("noun",), ("adjective", "named")),
    **{kind: tuple((word,) for word in words) for kind, words in WORDS.items()},
}
_KIND = {word: kind for kind, words in WORDS.items() for word in words}
_LONGEST = 64  # words of a text that is looked at


def is_sentence(words: Sequence[str]) -> bool:
    """Whether words in small letters are a sentence of the grammar, by recursive descent with every end kept."""
    seen: dict[tuple[str, int], frozenset[int]] = {}

    def ends(symbol: str, at: int) -> frozenset[int]:
        if symbol not in GRAMMAR:
            return frozenset((at + 1,)) if at < len(words) and words[at] == symbol else frozenset()
        if (symbol, at) not in seen:
            found: set[int] = set()
            for rule in GRAMMAR[symbol]:
                open_ = {at}
                for part in rule:
                    open_ = {end for start in open_ for end in ends(part, start)}
                found |= open_
            seen[symbol, at] = frozenset(found)
        return seen[symbol, at]

    return 0 < len(words) <= _LONGEST and len(words) in ends("sentence", 0)


def sentence(text: str, answer: Mapping[str, Any], strict: bool) -> bool:
    """A sentence of the grammar that holds every given word.

    Strict: one line, a capital letter first, one blank between words, a full stop at the end.
    """
    words = re.findall(r"[a-z]+", text.lower()) if len(text) <= 16 * _LONGEST else []
    if strict and text.strip() != written(words):
        return False
    if not strict and re.search(r"[^a-zA-Z\s.,!\"']", text):
        return False
    return set(answer["words"]) <= set(words) and is_sentence(words)


def written(words: Sequence[str]) -> str:
    """Words as a sentence: a capital letter first, a full stop at the end."""
    text = " ".join(words)
    return text[:1].upper() + text[1:] + "."


def _thing(rng: Random) -> list[str]:
    adjectives = [rng.choice(WORDS["adjective"])] if rng.random() < 0.4 else []
    return [rng.choice(WORDS["determiner"]), *adjectives, rng.choice(WORDS["noun"])]


def _sentence(rng: Random, wanted: Callable[[list[str]], bool]) -> list[str]:
    """A drawn sentence, made longer until it has what is wanted."""
    words: list[str] = []
    while not wanted(words):
        words += (["and"] if words else []) + [*_thing(rng), rng.choice(WORDS["verb"]), *_thing(rng)]
        if rng.random() < 0.3:
            words += [rng.choice(WORDS["preposition"]), *_thing(rng)]
    return words


def _rule(kinds: tuple[str, ...], ordered: bool) -> Callable[[Random, int, Sequence[str]], Drawn]:
    """n different words of these kinds out of a drawn sentence, in its order or in any."""

    def draw(rng: Random, n: int, items: Sequence[str]) -> Drawn:
        def usable(words: list[str]) -> list[str]:
            return [word for word in dict.fromkeys(words) if _KIND.get(word) in kinds]

        words = _sentence(rng, lambda words: len(usable(words)) >= n)
        open_ = usable(words)
        given = [open_[i] for i in sorted(rng.sample(range(len(open_)), n))]
        if not ordered:
            rng.shuffle(given)
        answer = {"words": given, "example": written(words)}
        return Drawn({"words": ", ".join(given)}, answer, " ".join(sorted(given)))

    return draw


def _arrangements(question: Question) -> Pieces:
    """The example with its given words in every order that keeps their kinds: some of the right answers."""
    words, given = re.findall(r"[a-z]+", question.example.lower()), question.facts["words"]
    places = {word: words.index(word) for word in sorted(given, key=words.index)}
    groups = [[word for word in places if _KIND[word] == kind] for kind in WORDS]
    for orders in product(*(permutations(group) for group in groups)):
        made = list(words)
        for group, order in zip(groups, orders, strict=True):
            for old, new in zip(group, order, strict=True):
                made[places[old]] = new
        yield tuple(made)


_TEXT = (
    "Write a sentence with all of these words: {words}. Use only the words "
    f'{", ".join(word for words in WORDS.values() for word in words)} and "and". Only provide the sentence.'
)
_OPEN = ("noun", "adjective", "verb")
TEXTS = tuple(
    Task(
        f"words_to_sentence_{level}", "text", (4,), 64, _TEXT, _rule(kinds, ordered), sentence, _arrangements,
        lambda pieces, question: written(pieces), range=(1, 7), complete=False,
    )
    for level, kinds, ordered in (("easy", _OPEN, True), ("medium", _OPEN, False), ("hard", ("noun",), False))
)  # fmt: skip
