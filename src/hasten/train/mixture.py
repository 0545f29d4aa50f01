"""What the small models learn from: samples of all worlds in canvases of many lengths, in batches of like length.

Batches depend on seed and step alone, so that a run that was cut goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from hasten.errors import out_of_range
from hasten.train import alphabet
from hasten.worlds import WORLDS, Sample, Split, World, split_of

CANVASES = (32, 64, 128, 256, 512)
USUAL = (0.45, 0.44, 0.075, 0.025, 0.01)  # how often answers for them come
WEIGHTS = {
    "copy": 0.13, "reverse": 0.11, "sort": 0.13, "shuffle": 0.05, "replace": 0.08, "remove": 0.08, "close": 0.05,
    "add": 0.13, "subtract": 0.11, "sums": 0.12, "records": 0.14,
}  # fmt: skip
GROUP = 16  # batches that are drawn together and then cut by length


@dataclass(frozen=True, slots=True)
class Mixture:
    """`tokens` per batch; `short` is the share of a run in which lengths grow.

    `tight` is the share of answers whose window ends within 16 tokens of them, `roomy` of those in twice the usual canvas;
    the others have the least of the usual canvases that fits. `canvases` is how often answers for each of CANVASES come,
    `late` how often in the last part of a run, from the share `turn` of it on (default: as before).
    """

    tokens: int = 4096
    short: float = 0.18
    tight: float = 0.55
    roomy: float = 0.1
    seed: int = 0
    canvases: tuple[float, ...] = USUAL
    late: tuple[float, ...] | None = None
    turn: float = 0.7

    def __post_init__(self) -> None:
        if self.tokens < 1100:
            raise out_of_range("tokens", self.tokens, "at least 1100, for one sample of the longest")
        for name, weights in (("canvases", self.canvases), ("late", self.late or self.canvases)):
            if len(weights) != len(CANVASES) or min(weights) < 0 or not any(weights[:2]):
                raise out_of_range(name, weights, f"{len(CANVASES)} weights of at least 0, the first two not both 0")
        if not 0 <= self.turn <= 1:
            raise out_of_range("turn", self.turn, "in [0, 1]")


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples side by side: `ids` [B, T], padded behind; `answer`, the windows that may be masked; `known`, no padding.

    `weights` [B, T] are those of the loss: 1 for text and the token that ends it, 0.2 for the ends behind it.
    """

    ids: Tensor
    answer: Tensor
    known: Tensor
    weights: Tensor


def row(sample: Sample, canvas: int) -> tuple[list[int], int]:
    """(ids, length of the prompt): start token, prompt, answer, and end tokens up to the canvas.

    Raises ConfigError for an empty answer and for one that leaves no room for its end.
    """
    prompt, answer = [alphabet.BOS, *alphabet.encode(sample.prompt)], alphabet.encode(sample.answer)
    if not answer or len(answer) >= canvas:
        raise out_of_range("answer", f"{len(answer)} tokens", f"1 to {canvas - 1}: the canvas has {canvas}")
    return [*prompt, *answer, *[alphabet.EOS] * (canvas - len(answer))], len(prompt)


def collate(rows: Sequence[tuple[list[int], int]]) -> Batch:
    """Rows as one batch."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), alphabet.PAD)
    places = torch.arange(longest)
    for i, (one, _) in enumerate(rows):
        ids[i, : len(one)] = torch.tensor(one)
    known = places < torch.tensor([len(one) for one, _ in rows])[:, None]
    answer = known & (places >= torch.tensor([prompt for _, prompt in rows])[:, None])
    ends = answer & (ids == alphabet.EOS)
    weights = torch.where(ends & (ends.cumsum(1) > 1), 0.2, 1.0) * answer
    return Batch(ids, answer, known, weights)


def draw(rng: Random, mixture: Mixture, progress: float = 1.0, split: Split = "train") -> tuple[Sample, int]:
    """A sample and its canvas; `progress` is the share of the run that is over."""
    grown = min(1.0, progress / mixture.short) if mixture.short else 1.0
    longest = CANVASES[min(len(CANVASES) - 1, int(grown * len(CANVASES)))]
    while True:
        world = WORLDS[rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]]
        weights = mixture.late if mixture.late and progress >= mixture.turn else mixture.canvases
        sample = sample_of(world, rng, _size(world, rng, weights, longest, grown))
        if split_of(sample.prompt) == split:
            return sample, canvas_of(len(sample.answer), rng, mixture)


def _size(world: World, rng: Random, weights: Sequence[float], longest: int, grown: float) -> int:
    fitting = [world.fitting(canvas, above) for canvas, above in zip(CANVASES, (0, *CANVASES), strict=False)]
    allowed = [
        (sizes, weight) for canvas, sizes, weight in zip(CANVASES, fitting, weights, strict=True)
        if sizes and canvas <= max(longest, 64)
    ]  # fmt: skip
    sizes = rng.choices([sizes for sizes, _ in allowed], [weight for _, weight in allowed])[0]
    most = max(1, round(len(sizes) * (0.3 + 0.7 * grown)))
    return rng.choice(sizes[:most])


def sample_of(world: World, rng: Random, size: int) -> Sample:
    """A sample of a world with this many items."""
    return world.generate(rng, world.difficulty(size))


def canvas_of(answer: int, rng: Random, mixture: Mixture) -> int:
    """A canvas for an answer: tight, the least of the usual ones that fits, or the next one."""
    least = next(canvas for canvas in CANVASES if answer < canvas)
    chance = rng.random()
    if chance < mixture.tight:
        return min(answer // 8 * 8 + rng.choice((8, 8, 8, 16)), CANVASES[-1])
    return min(2 * least, CANVASES[-1]) if chance < mixture.tight + mixture.roomy else least


def batch(mixture: Mixture, step: int, steps: int) -> Batch:
    """The batch of a step of a run of `steps`: like lengths together, every group of batches a fair draw."""
    rows = _group(mixture, step // GROUP, steps)
    return collate(rows[step % GROUP])


_LAST: dict[tuple[Mixture, int, int], list[list[tuple[list[int], int]]]] = {}


def _group(mixture: Mixture, index: int, steps: int) -> list[list[tuple[list[int], int]]]:
    key = (mixture, index, steps)
    if key not in _LAST:
        _LAST.clear()
        rng = Random(f"{mixture.seed} {index}")  # noqa: S311 - tasks, not secrets
        rows, total = [], 0
        while total < mixture.tokens * GROUP:
            rows.append(row(*draw(rng, mixture, index * GROUP / steps)))
            total += len(rows[-1][0])
        rows.sort(key=lambda one: len(one[0]))
        parts: list[list[tuple[list[int], int]]] = [[] for _ in range(GROUP)]
        done = 0
        for one in rows:
            parts[min(GROUP - 1, done * GROUP // total)].append(one)
            done += len(one[0])
        parts = [part for part in parts if part] or [rows]
        parts += [parts[i % len(parts)] for i in range(GROUP - len(parts))]
        rng.shuffle(parts)
        _LAST[key] = parts
    return _LAST[key]
