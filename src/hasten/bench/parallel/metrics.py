"""The metrics of ParallelBench (2510.04767): whether a text answers a question, to a loose and to a strict reader.

A metric is `metric(text, answer, strict) -> bool`; no text raises. `answer` is the right text, or for questions with many
right answers what the checks need ("input", "word", ...). Loose takes what stands between the last `[` and the next `]`;
strict wants brackets, items in double quotes, and a comma and a space between them. Puzzles, numbers and sentences have
their own reading, stated at each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

Answer = str | Mapping[str, Any]
Metric = Callable[[str, Any, bool], bool]


def parse_list(text: str, strict: bool = False, quoted: bool = True) -> list[str] | None:
    """The items of the last list of a text; None where a strict reader finds none. `quoted`: strict items have quotes."""
    _, opened, rest = text.rpartition("[")
    if not opened:
        if strict:
            return None
        rest = text
    inside, closed, _ = rest.partition("]")
    if not strict:
        return [item.strip("\" '") for item in inside.split(",") if item.strip()]
    if not closed:
        return None
    items = inside.split(", ")
    if not quoted:
        return items if all(item and item == item.strip() and '"' not in item for item in items) else None
    if not all(len(item) >= 2 and item[0] == item[-1] == '"' and '"' not in item[1:-1] for item in items):
        return None
    return [item[1:-1] for item in items]


def same_list(text: str, answer: str, strict: bool) -> bool:
    """Equal lists."""
    return parse_list(text, strict) == parse_list(answer)


def same_numbers(text: str, answer: str, strict: bool) -> bool:
    """Equal lists of numbers, without quotes."""
    return parse_list(text, strict, quoted=False) == parse_list(answer)


def shuffled(text: str, answer: Mapping[str, Any], strict: bool) -> bool:
    """The same items as often each, and not in the order of the input."""
    found, given = parse_list(text, strict), list(answer["input"])
    return found is not None and sorted(found) == sorted(given) and found != given


def inserted(text: str, answer: Mapping[str, Any], strict: bool) -> bool:
    """Removing the word once gives the input."""
    found = parse_list(text, strict)
    if found is None or answer["word"] not in found:
        return False
    found.remove(answer["word"])
    return found == list(answer["input"])


def removed(text: str, answer: Mapping[str, Any], strict: bool) -> bool:
    """Exactly one item is missing, and the others stand in their order."""
    found, given = parse_list(text, strict), list(answer["input"])
    if found is None or len(found) != len(given) - 1:
        return False
    gone = set(given) - set(found)
    return len(gone) == 1 and [item for item in given if item not in gone] == found


def replaced(text: str, answer: Mapping[str, Any], strict: bool) -> bool:
    """The input with the word where it first occurs in the output is the output."""
    found, given = parse_list(text, strict), list(answer["input"])
    if found is None or len(found) != len(given) or answer["word"] not in found:
        return False
    given[found.index(answer["word"])] = answer["word"]
    return found == given


def latin(text: str, answer: Mapping[str, Any], strict: bool) -> bool:
    """The first n lines that hold every symbol are a square whose columns do too; strict reads alike."""
    symbols = set(answer["symbols"])
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if set(row) == symbols and len(row) == len(symbols)][: len(symbols)]
    return len(rows) == len(symbols) and all(set(column) == symbols for column in zip(*rows, strict=True))


def sudoku(text: str, answer: str, strict: bool) -> bool:
    """The solution grid, line by line; a loose reader ignores blanks and commas."""
    if not strict:
        text = text.replace(" ", "").replace(",", "")
    return [line.strip() for line in text.strip().splitlines()] == answer.splitlines()


def domino(text: str, answer: Mapping[str, Any], strict: bool) -> bool:
    """So many two-digit numbers from 11 on, from the start given, each beginning with the last digit of the one before."""
    found = parse_list(text, True) if strict else re.findall(r"[0-9]+", text)
    if found is None or len(found) != answer["length"] or found[0] != str(answer["start"]):
        return False
    if not all(re.fullmatch(r"[1-9][0-9]", number) and number != "10" for number in found):
        return False
    return all(one[1] == two[0] for one, two in pairwise(found))


def number(text: str, answer: str, strict: bool) -> bool:
    """The result, alone; a loose reader takes any text in which it stands as a number, with or without commas."""
    if strict:
        return text.strip() == answer
    return answer in re.findall(r"-?[0-9]+", text.replace(",", ""))


def valid_json(text: str, answer: Answer, strict: bool) -> bool:
    """JSON; a loose reader takes it out of a code fence."""
    if not strict:
        text = text.split("```json" if "```json" in text else "```", 1)[-1].split("```")[0]
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
