"""Models written compressed: the rule of weights=, both sources, what is kept, and nothing half done."""

from __future__ import annotations

import json
import shutil

import checkpoints
import gguf_files
import numpy as np
import pytest
import torch
from chat_model import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hasten
from hasten.engine.contracts import RowInput
from hasten.errors import ConfigError, FormatError, UnsupportedError
from hasten.kernels import library
from hasten.kernels.weights import quantize
from hasten.models import export
from hasten.models.catalog import MINI
from hasten.models.export import compress
from hasten.models.load import load
from hasten.models.rounding import Rounding
from hasten.models.tokenizer import Tokenizer

native = pytest.mark.skipif(not library.available(), reason="the native library was not built")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def bits_of(words, bits, count):
    """Unsigned numbers [lines, count] out of 32-bit words, by shifting each."""
    each = 32 // bits
    wide = np.asarray(words, np.int64) & 0xFFFFFFFF
    return np.stack([wide[:, i // each] >> (bits * (i % each)) & ((1 << bits) - 1) for i in range(count)], 1)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 20),
    blocks=st.integers(1, 3),
    kind=st.sampled_from(["int8", "int4", "int4-min"]),
    group=st.sampled_from([None, 32, 64]),
    scales=st.sampled_from(["F16", "BF16"]),
    shift=st.sampled_from([0.0, 0.3, -2.0]),
    seed=st.integers(0, 50),
)
def test_rounding_is_to_nearest_and_says_what_it_gives(rows, blocks, kind, group, scales, shift, seed):
    cols = 64 * blocks
    weight = (np.random.default_rng(seed).normal(size=(rows, cols)) * 0.05 + shift).astype(np.float32)
    weight[0, :32] = 0
    how = Rounding(kind, group)
    tensors, values = how.encode(weight, scales)
    named = how.tensors("x", (rows, cols), scales)
    assert [one.shape for one in tensors] == [shape for *_, shape in named]
    stored = dict(zip((name.rpartition(".")[2] for name, *_ in named), tensors, strict=True))
    scale = stored["weight_scale"]
    wide = (scale.astype(np.uint32) << 16).view(np.float32) if scales == "BF16" else scale.astype(np.float32)
    groups = wide.shape[1]
    codes = bits_of(stored["weight_packed"], how.bits, cols).reshape(rows, groups, -1)
    zero = np.full((rows, groups, 1), 1 << (how.bits - 1))
    if kind == "int4-min":
        zero = bits_of(stored["weight_zero_point"].T, 4, rows).T[:, :, None]
    assert np.array_equal(values.reshape(codes.shape), (codes - zero) * wide[:, :, None])
    assert stored["weight_shape"].tolist() == [rows, cols]
    nearer = np.abs(values - weight).reshape(codes.shape)
    step = np.abs(wide)[:, :, None]
    least, most = {"int8": (-127, 127), "int4": (-8, 7), "int4-min": (-zero, 15 - zero)}[kind]
    ends = np.sort(np.stack((least * wide[:, :, None] + 0 * zero, most * wide[:, :, None] + 0 * zero)), 0)
    inside = (weight.reshape(codes.shape) >= ends[0]) & (weight.reshape(codes.shape) <= ends[1])
    assert (nearer <= step / 2 * 1.001 + 1e-9)[inside].all()
    if kind == "int4-min":
        assert (nearer <= step * 1.001 + 1e-9).all()
    products = np.float32(wide[:, :, None] * zero)
    assert np.array_equal(products.astype(np.float16).astype(np.float32), products)  # what the native blocks need


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("group", [32, 64, None])
def test_the_rule_is_that_of_loading_with_weights(kind, group):
    weight = np.random.default_rng(3).normal(size=(7, 128)).astype(np.float32)
    _, stored = quantize(weight, kind, group or 128)
    blocks = stored.reshape(7, 4, -1)
    scale = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float32)
    raw = blocks[:, :, 2:]
    q = raw.view(np.int8).astype(np.float32) if kind == "int8" else np.concatenate((raw & 15, raw >> 4), -1) - 8.0
    assert np.array_equal(Rounding(kind, group).encode(weight, "F16")[1], (q * scale).reshape(7, 128))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e8])
@pytest.mark.parametrize("kind", ["int8", "int4", "int4-min"])
def test_weights_that_cannot_be_rounded_are_an_error(kind, value):
    weight = np.ones((2, 32), np.float32)
    weight[1, 3] = value
    with pytest.raises(FormatError, match="cannot be rounded"):
        Rounding(kind, 32).encode(weight, "F16")


