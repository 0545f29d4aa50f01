"""Packed files: what is written comes back mapped, damage is noticed, and a changed model is packed anew."""

from __future__ import annotations

from contextlib import suppress

import checkpoints
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engine.contracts import RowInput
from hasten.errors import HastenError
from hasten.kernels import library
from hasten.models import packing
from hasten.models.load import load
from hasten.models.native import NativeStack

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")
ROW = RowInput(torch.tensor([3, 4, 5]), torch.arange(3), logits="all")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packing, "WORTH", 0)
    return tmp_path / "home"


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_packed_file_gives_the_same_numbers(name, tmp_path):
    stack = tiny.model(tiny.CONFIGS[name])
    weights = packing.from_state(stack.config, stack.named_parameters(), torch.float32)
    packing.write(weights, tmp_path / "m.hpk")
    mapped = packing.read(tmp_path / "m.hpk", stack.config)
    assert mapped.nbytes == weights.nbytes
    assert (mapped.matrices["head"].data.ctypes.data == mapped.matrices["embed"].data.ctypes.data) == stack.config.tied
    want = NativeStack(stack.config, weights).run([ROW]).logits
    assert torch.equal(NativeStack(stack.config, mapped).run([ROW]).logits, want)


def test_the_cache_is_used_and_a_changed_model_is_packed_anew(home, tmp_path, monkeypatch):
    checkpoints.build("llama").save_pretrained(tmp_path / "m")
    first = load(tmp_path / "m").model
    files = list((home / "packed").iterdir())
    assert len(files) == 1
    monkeypatch.setattr(packing, "from_state", lambda *args: pytest.fail("packed again"))
    again = load(tmp_path / "m").model
    assert torch.equal(again.run([ROW]).logits, first.run([ROW]).logits)
    monkeypatch.undo()
    monkeypatch.setenv("HASTEN_HOME", str(home))
    monkeypatch.setattr(packing, "WORTH", 0)
    checkpoints.build("llama", seed=1).save_pretrained(tmp_path / "m")
    assert not torch.equal(load(tmp_path / "m").model.run([ROW]).logits, first.run([ROW]).logits)
    assert len(list((home / "packed").iterdir())) == 2


def test_a_damaged_cache_is_made_again(home, tmp_path):
    checkpoints.build("llama").save_pretrained(tmp_path / "m")
    want = load(tmp_path / "m").model.run([ROW]).logits.clone()
    (file,) = (home / "packed").iterdir()
    for damage in (b"", b"hastenpk", file.read_bytes()[:-100], b"x" * 5000):
        file.write_bytes(damage)
        assert torch.equal(load(tmp_path / "m").model.run([ROW]).logits, want)
        assert file.stat().st_size > 5000


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WORTH", 0)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "file"))
    checkpoints.build("llama").save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m").model.run([ROW]).logits.isfinite().all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damaged_header_reaches_the_library(tmp_path_factory, data):
    """Any byte changed or cut: a FormatError, a refusal by the library's own checks, or a harmless change."""
    folder = tmp_path_factory.mktemp("p")
    stack = tiny.model()
    weights = packing.from_state(stack.config, stack.named_parameters(), torch.float32)
    packing.write(weights, folder / "m.hpk")
    raw = bytearray((folder / "m.hpk").read_bytes())
    header = int(np.frombuffer(bytes(raw[8:16]), "<u8")[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 16 + header - 1))
        raw[at] = data.draw(st.integers(0, 255))
    raw = raw[: len(raw) - data.draw(st.sampled_from([0, 0, 1, 64, len(raw) // 2]))]
    (folder / "m.hpk").write_bytes(raw)
    with suppress(HastenError):
        mapped = packing.read(folder / "m.hpk", stack.config)
        assert NativeStack(stack.config, mapped).run([ROW]).logits.shape == (3, tiny.VOCAB)
