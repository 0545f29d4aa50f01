"""Linear operators of every layout and instruction set: against float64, and bit for bit whatever else is in the pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.kernels import library, weights

if not library.available():
    pytest.skip("the native library was not built", allow_module_level=True)

from test_pack import SOURCES, stored


def levels() -> list[str]:
    """The instruction sets of this processor, best first."""
    found = []
    for name in library.LEVELS[1:]:
        try:
            library.set_level(name)
            found.append(name)
        except ConfigError:
            pass
    library.set_level("auto")
    return found


LEVELS = levels()


@pytest.fixture(autouse=True)
def best_level():
    yield
    library.set_level("auto")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", sorted(SOURCES))
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 50),
    blocks=st.integers(1, 3),
    odd=st.integers(0, 9),
    tokens=st.integers(1, 70),
    seed=st.integers(0, 10**6),
)
def test_products_are_right_and_independent_of_their_company(level, kind, rows, blocks, odd, tokens, seed):
    source, step = SOURCES[kind]
    cols = blocks * step if step > 1 else 29 * blocks + odd  # float weights: around whole tiles of 32
    raw, values = stored(kind, rows, cols, seed)
    packed = weights.pack(source, raw, rows, cols)
    x = np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)
    want = x.astype(np.float64) @ values.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(values).T.astype(np.float64) + 1e-9
    library.set_level(level)
    for mode, bound in (("exact", 1e-6), ("int8", 1e-6 if step == 1 else 0.02)):
        got = packed.multiply(x, mode)
        assert (np.abs(got - want) <= bound * size + 1e-30).all()
        for some in (slice(0, 1), slice(tokens // 2, tokens // 2 + 3), slice(tokens - 1, tokens)):
            assert np.array_equal(packed.multiply(x[some], mode), got[some])


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 33, 64, 130, 300])
@pytest.mark.parametrize("mode", library.ACTIVATIONS)
@pytest.mark.skipif(not {"amx", "avx512"} <= set(LEVELS), reason="this processor has no AMX")
def test_tiles_give_what_vectors_give(tokens, mode):
    """At every number of tokens, those that fill no tile too; with the largest digits, and broken and empty neighbours."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 768)).astype(np.float32)
    x[tokens // 2] *= 1e30
    x[:, 256:512] = 16777215 / 2**24 * rng.choice([-1.0, 1.0], (tokens, 256))  # every digit as large as it gets
    x[-1] = np.abs(x[-1])
    if tokens > 3:
        x[3, 7], x[2] = np.nan, 0.0
    for kind in sorted(set(SOURCES) - {"BF16"}):  # those have sums of their own with AMX
        raw, _ = stored(kind, 50, 768, 3)
        packed = weights.pack(SOURCES[kind][0], raw, 50, 768)
        out = []
        for level in ("amx", "avx512"):
            library.set_level(level)
            out.append(packed.multiply(x, mode))
        assert np.array_equal(out[0], out[1], equal_nan=True), kind


def top16(x):
    """What fits a bfloat16, by cutting."""
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize(("tokens", "cols"), [(1, 96), (2, 33), (5, 64), (6, 1), (16, 100), (17, 576), (40, 31)])
@pytest.mark.skipif("amx" not in LEVELS, reason="this processor has no AMX")
def test_bfloat16_by_tiles_is_three_pieces_whose_sums_are_those_of_the_manual(tokens, cols):
    """TDPBF16PS, spelled out: in 32 columns a chain of sums for even and one for odd ones, from the first to the last."""
    raw, values = stored("BF16", 35, cols, tokens)
    x = np.random.default_rng(cols).standard_normal((tokens, cols)).astype(np.float32)
    wide = (cols + 31) // 32 * 32
    w, rest = np.zeros((35, wide), np.float32), np.zeros((tokens, wide), np.float32)
    w[:, :cols], rest[:, :cols] = values, x
    sums = []
    for _ in range(3):
        piece = top16(rest)
        rest = rest - piece
        total = np.zeros((tokens, 35), np.float32)
        for first in range(0, wide, 32):
            chain = np.zeros((2, tokens, 35), np.float32)
            for k in range(32):
                chain[k % 2] += piece[:, first + k, None] * w[None, :, first + k]
            total += chain[0] + chain[1]
        sums.append(total)
    assert not rest.any()
    library.set_level("amx")
    got = weights.pack(SOURCES["BF16"][0], raw, 35, cols).multiply(x)
    assert np.array_equal(got, sums[2] + sums[1] + sums[0])


@pytest.mark.parametrize("mode", library.ACTIVATIONS)
@pytest.mark.parametrize("kind", sorted(SOURCES))
def test_threads_change_no_bit_and_instruction_sets_little(kind, mode):
    """AVX2 and AVX-512 compute int8 and float weights alike; EXACT on quants is whole numbers here and float32 there.

    bfloat16 by AMX is in pieces.
    """
    source, _ = SOURCES[kind]
    raw, _ = stored(kind, 90, 256, 3)
    packed = weights.pack(source, raw, 90, 256)
    x = np.random.default_rng(1).standard_normal((9, 256)).astype(np.float32)
    before = library.native().hasten_threads()
    out = {}
    for level in LEVELS:
        library.set_level(level)
        for threads in (1, 2, 5):
            library.set_threads(threads)
            out[level, threads] = packed.multiply(x, mode)
    library.set_threads(before)
    for level in LEVELS:
        assert all(np.array_equal(out[level, 1], out[level, threads]) for threads in (2, 5))
    if {"avx512", "avx2"} <= set(LEVELS):
        if mode == "int8" or kind in ("F32", "F16", "BF16"):
            assert np.array_equal(out["avx512", 1], out["avx2", 1])
        else:
            assert np.allclose(out["avx512", 1], out["avx2", 1], rtol=1e-5, atol=2e-5)
    assert np.allclose(out[LEVELS[0], 1], out["portable", 1], rtol=1e-4, atol=1e-5)


def test_int8_activations_are_exact_where_rounding_loses_nothing():
    """Whole numbers with a peak of 127 in every 32 columns are their own 8-bit form."""
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (5, 64)).astype(np.float32)
    x[:, ::32] = 127
    for kind in ("Q4_0", "Q4_1", "Q8_0", "Q5_0"):
        raw, _ = stored(kind, 20, 64, 2)
        packed = weights.pack(SOURCES[kind][0], raw, 20, 64)
        for level in LEVELS:
            library.set_level(level)
            assert np.allclose(packed.multiply(x, "int8"), packed.multiply(x, "exact"), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_exact_activations_lose_no_more_than_float32_sums_do(level, kind):
    """Columns of very different sizes side by side, very small and very large ones: against sums in float64."""
    library.set_level(level)
    rng = np.random.default_rng(5)
    raw, values = stored(kind, 40, 512, 6)
    packed = weights.pack(SOURCES[kind][0], raw, 40, 512)
    x = (rng.standard_normal((12, 512)) * 10.0 ** rng.uniform(-4, 3, (12, 512))).astype(np.float32)
    x[:, ::37] = 0.0
    for scale in (1e-30, 1e-20, 1.0, 1e20, 1e30):
        given = (x * np.float32(scale)).astype(np.float32)
        want = given.astype(np.float64) @ values.T.astype(np.float64)
        size = np.abs(given).astype(np.float64) @ np.abs(values).T.astype(np.float64)
        rounded = np.abs(np.cumsum(given[:, None] * values[None], -1, dtype=np.float32)[:, :, -1] - want)
        with np.errstate(over="ignore"):
            error = np.abs(packed.multiply(given) - want)
        if scale != 1e-30:  # columns below 2^-100 count as nothing where activations are whole numbers
            assert (error <= 1e-6 * size).all()
            assert error.mean() <= 2 * rounded.mean() + 1e-7 * size.mean()
        assert error.max() <= 1e-4 * size.max() + 1e-34
    assert (packed.multiply(np.zeros((2, 512), np.float32)) == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_lost_in_rounding(level, bad):
    library.set_level(level)
    for kind in ("BF16", "Q4_0", "Q4_1", "Q8_0"):
        raw, _ = stored(kind, 20, 64, 2)
        packed = weights.pack(SOURCES[kind][0], raw, 20, 64)
        x = np.ones((2, 64), np.float32)
        x[1, 5] = bad
        for mode in library.ACTIVATIONS:
            got = packed.multiply(x, mode)
            assert np.isfinite(got[0]).all()
            assert not np.isfinite(got[1]).any()


def test_no_tokens_give_no_rows_and_wrong_shapes_are_refused():
    packed = weights.pack_float(np.ones((3, 4), np.float32))
    assert packed.multiply(np.zeros((0, 4), np.float32)).shape == (0, 3)
    with pytest.raises(ConfigError, match="x"):
        packed.multiply(np.zeros((1, 5), np.float32))
    with pytest.raises(ConfigError, match="activations"):
        packed.multiply(np.zeros((1, 4), np.float32), "int4")


def test_levels_and_threads_that_are_not_there_are_refused():
    for name in ("sse", "", "avx1024"):
        with pytest.raises(ConfigError, match="level"):
            library.set_level(name)
    for count in (0, 257, -1):
        with pytest.raises(ConfigError, match="threads"):
            library.set_threads(count)
