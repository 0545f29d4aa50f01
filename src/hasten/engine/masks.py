"""Attention visibility as a value, and the one place that turns it into a mask.

A row's keys lie in slots 0..S-1 of its cache; its T queries of the current pass occupy slots start..start+T-1. A mask is
a bool tensor [T, S], True where a query may see a key, or None when every query sees every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from hasten.errors import out_of_range


@dataclass(frozen=True, slots=True)
class Causal:
    """A query sees earlier slots and itself."""

    name = "causal"


@dataclass(frozen=True, slots=True)
class Full:
    """A query sees every key of its row, later ones included."""

    name = "full"


@dataclass(frozen=True, slots=True)
class BlockCausal:
    """Blocks of `block` positions, aligned to position 0: a query sees its own block whole and all earlier blocks."""

    block: int
    name = "block_causal"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise out_of_range("block", self.block, "at least 1")


@dataclass(frozen=True, slots=True)
class PrefixLM:
    """The first `prefix` positions see each other fully; the rest is causal."""

    prefix: int
    name = "prefix_lm"

    def __post_init__(self) -> None:
        if self.prefix < 0:
            raise out_of_range("prefix", self.prefix, "at least 0")


@dataclass(frozen=True, slots=True)
class Tree:
    """The pass's queries form a tree: query i sees every slot before the pass, itself and its ancestors.

    `parents[i]` is the index of i's parent among the queries, -1 for none, always smaller than i. A chain is
    (-1, 0, 1, ...), so causal decoding, prefill and draft verification are one value.
    """

    parents: tuple[int, ...]
    name = "tree"

    def __post_init__(self) -> None:
        for i, parent in enumerate(self.parents):
            if not -1 <= parent < i:
                raise out_of_range(f"parents[{i}]", parent, f"in [-1, {i - 1}]: parents come before children")


@dataclass(frozen=True, slots=True, eq=False)
class Explicit:
    """Any rule a method needs: `allowed` bool [T, S] for this very pass."""

    allowed: Tensor
    name = "explicit"


@dataclass(frozen=True, slots=True)
class PerLayer:
    """`default` for every layer except those in `overrides` (layer index -> visibility)."""

    default: Visibility
    overrides: Mapping[int, Visibility] = field(default_factory=dict)
    name = "per_layer"


Visibility: TypeAlias = "Causal | Full | BlockCausal | PrefixLM | Tree | Explicit | PerLayer"

CAUSAL = Causal()
FULL = Full()
ALL_VISIBILITIES = frozenset({"causal", "full", "block_causal", "prefix_lm", "tree", "explicit", "per_layer"})


def at_layer(visibility: Visibility, layer: int) -> Visibility:
    """The visibility that holds in `layer`."""
    if isinstance(visibility, PerLayer):
        return visibility.overrides.get(layer, visibility.default)
    return visibility


@lru_cache(maxsize=256)
def _ancestors(parents: tuple[int, ...]) -> Tensor:
    """bool [T, T]: entry (i, j) is True when j is i or an ancestor of i."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            seen[i] |= seen[parent]
    return seen


def mask(
    visibility: Visibility,
    query_pos: Tensor,
    key_pos: Tensor,
    start: int,
    window: int | None = None,
) -> Tensor | None:
    """The bool mask [T, S] of one row's pass, or None when nothing is hidden.

    `query_pos` [T] and `key_pos` [S] are absolute positions; `start` is the slot of the first query. `window` limits a
    query to keys less than `window` positions away (in both directions where later keys are visible at all).
    """
    t, s = len(query_pos), len(key_pos)
    device = key_pos.device
    allowed: Tensor | None
    if isinstance(visibility, PerLayer):
        raise out_of_range("visibility", "per_layer", "resolved with at_layer before a mask is made")
    if isinstance(visibility, Explicit):
        if tuple(visibility.allowed.shape) != (t, s):
            raise out_of_range("visibility.allowed", tuple(visibility.allowed.shape), f"shape {(t, s)}")
        allowed = visibility.allowed
    elif isinstance(visibility, Full):
        allowed = None
    elif isinstance(visibility, Causal):
        if t == 1 and s == start + 1:
            allowed = None
        else:
            slots = torch.arange(s, device=device)
            allowed = slots[None, :] <= torch.arange(start, start + t, device=device)[:, None]
    elif isinstance(visibility, Tree):
        if len(visibility.parents) != t:
            raise out_of_range("parents", len(visibility.parents), f"one entry per query, {t} in all")
        if t == 1 and s == start + 1:
            allowed = None
        else:
            allowed = torch.zeros(t, s, dtype=torch.bool, device=device)
            allowed[:, :start] = True
            allowed[:, start : start + t] = _ancestors(visibility.parents).to(device)
    elif isinstance(visibility, BlockCausal):
        allowed = (key_pos // visibility.block)[None, :] <= (query_pos // visibility.block)[:, None]
    else:
        allowed = (key_pos[None, :] <= query_pos[:, None]) | (key_pos < visibility.prefix)[None, :]
    if window is not None:
        distance = query_pos[:, None] - key_pos[None, :]
        near = (distance < window) & (distance > -window)
        if not bool(near.all()):
            allowed = near if allowed is None else allowed & near
    return allowed
