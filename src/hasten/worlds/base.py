"""What every world shares: samples, the size a difficulty stands for, splits, and lists of letters and words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from hasten.errors import out_of_range

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = """
    ace act age air ant ape arc arm art ash axe bag bat bay bed bee bet bin bow box boy bud bug bun bus cab can cap
    car cat cow cry cup cut day dew dig dog dot dry dye ear eat egg elf elm end eye fan far fig fin fir fit fix fly
    fog fox fun fur gap gas gem gum gut guy gym hat hay hen hip hit hop hot hub hut ice ink inn ivy jam jar jaw jet
    job joy jug key kid kin kit lab lap law leg lid lip log lot low mad man map mat men mix mob mud mug nap net new
    nod nut oak oar oil old one orb owl own pad pan paw pea pen pet pie pig pin pit pot pup rag ram rat raw ray red
    rib rod row rug run rye sad sap saw sea set shy sip sit six sky son spy sum sun tab tag tan tap tar tax tea ten
    tie tin tip toe ton top toy tub two urn use van vat vet wax way web wet who wig win yak zip
"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True, slots=True)
class Sample:
    """One task: `prompt` (its last character is a newline), one right `answer`, and `meta`, what a verifier must know."""

    prompt: str
    answer: str
    meta: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    """A kind of task. `sizes` are the least and the greatest number of items, `length(n)` an answer's most characters.

    `generate(rng, difficulty)` draws a sample, with difficulty 0 to 1 standing for the sizes from least to greatest;
    `verify(meta, text)` reads a text and says which share of it is right: 1 for a right answer, less for any other.
    """

    name: str
    summary: str
    sizes: tuple[int, int]
    length: Callable[[int], int]
    generate: Callable[[Random, float], Sample]
    verify: Callable[[Mapping[str, Any], str], float]

    def difficulty(self, size: int) -> float:
        """The difficulty of samples of this many items."""
        least, most = self.sizes
        if not least <= size <= most:
            raise out_of_range("size", size, f"{least} to {most} in world {self.name}")
        return (size - least) / (most - least)

    def fitting(self, canvas: int, above: int = 0) -> list[int]:
        """Sizes whose answers, with the token that ends them, fit a canvas but not one of `above` tokens."""
        least, most = self.sizes
        return [n for n in range(least, most + 1) if above < self.length(n) + 1 <= canvas]


def size_of(difficulty: float, least: int, most: int) -> int:
    """The number of items of a difficulty; raises ConfigError outside 0 to 1."""
    if not 0 <= difficulty <= 1:
        raise out_of_range("difficulty", difficulty, "in [0, 1]")
    return least + round(difficulty * (most - least))


def letters(rng: Random, n: int) -> list[str]:
    """`n` different letters."""
    return rng.sample(LETTERS, n)


def share(expected: Sequence[str], found: Sequence[str]) -> float:
    """The share of pieces that are as expected, place by place; 1 only for equal lists."""
    same = sum(a == b for a, b in zip(expected, found, strict=False))
    return same / max(len(expected), len(found), 1)


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, by its hash: of a hundred prompts 90 train, 5 dev, 5 test."""
    bucket = int.from_bytes(hashlib.blake2b(prompt.strip().encode(), digest_size=8).digest(), "big") % 100
    return "train" if bucket < 90 else "dev" if bucket < 95 else "test"
