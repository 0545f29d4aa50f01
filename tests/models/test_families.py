"""Every family against transformers itself, through real files: dense pass, and the engine's cached passes."""

from __future__ import annotations

import json

import checkpoints
import pytest
import torch

from hasten.engine.contracts import RowInput
from hasten.errors import FormatError, HastenError, UnsupportedError
from hasten.models.families import config_from_hf
from hasten.models.load import load

TOLERANCE = 1e-4


def cached(model, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits [T, vocab] of one row: a prefill pass, then token by token."""
    row = model.pool(50_000_000).open(len(ids))
    positions = torch.arange(len(ids))
    out = [model.run([RowInput(ids[:prefill], positions[:prefill], row, logits="all")]).logits]
    row.advance(prefill)
    for i in range(prefill, len(ids)):
        out.append(model.run([RowInput(ids[i : i + 1], positions[i : i + 1], row)]).logits)
        row.advance(1)
    return torch.cat(out)


@pytest.mark.parametrize("shard", ["100GB", "60KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("name", checkpoints.VARIANTS)
def test_logits_are_those_of_transformers(name, shard, tmp_path):
    reference = checkpoints.build(name)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "60KB")
    loaded = load(tmp_path, dtype="float32", backbone="torch")
    ids = checkpoints.ids(2, 40)
    with torch.no_grad():
        want = reference(ids).logits
        assert want.std() > 0.1  # a comparison of zeros would prove nothing
        assert (loaded.model(ids) - want).abs().max() <= TOLERANCE
    assert (cached(loaded.model, ids[0], 17) - want[0]).abs().max() <= TOLERANCE
    assert (cached(loaded.model.pack(), ids[1], 1) - want[1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_ragged_rows_of_one_pass_are_those_of_each_alone(name, tmp_path):
    reference = checkpoints.build(name)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, backbone="torch").model.pack()
    rows = [checkpoints.ids(1, n, seed=n)[0] for n in (1, 7, 30)]
    out = model.run([RowInput(ids, torch.arange(len(ids)), logits="all") for ids in rows])
    for i, ids in enumerate(rows):
        with torch.no_grad():
            want = reference(ids[None]).logits[0]
        assert (out.row_logits(i) - want).abs().max() <= TOLERANCE


def test_stored_types_are_kept_or_changed_as_asked(tmp_path):
    reference = checkpoints.build("llama")
    for stored, auto in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)):
        folder = tmp_path / str(stored)
        reference.to(stored).save_pretrained(folder)
        assert load(folder).dtype == auto
        assert load(folder, dtype="bfloat16", backbone="torch").model.embed.weight.dtype == torch.bfloat16


def test_both_spellings_of_rotary_settings_mean_the_same():
    for name in ("llama3-rope", "llama-linear-rope", "llama"):
        new = checkpoints.build(name).config.to_dict()
        old = {k: v for k, v in new.items() if k != "rope_parameters"}
        entry = dict(new["rope_parameters"])
        old["rope_theta"] = entry.pop("rope_theta")
        if entry.get("rope_type") != "default":
            old["rope_scaling"] = {"type" if name == "llama-linear-rope" else "rope_type": entry.pop("rope_type"), **entry}
        assert config_from_hf(old) == config_from_hf(new)


def test_a_multimodal_gemma_config_gives_its_text_part():
    text = checkpoints.build("gemma3").config.to_dict()
    nested = {"model_type": "gemma3", "eos_token_id": [2, 5], "text_config": {**text, "eos_token_id": None}}
    assert config_from_hf({**nested, "text_config": text}).layers == config_from_hf(text).layers
    assert config_from_hf(nested).family == "gemma3_text"


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_named(change, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoints.build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = "model.layers.1.mlp.down_proj.weight"
    if change == "missing":
        del state[key]
    elif change == "extra":
        key = "model.layers.1.mlp.other.weight"
        state[key] = torch.zeros(2)
    else:
        state[key] = torch.zeros(64, 95)
    save_file(state, file)
    short = "layers.1.down" if change == "shape" else key.removeprefix("model.")
    with pytest.raises(FormatError, match=short):
        load(tmp_path)


def test_an_unknown_activation_and_rope_are_refused_by_name():
    config = checkpoints.build("llama").config.to_dict()
    with pytest.raises(UnsupportedError, match="relu2"):
        config_from_hf({**config, "hidden_act": "relu2"})
    with pytest.raises(UnsupportedError, match="longrope"):
        config_from_hf({**config, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}})


def test_every_required_field_is_named_when_missing_or_absurd():
    config = checkpoints.build("llama").config.to_dict()
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")
    for name in needed:
        for value in (None, -1, 0, "x", [], True, 2.5, float("nan"), 1e30):
            with pytest.raises(HastenError) as caught:
                config_from_hf(json.loads(json.dumps({**config, name: value})))
            assert caught.value.field
