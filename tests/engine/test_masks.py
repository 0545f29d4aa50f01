"""Masks against a definition written as loops over pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.masks import BlockCausal, Causal, Explicit, Full, PerLayer, PrefixLM, Tree, at_layer, mask
from hasten.errors import ConfigError


def ancestors(parents: tuple[int, ...], i: int) -> set[int]:
    seen = set()
    while i >= 0:
        seen.add(i)
        i = parents[i]
    return seen


def sees(visibility: object, q: int, k: int, qpos: int, kpos: int, start: int, window: int | None) -> bool:
    if window is not None and abs(qpos - kpos) >= window:
        return False
    if isinstance(visibility, Causal):
        return k <= start + q
    if isinstance(visibility, BlockCausal):
        return kpos // visibility.block <= qpos // visibility.block
    if isinstance(visibility, PrefixLM):
        return kpos < visibility.prefix or kpos <= qpos
    if isinstance(visibility, Tree):
        return k < start or k - start in ancestors(visibility.parents, q)
    return True


@st.composite
def cases(draw: st.DrawFn) -> tuple[object, list[int], list[int], int, int | None]:
    start, t = draw(st.integers(0, 6)), draw(st.integers(1, 8))
    window = draw(st.none() | st.integers(1, 10))
    kind = draw(st.sampled_from(["causal", "full", "block", "prefix", "tree"]))
    positions = list(range(start + t))
    if kind == "tree":
        parents = tuple(draw(st.integers(-1, i - 1)) for i in range(t))
        depth: list[int] = []
        for parent in parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        positions = list(range(start)) + [start + d for d in depth]
        return Tree(parents), positions[start:], positions, start, window
    visibility = {
        "causal": Causal(), "full": Full(), "block": BlockCausal(draw(st.integers(1, 5))),
        "prefix": PrefixLM(draw(st.integers(0, 9))),
    }[kind]  # fmt: skip
    return visibility, positions[start:], positions, start, window


@given(cases())
def test_mask_equals_its_definition(case: tuple) -> None:
    visibility, qpos, kpos, start, window = case
    got = mask(visibility, torch.tensor(qpos), torch.tensor(kpos), start, window)
    want = [[sees(visibility, q, k, qpos[q], kpos[k], start, window) for k in range(len(kpos))] for q in range(len(qpos))]
    if got is None:
        assert all(all(row) for row in want)
    else:
        assert got.tolist() == want


def test_per_layer_resolves_before_a_mask_is_made() -> None:
    mixed = PerLayer(Causal(), {1: Full()})
    assert at_layer(mixed, 1) == Full()
    assert at_layer(mixed, 2) == Causal()
    with pytest.raises(ConfigError, match="at_layer"):
        mask(mixed, torch.arange(2), torch.arange(2), 0)


@pytest.mark.parametrize("parents", [(0,), (-1, 1), (-2,), (-1, 0, 5)])
def test_tree_refuses_parents_that_do_not_come_first(parents: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="parents"):
        Tree(parents)


def test_wrong_shapes_and_ranges_are_named() -> None:
    with pytest.raises(ConfigError, match="shape"):
        mask(Explicit(torch.ones(2, 2, dtype=torch.bool)), torch.arange(2), torch.arange(3), 1)
    with pytest.raises(ConfigError, match="parents"):
        mask(Tree((-1, 0)), torch.arange(3), torch.arange(3), 0)
    with pytest.raises(ConfigError, match="block"):
        BlockCausal(0)
    with pytest.raises(ConfigError, match="prefix"):
        PrefixLM(-1)
