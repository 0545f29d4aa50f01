"""Where models come from: what is opened, what is refused, and the memory check."""

from __future__ import annotations

import json

import checkpoints
import pytest

import hasten
from hasten.errors import ConfigError, FormatError, MemoryFitError, UnknownNameError, UnsupportedError
from hasten.models import load as loading
from hasten.models.load import load


@pytest.fixture
def folder(tmp_path):
    checkpoints.build("llama").save_pretrained(tmp_path)
    return tmp_path


def test_pickled_weights_are_refused_unopened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin.*never opened"):
        load(folder)


def test_code_and_pickles_beside_the_weights_are_ignored(folder):
    ran = folder / "ran"
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization_llama.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w').close()")
    (folder / "tokenizer.pkl").write_bytes(b"not a pickle")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llama.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder, backbone="torch").model.name == "torch"
    assert not ran.exists()


def test_a_model_that_does_not_fit_is_refused_with_numbers_unless_forced(folder, monkeypatch):
    monkeypatch.setattr(loading, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryFitError, match=r"GB.*--force"):
        load(folder)
    assert load(folder, force=True, backbone="torch").model.name == "torch"


@pytest.mark.parametrize("dtype", ["float16", "int8", "FP32", ""])
def test_unknown_types_are_refused(folder, dtype):
    with pytest.raises(ConfigError, match="dtype"):
        load(folder, dtype=dtype)


def test_a_name_that_nothing_answers_to_is_met_with_the_nearest():
    with pytest.raises(UnknownNameError, match="smollm2-135m"):
        load("smolm2-135m")
    with pytest.raises(ConfigError, match="model is empty"):
        load("")


def test_other_files_and_empty_directories_are_refused(tmp_path):
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(FormatError, match="neither"):
        load(tmp_path / "model.txt")
    with pytest.raises(FormatError, match=r"config\.json"):
        load(tmp_path)


def test_progress_reaches_the_end(folder):
    seen = []
    hasten.load(folder, cache_bytes=10_000_000, progress=lambda *a: seen.append(a))
    assert seen[-1][1] == seen[-1][2] > 0


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {"a": "../x"}}, {"weight_map": {"a": 5}}, [], "x"])
def test_a_broken_index_is_named(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="index"):
        load(folder)
