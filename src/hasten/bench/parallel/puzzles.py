"""Puzzles and sums of ParallelBench: Latin squares, sudoku of four, domino chains, running sums, arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, islice, permutations
from random import Random

from hasten.bench.parallel import metrics
from hasten.bench.parallel.lists import cut, list_text, one_answer
from hasten.bench.parallel.questions import Drawn, Pieces, Question, Task

_SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_GIVENS = 12
_CHAINS = 1_000  # domino chains that are listed at most


@cache
def latin_squares(n: int) -> tuple[tuple[int, ...], ...]:
    """All Latin squares of order n (at most 4) over 0..n-1, row by row: 576 of order 4."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(n):
        found = [
            (*square, *row)
            for square in found
            for row in permutations(range(n))
            if all(row[column] not in square[column::n] for column in range(n))
        ]
    return tuple(found)


@cache
def grids() -> tuple[tuple[int, ...], ...]:
    """All 288 solved sudokus of four by four: Latin squares whose quarters hold every digit too."""
    quarters = [[4 * (2 * i + a) + 2 * j + b for a in (0, 1) for b in (0, 1)] for i in (0, 1) for j in (0, 1)]
    return tuple(
        tuple(cell + 1 for cell in square)
        for square in latin_squares(4)
        if all(len({square[at] for at in quarter}) == 4 for quarter in quarters)
    )


def solutions(puzzle: Sequence[int]) -> list[tuple[int, ...]]:
    """The solved grids that fit a puzzle [16], 0 = open."""
    return [grid for grid in grids() if all(given in (0, cell) for given, cell in zip(puzzle, grid, strict=True))]


def _lines(cells: Sequence[object], between: str = "") -> str:
    return "\n".join(between.join(map(str, cells[i : i + 4])) for i in range(0, 16, 4))


def _latin(rng: Random, n: int, items: Sequence[str]) -> Drawn:
    symbols = rng.sample(_SYMBOLS, n)
    square = [symbols[cell] for cell in rng.choice(latin_squares(n))]
    answer = {"symbols": symbols, "example": _lines(square, ",")}
    return Drawn({"size": n, "symbols": ", ".join(symbols)}, answer, "".join(sorted(symbols)), {"width": 1})


def _latin_answers(question: Question) -> Pieces:
    symbols = question.facts["symbols"]
    yield from (tuple(symbols[cell] for cell in square) for square in latin_squares(len(symbols)))


def _sudoku(rng: Random, n: int, items: Sequence[str]) -> Drawn:
    while True:
        grid = rng.choice(grids())
        open_ = set(rng.sample(range(16), 16 - _GIVENS))
        puzzle = [0 if at in open_ else cell for at, cell in enumerate(grid)]
        if len(solutions(puzzle)) == 1:
            shown = _lines(["_" if cell == 0 else cell for cell in puzzle])
            return Drawn({"puzzle": shown}, _lines(grid), _lines(grid), {"givens": _GIVENS, "width": 1})


def _characters(question: Question) -> Pieces:
    yield tuple(question.example.replace("\n", ""))


def _numbers(question: Question) -> Pieces:
    yield tuple(metrics.parse_list(question.example) or ())


def _domino(rng: Random, n: int, items: Sequence[str]) -> Drawn:
    start = f"{rng.randint(1, 9)}{rng.randint(1, 9)}"
    chain = [start]
    while len(chain) < n:
        last = len(chain) == n - 1
        digits = [d for d in "0123456789" if (d != "0" or last) and chain[-1][1] + d != "10"]
        chain.append(chain[-1][1] + rng.choice(digits))
    answer = {"length": n, "start": int(start), "example": list_text(chain)}
    return Drawn({"length": n, "start": start}, answer, f"domino {n} {start}", {"width": 2})


def _chains(question: Question) -> Pieces:
    """Right answers, the first ones where there are more than can be listed."""
    length = question.facts["length"]

    def longer(chain: str) -> Iterator[str]:
        if len(chain) == 2 * length:
            yield chain
            return
        for digit in range(0 if len(chain) == 2 * length - 2 else 1, 10):
            if chain[-1] + str(digit) != "10":
                yield from longer(f"{chain}{chain[-1]}{digit}")

    yield from (tuple(chain) for chain in islice(longer(str(question.facts["start"])), _CHAINS))


def _running(rng: Random, n: int, items: Sequence[str]) -> Drawn:
    given = [rng.randint(1, 9) for _ in range(n)]
    text = ", ".join(map(str, given))
    return Drawn({"list": f"[{text}]"}, "[" + ", ".join(map(str, accumulate(given))) + "]", text)


def _arithmetic(rng: Random, n: int, items: Sequence[str]) -> Drawn:
    """Two to four numbers whose result has n digits: sums and differences, or a product of two."""
    while True:
        if rng.random() < 1 / 3:
            half = n // 2
            values = [rng.randrange(10**half, 10 ** (half + 1)), rng.randrange(10 ** (n - half - 1), 10 ** (n - half))]
            signs = ["×"]  # noqa: RUF001 - as the questions write it
            result = values[0] * values[1]
        else:
            values = [rng.randrange(10 ** (n - 1), 10**n) for _ in range(rng.randint(2, 4))]
            signs = [rng.choice("+-") for _ in values[1:]]
            result = values[0] + sum(v if s == "+" else -v for s, v in zip(signs, values[1:], strict=True))
        if result > 0 and len(str(result)) == n:
            text = str(values[0]) + "".join(f" {s} {v}" for s, v in zip(signs, values[1:], strict=True))
            return Drawn({"equation": text}, str(result), text)


PUZZLES = (
    Task(
        "latin_square", "puzzle", (4,), 64,
        "Write a Latin square of size {size} with the symbols {symbols}. Only output the result as CSV without a header.",
        _latin, metrics.latin, _latin_answers, lambda pieces, question: _lines(pieces, ","), range=(4, 4),
    ),
    Task(
        "sudoku", "puzzle", (4,), 64,
        "Solve this sudoku of four by four with the digits 1 to 4. Only provide the four lines.\n{puzzle}",
        _sudoku, metrics.sudoku, _characters, lambda pieces, question: _lines(pieces), range=(4, 4),
    ),
)  # fmt: skip
EXTRA = (
    Task(
        "domino", "extra", (3, 4, 5, 6), 64,
        "Write {length} numbers of two digits, each beginning with the last digit of the one before. Start with {start}. "
        "Only provide the final answer.",
        _domino, metrics.domino, _chains, lambda pieces, question: list_text(cut(pieces, 2)), range=(2, 12),
        complete=False, repeats=True,
    ),
    Task(
        "cumulative_sum", "extra", (3, 4, 5, 6), 64,
        "Give the list of running sums of {list}. Only provide the final answer as a list.",
        _running, metrics.same_numbers, _numbers,
        lambda pieces, question: "[" + ", ".join(pieces) + "]", range=(2, 24),
    ),
    Task(
        "arithmetic", "extra", (5, 10, 15, 20), 64, "{equation} = ? Only provide the final answer.",
        _arithmetic, metrics.number, one_answer, lambda pieces, question: "".join(pieces), range=(2, 50),
    ),
)  # fmt: skip
