"""Damaged model files: cut, grown, with flipped bits or lying lengths. Each loads or is a typed error, in bounded memory."""

from __future__ import annotations

import json
import resource
import struct

import checkpoints
import gguf_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import FormatError, HastenError
from hasten.models.load import load

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
GROWTH_KB = 400_000
ABSURD = [None, -1, 0, 1, 2**31, 2**63, 1e30, float("inf"), "x", "", [], {}, True, [1, 2], {"a": 1}, 2.5, "\u0000"]


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    gguf_files.write(path, checkpoints.build("llama", **SMALL), "Q4_0")
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    checkpoints.build("llama", **SMALL).save_pretrained(path)
    load(path)
    return path


def outcome(path) -> str:
    """ "loaded", or the name of the typed error; anything else fails the test; memory must not run away."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load(path, dtype="float32")
        return "loaded"
    except HastenError as error:
        assert str(error).strip()
        return type(error).__name__
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KB


def damage(raw: bytes, data: st.DataObject) -> bytes:
    """One of: cut anywhere, grow, flip up to 8 bits (mostly in the header), or write a huge number over 8 bytes."""
    kind = data.draw(st.sampled_from(["cut", "grow", "flip", "lie"]))
    head = min(len(raw), 12_000)
    if kind == "cut":
        return raw[: data.draw(st.integers(0, len(raw) - 1))]
    if kind == "grow":
        return raw + data.draw(st.binary(min_size=1, max_size=2000))
    out = bytearray(raw)
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 8))):
            at = data.draw(st.integers(0, data.draw(st.sampled_from([64, 600, head, len(raw)])) - 1))
            out[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        at = data.draw(st.integers(0, head - 8))
        out[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 2**31, 2**40, 2**63, 2**64 - 1])))
    return bytes(out)


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_gguf(gguf_bytes, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(damage(gguf_bytes, data))
    assert outcome(path)


@pytest.mark.parametrize("keep", [0, 3, 4, 8, 23, 24, 60, 1000, -40, -4096])  # the last 8 bytes are padding
def test_a_cut_gguf_is_never_loaded(gguf_bytes, tmp_path, keep):
    (tmp_path / "m.gguf").write_bytes(gguf_bytes[:keep])
    with pytest.raises(FormatError):
        load(tmp_path / "m.gguf")


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_safetensors(folder, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged-hf"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (path / "model.safetensors").unlink(missing_ok=True)
    (path / "model.safetensors").write_bytes(damage((folder / "model.safetensors").read_bytes(), data))
    assert outcome(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_cut_safetensors_are_never_loaded(folder, tmp_path, keep):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(FormatError):
        load(tmp_path)


def test_every_config_field_with_every_absurd_value(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    seen = set()
    for name in config:
        for value in ABSURD:
            (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
            seen.add(outcome(tmp_path))
    assert {"loaded", "FormatError", "ConfigError", "UnsupportedError"} <= seen


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_configs(folder, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged-config"
    path.mkdir(exist_ok=True)
    if not (path / "model.safetensors").exists():
        (path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (path / "config.json").write_bytes(damage((folder / "config.json").read_bytes(), data))
    assert outcome(path)


@settings(max_examples=100)
@given(
    model_type=st.sampled_from(["llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3"]),
    changes=st.dictionaries(
        st.sampled_from(
            [
                "rope_parameters",
                "rope_scaling",
                "layer_types",
                "sliding_window",
                "head_dim",
                "no_rope_layers",
                "text_config",
                "sliding_window_pattern",
                "eos_token_id",
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "rope_theta",
            ]
        ),
        st.recursive(
            st.sampled_from(ABSURD),
            lambda s: st.dictionaries(
                st.sampled_from(["rope_type", "factor", "rope_theta", "full_attention", "low_freq_factor"]), s, max_size=3
            ),
            max_leaves=4,
        ),
        max_size=3,
    ),
)
def test_configs_of_every_family(folder, tmp_path_factory, model_type, changes):
    path = tmp_path_factory.getbasetemp() / "family-config"
    path.mkdir(exist_ok=True)
    if not (path / "model.safetensors").exists():
        (path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": model_type, **changes}))
    assert outcome(path)
