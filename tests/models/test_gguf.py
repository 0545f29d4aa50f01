"""GGUF files: logits against transformers for every block format and family, and dequantisation against our own reading."""

from __future__ import annotations

import checkpoints
import gguf_files
import numpy as np
import pytest
import torch

from hasten.errors import FormatError, UnsupportedError
from hasten.models.gguf import open_gguf
from hasten.models.load import load

KINDS = ["F32", "F16", "BF16", *gguf_files.DECODERS]


def logits_match(path, reference) -> None:
    loaded = load(path, dtype="float32", backbone="torch")
    ids = checkpoints.ids(2, 40)
    with torch.no_grad():
        want = reference(ids).logits
        assert want.std() > 0.1
        assert (loaded.model(ids) - want).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_format_gives_the_logits_of_transformers(kind, tmp_path):
    reference = checkpoints.build("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    gguf_files.write(tmp_path / "m.gguf", reference, kind)
    logits_match(tmp_path / "m.gguf", reference)


@pytest.mark.parametrize("name", ["llama3-rope", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_every_family_gives_the_logits_of_transformers(name, tmp_path):
    # files carry no query scalar: the head dimension is meant
    changes = {"query_pre_attn_scalar": 16} if name == "gemma2" else {}
    reference = checkpoints.build(name, **changes)
    gguf_files.write(tmp_path / "m.gguf", reference)
    logits_match(tmp_path / "m.gguf", reference)


@pytest.mark.parametrize("kind", list(gguf_files.DECODERS))
def test_dequantisation_equals_a_second_reading_of_the_format(kind, tmp_path):
    import gguf

    values = np.random.default_rng(3).normal(size=(48, 512)).astype(np.float32)
    raw, exact = gguf_files.encode(values, kind, np.random.default_rng(4))
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    w.add_tensor("x", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    np.testing.assert_allclose(open_gguf(tmp_path / "m.gguf").dequantize("x"), exact, rtol=2e-6, atol=1e-9)


def test_another_architecture_and_missing_metadata_are_named(tmp_path):
    import gguf

    for arch, error, words in (("mamba", UnsupportedError, "mamba"), ("llama", FormatError, "embedding_length")):
        w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), arch)
        w.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        with pytest.raises(error, match=words):
            load(tmp_path / "m.gguf")


def test_a_tokenizer_comes_with_the_file(tmp_path):
    reference = checkpoints.build("llama")
    gguf_files.write(tmp_path / "m.gguf", reference)
    tokenizer = load(tmp_path / "m.gguf").tokenizer
    assert tokenizer.decode(tokenizer.encode("the thing \u00e9\u4e16")) == "the thing \u00e9\u4e16"
    assert tokenizer.token_text(tokenizer.encode("th")[0]) == "th"
    assert tokenizer.eos_ids == (2,)
