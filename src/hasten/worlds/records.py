"""Records as JSON: `records: 21 bob 31;22 eve 25` -> `[{"id":21,"who":"bob","age":31},{"id":22,"who":"eve","age":25}]`.

One to 16 records. Every field has one width, and ids count up from a number that ends in 1: the structure of an answer
follows from its length, its values are found at their id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from random import Random
from typing import Any

from hasten.worlds.base import Sample, World, size_of

SIZES = (1, 16)
_NAMES = """
    abe ada amy ana ann art ben bob cal cat dan deb don dot eli eve fay flo gil gus guy hal ian ida ike ivy jan jay
    jim joe kay ken kim kit lee leo liz lou lyn mae max may meg mia ned nan pam pat peg ray rex rob ron roy sal sam
    sid sue ted tim tom una val vic wes zoe
"""
NAMES = tuple(_NAMES.split())


def generate(rng: Random, difficulty: float) -> Sample:
    """Records of different people."""
    n, first = size_of(difficulty, *SIZES), 10 * rng.randint(1, 8) + 1
    names = rng.sample(NAMES, n)
    rows = [(first + i, name, rng.randint(10, 99)) for i, name in enumerate(names)]
    prompt = ";".join(f"{i} {name} {age}" for i, name, age in rows)
    answer = ",".join(f'{{"id":{i},"who":"{name}","age":{age}}}' for i, name, age in rows)
    return Sample(f"records: {prompt}\n", f"[{answer}]", {"rows": rows})


def verify(meta: Mapping[str, Any], text: str) -> float:
    """The share of values that are right; 0 for a text that is no JSON list of objects with exactly these keys."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(found, list) or not all(isinstance(one, dict) and list(one) == ["id", "who", "age"] for one in found):
        return 0.0
    right = 0
    for (number, name, age), one in zip(meta["rows"], found, strict=False):
        right += _same(one["id"], number) + _same(one["who"], name) + _same(one["age"], age)
    return right / (3 * max(len(meta["rows"]), len(found)))


def _same(found: object, wanted: object) -> bool:
    return type(found) is type(wanted) and found == wanted


WORLD = World("records", "write records as JSON", SIZES, lambda n: 31 * n + 1, generate, verify)