@native
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_written_model_computes_as_one_rounded_when_it_is_loaded(tmp_path, kind):
    """Same scales, same codes: bit for bit the same logits, so the same text."""
    facts = compress("mini-ar", tmp_path / "c", weights=kind, embeddings="int8")
    assert facts["bits_per_weight"] == pytest.approx({"int8": 8.6, "int4": 4.6}[kind], abs=0.1)
    want, got = hasten.load("mini-ar", weights=kind), hasten.load(str(tmp_path / "c"))
    ids = torch.tensor(want.encode("copy: cat sun pen"))
    row = RowInput(ids, torch.arange(len(ids)), logits="all")
    assert torch.equal(got.model.run([row]).logits, want.model.run([row]).logits)
    for prompt in ("copy: cat sun pen", "add: 47+85"):
        assert got.generate(prompt, max_tokens=24).tokens == want.generate(prompt, max_tokens=24).tokens


def test_native_and_torch_write_the_same_text(tmp_path):
    compress("mini-ar", tmp_path / "c", weights="int4-min", group=64)
    texts = {
        hasten.load(str(tmp_path / "c"), backbone=b).generate("copy: cat sun pen", max_tokens=20).text
        for b in ("auto", "torch")
    }
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["mini-dlm", "mini-bdlm"])
def test_diffusion_models_are_written_too(tmp_path, name):
    compress(name, tmp_path / "c", weights="int4", group="channel")
    plain, small = load(name), load(tmp_path / "c")
    assert small.config == plain.config
    assert small.tokenizer.mask_id == plain.tokenizer.mask_id
    assert small.bytes < plain.bytes / (3 if library.available() else 0.9)


