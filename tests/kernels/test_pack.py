"""Packing changes no value: every stored type against a second implementation of its block format, any shape and order."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_files import encode
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigError, HastenError
from hasten.kernels import library, weights

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")
SOURCES = {
    "F32": (library.F32, 1), "F16": (library.F16, 1), "BF16": (library.BF16, 1), "Q4_0": (library.Q4_0, 32),
    "Q4_1": (library.Q4_1, 32), "Q5_0": (library.Q5_0, 32), "Q8_0": (library.Q8_0, 32), "Q4_K": (library.Q4_K, 256),
    "Q6_K": (library.Q6_K, 256),
}  # fmt: skip


def stored(kind: str, rows: int, cols: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes as a file holds them, the values they stand for) of a random matrix."""
    rng = np.random.default_rng(seed)
    raw, values = encode(rng.standard_normal((rows, cols), np.float32), kind, rng)
    return np.ascontiguousarray(raw).view(np.uint8).reshape(-1), values


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SOURCES)), st.integers(1, 70), st.integers(1, 3), st.integers(0, 5), st.integers(0, 10**6))
def test_rows_come_back_as_they_were(kind, rows, blocks, odd, seed):
    source, step = SOURCES[kind]
    cols = blocks * step + (odd if step == 1 else 0)
    raw, values = stored(kind, rows, cols, seed)
    order = np.random.default_rng(seed).permutation(rows).astype(np.int32)
    assert np.array_equal(weights.pack(source, raw, rows, cols).unpack(range(rows)), values)
    assert np.array_equal(weights.pack(source, raw, rows, cols, order).unpack(range(rows)), values[order])
    picked = weights.pack(source, raw, 1, cols, order[:1])
    assert np.array_equal(picked.unpack([0]), values[order[:1]])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_packed_bytes_do_not_depend_on_threads(threads):
    before = library.native().hasten_threads()
    raw, _ = stored("Q4_1", 100, 64, 1)
    want = weights.pack(library.Q4_1, raw, 100, 64).data.tobytes()
    library.set_threads(threads)
    assert weights.pack(library.Q4_1, raw, 100, 64).data.tobytes() == want
    library.set_threads(before)


@pytest.mark.parametrize(
    ("source", "rows", "cols", "cut", "order"),
    [
        (library.Q4_0, 4, 48, 0, None),  # no whole blocks
        (library.Q4_K, 4, 128, 0, None),
        (library.F32, 0, 4, 0, None),
        (library.F32, 4, 0, 0, None),
        (library.F32, 4, 8, 4, None),  # a row short
        (library.F32, 4, 8, 0, [0, 1, 2, 4]),  # a row there is not
        (library.F32, 4, 8, 0, [0, 1, 2, -1]),
        (99, 4, 8, 0, None),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(source, rows, cols, cut, order):
    raw = np.zeros(max(4, rows * cols * 4 - cut), np.uint8)
    with pytest.raises(HastenError):
        weights.pack(
            source, raw, rows, cols, None if order is None else np.array(order, np.int32), np.zeros(1 << 16, np.uint8)
        )


def test_a_row_that_is_not_there_cannot_be_unpacked():
    packed = weights.pack_float(np.ones((4, 4), np.float32))
    for wrong in (4, -1):
        with pytest.raises(HastenError, match="ids"):
            packed.unpack([wrong])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(weights.KINDS),
    st.integers(1, 20),
    st.sampled_from([(64, 32), (64, 64), (96, 32), (128, 64)]),
    st.integers(0, 10**6),
)
def test_rounding_to_nearest_stays_within_half_a_step(kind, rows, shape, seed):
    cols, group = shape
    w = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    source, raw = weights.quantize(w, kind, group)
    got = weights.pack(source, raw, rows, cols).unpack(range(rows))
    grouped, back = w.reshape(rows, -1, group), got.reshape(rows, -1, group)
    spread = grouped.max(-1, keepdims=True) - grouped.min(-1, keepdims=True)
    peak = np.abs(grouped).max(-1, keepdims=True)
    # int4 without a minimum has no eighth step on one side: its far end may be a whole step off
    step = {"int8": peak / 127 / 2, "int4": peak / 8, "int4-min": spread / 15 / 2}[kind]
    assert (np.abs(grouped - back) <= step * 1.01 + 2e-3 * peak).all()


def test_settings_of_rounding_are_checked():
    w = np.ones((2, 96), np.float32)
    for kind, group in (("int3", 32), ("int8", 16), ("int8", 64), ("int4", 0), ("int4", 33)):
        with pytest.raises(ConfigError):
            weights.quantize(w, kind, group)
    assert weights.pack(*weights.quantize(w, "int8", 96), 2, 96).unpack([0, 1]) == pytest.approx(w, rel=2e-3)
    assert not weights.pack(*weights.quantize(np.zeros((2, 32), np.float32), "int4"), 2, 32).unpack([0, 1]).any()
