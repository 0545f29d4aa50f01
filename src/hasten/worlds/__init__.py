"""Procedural worlds: endless small tasks whose answers a program can check, in plain printable ASCII.

One file per world. `WORLDS` holds them by name; prompts of the splits train, dev and test never meet (`split_of`).
"""

from hasten.worlds import add, close, copy, records, remove, replace, reverse, shuffle, sort, subtract, sums
from hasten.worlds.base import SPLITS, Sample, Split, World, split_of

WORLDS: dict[str, World] = {
    module.WORLD.name: module.WORLD
    for module in (copy, reverse, sort, shuffle, replace, remove, close, add, subtract, sums, records)
}

__all__ = ["SPLITS", "WORLDS", "Sample", "Split", "World", "split_of"]