def test_what_is_kept_and_what_is_said(tmp_path):
    facts = compress("mini-ar", tmp_path / "c", weights="int4", group=32)
    source, stored = load_file(MINI / "mini-ar" / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors")
    for name, tensor in stored.items():
        if not name.rpartition(".")[2].startswith("weight_"):
            assert torch.equal(tensor, source[name])
            assert "proj" not in name
    assert {name for name in source if "proj" in name} == {
        name.replace("weight_packed", "weight") for name in stored if name.endswith("weight_packed")
    }
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    plain = json.loads((MINI / "mini-ar" / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == plain
    assert section["format"] == "pack-quantized"
    assert section["ignore"] == ["lm_head"]
    assert section["config_groups"]["group_0"]["targets"] == ["Linear"]
    for name in ("tokenizer.json", "tokenizer_config.json", "card.json"):
        assert (tmp_path / "c" / name).read_bytes() == (MINI / "mini-ar" / name).read_bytes()
    assert facts["bytes"] == (tmp_path / "c" / "model.safetensors").stat().st_size
    assert facts["bytes_before"] == (MINI / "mini-ar" / "model.safetensors").stat().st_size
    assert facts["parameters"] == load("mini-ar").config.parameters
    wrong = whole = 0.0
    after = dict(load(tmp_path / "c", backbone="torch").model.named_parameters())
    before = dict(load("mini-ar", backbone="torch", dtype="float32").model.named_parameters())
    for name, tensor in before.items():
        if tensor.ndim == 2 and name.startswith("layers"):
            wrong += float((after[name] - tensor).double().square().sum())
            whole += float(tensor.double().square().sum())
    assert facts["error"] == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)


def test_bfloat16_weights_get_scales_in_bfloat16(tmp_path):
    checkpoints.build("llama", **SMALL).bfloat16().save_pretrained(tmp_path / "m")
    compress(tmp_path / "m", tmp_path / "c", weights="int4")
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert {one.dtype for one in stored.values()} == {torch.bfloat16, torch.int32, torch.int64}
    if library.available():
        four = load(tmp_path / "c").model.weights.matrices["layers.0.q"]
        assert four.nbytes == 64 * 64 // 32 * 18  # 4-bit blocks: float16 has every such scale


def test_untied_heads_biases_and_a_second_copy_of_a_tied_head(tmp_path):
    checkpoints.build("qwen3-biased", **SMALL).save_pretrained(tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    save_file(
        {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, tmp_path / "m" / "model.safetensors"
    )
    compress(tmp_path / "m", tmp_path / "tied", embeddings="int8")
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "tied" / "model.safetensors"))
    assert load(tmp_path / "tied").config.tied
    checkpoints.build("llama", **SMALL).save_pretrained(tmp_path / "u")
    compress(tmp_path / "u", tmp_path / "untied", weights="int4", embeddings="int8")
    section = json.loads((tmp_path / "untied" / "config.json").read_text())["quantization_config"]
    assert sorted(section["config_groups"]["group_1"]["targets"]) == ["lm_head", "model.embed_tokens"]
    assert section["config_groups"]["group_1"]["weights"]["num_bits"] == 8
    assert section["ignore"] == []
    assert load(tmp_path / "untied", backbone="torch").model.name == "torch"


# --- out of a GGUF file ---


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm3", "llama-linear-rope"])
def test_a_gguf_file_becomes_a_directory_that_loads_alone(tmp_path, kind):
    model = checkpoints.build(kind, **SMALL)
    gguf_files.write(tmp_path / "m.gguf", model, "Q8_0")
    compress(tmp_path / "m.gguf", tmp_path / "c", weights="int8")
    file, folder = load(tmp_path / "m.gguf", backbone="torch"), load(tmp_path / "c", backbone="torch")
    assert folder.config == file.config
    ids = checkpoints.ids(1, 9)[0]
    row = RowInput(ids, torch.arange(9), logits="all")
    want, got = file.model.run([row]).logits, folder.model.run([row]).logits
    # Q8_0 puts its largest magnitude on 127 too: the blocks are found again, and embeddings only become float16
    assert (got - want).abs().max() < 2e-3 * want.abs().max()
    text = "the thing<|pad|> Ab\u00e9 12"
    for special in (False, True):
        assert folder.tokenizer.encode(text, special=special) == file.tokenizer.encode(text, special=special)
    ids = folder.tokenizer.encode(text)
    assert folder.tokenizer.decode(ids) == file.tokenizer.decode(ids)
    assert folder.tokenizer.special_ids == file.tokenizer.special_ids


def test_a_tokenizer_is_saved_with_its_start_and_template(tmp_path):
    plain = Tokenizer.from_dir(write_model(tmp_path))
    plain.bos_id, plain.add_bos = plain.special_id("<|im_start|>"), True
    (tmp_path / "again").mkdir()
    plain.save(tmp_path / "again")
    again = Tokenizer.from_dir(tmp_path / "again")
    assert again.encode("dog")[0] == plain.bos_id
    messages = [{"role": "user", "content": "fox <|im_end|>"}]
    assert again.chat(messages) == plain.chat(messages)
    plain.special_ids |= {9}
    with pytest.raises(UnsupportedError, match="special_ids"):
        plain.save(tmp_path / "again")


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_gguf_families_that_have_no_written_form_are_refused_by_name(tmp_path, kind):
    gguf_files.write(tmp_path / "m.gguf", checkpoints.build(kind), "F32")
    with pytest.raises(UnsupportedError, match=rf"{kind}.*llama, qwen2.*"):
        compress(tmp_path / "m.gguf", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_gguf_field_without_a_place_is_refused_by_name(tmp_path):
    gguf_files.write(tmp_path / "m.gguf", checkpoints.build("llama3-rope", **SMALL), "F32")
    with pytest.raises(UnsupportedError, match=r"ropes = .*factors.*released directory"):
        compress(tmp_path / "m.gguf", tmp_path / "c")


# --- refusals, and nothing half done ---


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": "int2"}, "weights = 'int2'.*int8, int4, int4-min"),
        ({"group": 48}, "group = 48.*32, 64, 128, channel"),
        ({"group": "128"}, r"group = 128.*32 or 64 or channel.*704 columns"),
        ({"embeddings": "int4"}, "embeddings = 'int4'.*kept or int8"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        compress("mini-ar", tmp_path / "c", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "c").mkdir()
    compress("mini-ar", tmp_path / "c")  # empty: that is where it goes
    before = (tmp_path / "c" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        compress("mini-ar", tmp_path / "c", weights="int4")
    assert (tmp_path / "c" / "config.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is there already"):
        compress("mini-ar", tmp_path / "file")
    with pytest.raises(UnsupportedError, match=r"compressed already.*made from"):
        compress(tmp_path / "c", tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "file"]


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.Rounding, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        compress("mini-ar", tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    shutil.copytree(MINI / "mini-ar", tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    stored["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(stored, tmp_path / "m" / "model.safetensors")
    with pytest.raises(FormatError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: weights are not finite"):
        compress(tmp_path / "m", tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_families_of_transformers_and_experts_are_refused(tmp_path):
    checkpoints.build("olmo2").save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedError, match="olmo2"):
        compress(tmp_path / "m", tmp_path / "c")
    with pytest.raises(FormatError, match="holds no config"):
        compress(tmp_path, tmp_path / "c")


def test_a_single_file_and_progress(tmp_path):
    seen = []
    compress(
        MINI / "mini-ar" / "model.safetensors",
        tmp_path / "c",
        progress=lambda what, done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] == load("mini-ar").config.parameters
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
