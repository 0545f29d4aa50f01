"""Compressed checkpoints: a second implementation's values, the same on both stacks; what is not read is refused by name."""

from __future__ import annotations

import copy
import json
import re
from contextlib import suppress

import checkpoints
import compressed_files
import diffusion
import numpy as np
import pytest
import torch
from compressed_files import matrix, scheme, section
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hasten.engine.contracts import RowInput
from hasten.engine.masks import FULL, BlockCausal
from hasten.errors import FormatError, HastenError, MemoryFitError, UnsupportedError
from hasten.kernels import library
from hasten.kernels.weights import pack
from hasten.models import load as loading
from hasten.models import packing
from hasten.models.compressed import CompressedCheckpoint
from hasten.models.load import load
from hasten.models.scheme import quantisation

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
native = pytest.mark.skipif(not library.available(), reason="the native library was not built")


def opened(folder, quantized):
    return CompressedCheckpoint([folder / "model.safetensors"], quantisation({"quantization_config": quantized}))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 4),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 8, 32, 64]),
    scales=st.sampled_from(["f16", "bf16", "f32", "short"]),
    form=st.sampled_from(["pack-quantized", "int-quantized", "naive-quantized"]),
    seed=st.integers(0, 99),
)
def test_values_are_those_of_a_second_implementation(
    tmp_path_factory, rows, blocks, bits, symmetric, group, scales, form, seed
):
    folder, cols = tmp_path_factory.mktemp("c"), 64 * blocks
    bits = 8 if form != "pack-quantized" else bits
    how = scheme(bits, symmetric, group)
    stored, want = matrix("model.x", (rows, cols), how, seed, scales, form)
    save_file(stored, folder / "model.safetensors")
    found = opened(folder, section(how, form=form))
    assert found.names == ["model.x.weight"]
    assert np.array_equal(found.read("model.x.weight").numpy(), want)
    packed = found.matrix("model.x.weight")
    order = np.random.default_rng(seed).permutation(rows)[: rows // 2 + 1]
    assert np.array_equal(packed.take(order).decode(), want[order])
    blocked = packed.blocks()
    if group == 8 or (bits == 8 and not symmetric):
        assert blocked is None
    elif scales != "f32":
        assert blocked is not None
    if blocked is not None:
        source = blocked[0]
        assert (source == library.Q4_0) == (bits == 4 and symmetric)
        if bits == 4 and scales == "short":
            assert source != library.Q8_0
        if library.available():
            assert np.array_equal(pack(*blocked, rows, cols).unpack(range(rows)), want)


@pytest.mark.parametrize("cols", [3, 20, 33, 50])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_any_number_of_columns_is_read(tmp_path, cols, bits, symmetric):
    how = scheme(bits, symmetric, None)
    stored, want = matrix("x", (5, cols), how)
    save_file(stored, tmp_path / "model.safetensors")
    found = opened(tmp_path, section(how))
    assert np.array_equal(found.read("x.weight").numpy(), want)
    assert found.matrix("x.weight").blocks() is None


@pytest.mark.parametrize(
    ("scale", "exact"),
    [(1 / 3, False), (2.0**-24, True), (2.0**-25, False), (1e6, False), (0.0, True), (-0.25, True), (65504.0, True)],
)
def test_a_scale_that_float16_has_not_makes_no_blocks(tmp_path, scale, exact):
    how = scheme(4, True, 32)
    stored, _ = matrix("x", (2, 32), how, scales="f32")
    stored["x.weight_scale"][1] = scale
    stored["x.weight_scale"][0] = 1
    save_file(stored, tmp_path / "model.safetensors")
    assert (opened(tmp_path, section(how)).matrix("x.weight").blocks() is not None) == exact


def test_one_scale_for_a_whole_matrix(tmp_path):
    how = scheme(8, True, None)
    how["weights"]["strategy"] = "tensor"
    stored, _ = matrix("x", (3, 32), how, form="int-quantized")
    stored["x.weight_scale"] = torch.tensor([0.5], dtype=torch.float16)
    save_file(stored, tmp_path / "model.safetensors")
    found = opened(tmp_path, section(how, form="int-quantized"))
    assert torch.equal(found.read("x.weight"), 0.5 * stored["x.weight"].float())


# --- whole models ---

WHOLE = {
    "llama-int4": ("llama", scheme(4, True, 32), "f16", []),
    "llama-int8": ("llama", scheme(8, True, None), "bf16", []),
    "llama-min": ("llama", scheme(4, False, 32), "short", ["lm_head"]),
    "qwen2-biased-tied": ("qwen2", scheme(4, False, 32), "f16", ["model.embed_tokens"]),
    "qwen3-float32-scales": ("qwen3-biased", scheme(8, True, 32), "f32", []),
    "gemma2-asymmetric-8": ("gemma2", scheme(8, False, 32), "f16", []),
}


def written(folder, name):
    """The model's folder and the transformers model of the same values."""
    kind, how, scales, more = WHOLE[name]
    changes = {"intermediate_size": 128} if kind == "gemma2" else {}
    model = checkpoints.build(kind, **{**SMALL, **changes})
    quantized = section({**how, "targets": ["Linear", *more]}, ignore=[] if "lm_head" in more else ["lm_head"])
    compressed_files.write(folder, model, how, quantized, scales=scales)
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_both_stacks_compute_with_the_stored_values(tmp_path, name):
    model, ids = written(tmp_path, name), checkpoints.ids(1, 9)[0]
    row = RowInput(ids, torch.arange(9), logits="all")
    torch_stack = load(tmp_path, backbone="torch").model
    with torch.no_grad():
        want = model(ids[None]).logits[0]
    assert torch.allclose(torch_stack.run([row]).logits, want, atol=2e-4, rtol=1e-4)
    if not library.available():
        return
    loaded = load(tmp_path)
    assert loaded.model.name == "native"
    mine = dict(torch_stack.named_parameters())
    for own, packed in loaded.model.weights.matrices.items():
        prefix, _, part = own.rpartition(".")
        fused = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(part, part)
        if own == "head" and model.config.tie_word_embeddings:
            continue
        whole = mine[f"{prefix}.{fused}.weight".lstrip(".")].detach()
        c = torch_stack.config
        at = {"k": c.heads * c.head_dim, "v": (c.heads + c.kv_heads) * c.head_dim, "up": c.ffn}.get(part, 0)
        assert np.array_equal(packed.unpack(range(packed.rows)), whole[at : at + packed.rows].numpy()), own
    assert torch.equal(loaded.model.run([row]).logits.argmax(-1), want.argmax(-1))
    for values, tensor in loaded.model.weights.vectors.items():
        assert np.array_equal(tensor, mine[values].detach().numpy()), values


KEPT = re.compile(r"embed|wte|lm_head|transformer\.ff_out|mlp\.gate$")


@pytest.mark.parametrize("name", diffusion.VARIANTS)
def test_every_diffusion_family_is_read_by_its_own_names(tmp_path, name):
    """Fused and split projections, experts, padded and grouped layers: against the plain oracle on the stored values."""
    config, how = diffusion.VARIANTS[name], scheme(8, True, None)
    plain, stored = diffusion.state(config), {}
    for i, (own, tensor) in enumerate(plain.items()):
        module = own.removesuffix(".weight")
        if tensor.ndim != 2 or KEPT.search(module):
            stored[own] = tensor
            continue
        tensors, values = matrix(module, tuple(tensor.shape), how, i, down=6)
        stored |= tensors
        plain[own] = torch.from_numpy(values)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": section(how)}))
    ids = torch.arange(3, 11)
    size = diffusion.block_of(config)
    want = diffusion.plain(config, plain, ids, None if size is None else diffusion.blocks(8, size))
    visibility = FULL if size is None else BlockCausal(size)
    for backbone in ("torch",) if name in diffusion.ON_TORCH else ("torch", "auto"):
        model = load(tmp_path, backbone=backbone).model
        got = model.run([RowInput(ids, torch.arange(8), visibility=visibility, logits="all")]).logits
        assert torch.allclose(got, want, atol=1e-3 * float(want.abs().max()))


@native
def test_blocks_stay_blocks_and_the_rest_is_float32(tmp_path):
    layouts = {}
    for name in WHOLE:
        written(tmp_path / name, name)
        matrices = load(tmp_path / name).model.weights.matrices
        layouts[name] = {one.layout for own, one in matrices.items() if own.startswith("layers")}
    of = {kind: pack(source, np.zeros(size, np.uint8), 1, 32).layout for kind, source, size in (
        ("Q4_0", library.Q4_0, 18), ("Q4_1", library.Q4_1, 20), ("Q8_0", library.Q8_0, 34), ("F32", library.F32, 128),
    )}  # fmt: skip
    assert layouts["llama-int4"] == {of["Q4_0"]}
    assert layouts["llama-min"] == {of["Q4_1"]}
    assert layouts["llama-int8"] == {of["Q8_0"]}
    assert layouts["qwen2-biased-tied"] == {of["Q8_0"]}  # zero points times these scales are no float16
    assert layouts["qwen3-float32-scales"] == layouts["gemma2-asymmetric-8"] == {of["F32"]}


@native
def test_bfloat16_that_is_kept_stays_and_asking_for_a_type_gives_it(tmp_path):
    model = checkpoints.build("llama", **SMALL)
    compressed_files.write(tmp_path, model, WHOLE["llama-int4"][1], section(scheme(4, True, 32)))
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"].bfloat16()
    save_file(stored, tmp_path / "model.safetensors")
    embed = {kind: load(tmp_path, dtype=kind).model.weights.matrices["embed"] for kind in ("auto", "float32", "bfloat16")}
    want = stored["model.embed_tokens.weight"].float().numpy()
    assert all(np.array_equal(one.unpack(range(300)), want) for one in embed.values())
    assert embed["auto"].nbytes == embed["bfloat16"].nbytes < embed["float32"].nbytes
    rounded = load(tmp_path, weights="int4").model.weights.matrices
    assert rounded["embed"].nbytes < embed["auto"].nbytes
    assert load(tmp_path, dtype="bfloat16", backbone="torch").dtype == torch.bfloat16


@native
def test_the_packed_copy_belongs_to_weights_and_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packing, "WORTH", 0)
    folder = tmp_path / "m"
    written(folder, "llama-min")
    row = RowInput(torch.tensor([3, 4, 5]), torch.arange(3), logits="all")
    first = load(folder).model.run([row]).logits.clone()
    monkeypatch.setattr(loading, "from_compressed", lambda *args: pytest.fail("packed again"))
    assert torch.equal(load(folder).model.run([row]).logits, first)
    monkeypatch.undo()
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packing, "WORTH", 0)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True  # same files, read otherwise
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="says symmetric"):
        load(folder)


def test_the_memory_check_goes_by_the_compressed_size(tmp_path, monkeypatch):
    written(tmp_path, "llama-int4")
    parameters = load(tmp_path, backbone="torch").config.parameters
    monkeypatch.setattr(loading, "available_bytes", lambda: 4 * parameters)
    if library.available():
        assert load(tmp_path).bytes < 4 * parameters
    with pytest.raises(MemoryFitError):
        load(tmp_path, backbone="torch")
    assert load(tmp_path, backbone="torch", force=True).bytes == 4 * parameters


# --- what is refused ---


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", None, 3])
def test_other_methods_are_refused_by_name_with_a_way_out(tmp_path, method):
    written(tmp_path, "llama-int4")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=rf"quant_method = {method!r}.*hasten compress"):
        load(tmp_path)


def test_an_adapted_family_is_refused(tmp_path):
    written(tmp_path, "llama-int4")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    with pytest.raises(UnsupportedError, match=r"'olmo2'.*plain weights"):
        load(tmp_path)


ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("where", "value", "error", "match"),
    [
        ("format", "marlin-24", UnsupportedError, r"format = 'marlin-24'.*pack-quantized"),
        ("format", "float-quantized", UnsupportedError, "float-quantized"),
        ("format", None, UnsupportedError, "format = None"),
        ("format", "int-quantized", UnsupportedError, "num_bits = 4 of format 'int-quantized'"),
        ("kv_cache_scheme", {"num_bits": 8}, UnsupportedError, r"kv_cache_scheme.*cache='int8'"),
        ("transform_config", {"config_groups": {"a": 1}}, UnsupportedError, "transform_config"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, UnsupportedError, "sparse-24-bitmask"),
        ("quantization_status", "frozen", UnsupportedError, "quantization_status = 'frozen'"),
        ("config_groups", {}, FormatError, "config_groups"),
        ("config_groups", {"W4A16": ["Linear"]}, UnsupportedError, "preset"),
        ("group.input_activations", ACTIVATIONS, UnsupportedError, r"group_0\.input_activations.*W4A16"),
        ("group.output_activations", ACTIVATIONS, UnsupportedError, "output_activations"),
        ("group.targets", "Linear", FormatError, "targets"),
        ("group.targets", ["Embedding"], FormatError, "no targets"),
        ("group.targets", ["re:(.*)*x"], UnsupportedError, "pattern"),
        ("group.targets", ["re:" + ".*" * 4], UnsupportedError, "3 repeats"),
        ("group.targets", ["re:("], FormatError, "no pattern"),
        ("group.targets", [f"re:{i}" for i in range(65)], UnsupportedError, "65 patterns"),
        ("ignore", ["re:.*mlp.*"], FormatError, "ignores it"),
        ("ignore", [3], FormatError, "ignore"),
        ("weights.num_bits", 2, UnsupportedError, "num_bits = 2"),
        ("weights.num_bits", True, UnsupportedError, "num_bits = True"),
        ("weights.type", "float", UnsupportedError, "type = 'float'"),
        ("weights.dynamic", True, UnsupportedError, "dynamic"),
        ("weights.actorder", "group", UnsupportedError, r"actorder = 'group'.*actorder='weight'"),
        ("weights.strategy", "block", UnsupportedError, "strategy = 'block'"),
        ("weights.strategy", "channel", FormatError, "does not go with strategy"),
        ("weights.group_size", 0, FormatError, "group_size"),
        ("weights.group_size", 40, FormatError, "no multiple of group_size 40"),
        ("weights.group_size", 16, FormatError, "weight_scale"),
        ("weights.symmetric", "yes", FormatError, "symmetric"),
        ("weights.symmetric", False, FormatError, "weight_zero_point is missing"),
    ],
)
def test_a_config_that_is_not_read_is_refused_by_field_and_value(tmp_path, where, value, error, match):
    written(tmp_path, "llama-int4")
    config = json.loads((tmp_path / "config.json").read_text())
    place, _, name = where.rpartition(".")
    group = config["quantization_config"]["config_groups"]["group_0"]
    {"": config["quantization_config"], "group": group, "weights": group["weights"]}[place][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=match):
        load(tmp_path)


def test_patterns_and_names_go_before_classes():
    groups = [{**scheme(bits, True, 32), "targets": [target]} for bits, target in (
        (8, "Linear"), (4, "re:.*mlp.*"), (8, "model.layers.0.mlp.up_proj"), (4, "Embedding"),
    )]  # fmt: skip
    how = quantisation({"quantization_config": section(*groups)})
    picked = {name: how.schemes.index(how.scheme_of(name)) for name in (
        "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj",
        "model.embed_tokens",
    )}  # fmt: skip
    assert list(picked.values()) == [2, 1, 0, 3]
    assert quantisation({}) is None


PROJ = "model.layers.1.mlp.up_proj"


def _put(name, make):
    return lambda stored: stored.update({f"{PROJ}.{name}": make(stored)})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda s: s.pop(f"{PROJ}.weight_scale"), FormatError, "weight_scale is missing"),
        (lambda s: s.pop(f"{PROJ}.weight_shape"), FormatError, "weight_shape is missing"),
        (lambda s: s.pop(f"{PROJ}.weight_packed"), FormatError, "belongs to no compressed weight"),
        (_put("weight", lambda s: torch.zeros(96, 64)), FormatError, "stored twice"),
        (_put("weight_scale", lambda s: torch.ones(96, 3)), FormatError, r"not F16 or BF16 or F32 of shape \(96, 2\)"),
        (_put("weight_scale", lambda s: torch.full((96, 2), torch.nan)), FormatError, "not finite"),
        (_put("weight_shape", lambda s: torch.tensor([96, 72])), FormatError, "does not hold a matrix"),
        (_put("weight_shape", lambda s: torch.tensor([-96, -1])), FormatError, "does not hold a matrix"),
        (_put("weight_shape", lambda s: torch.tensor([96, 60])), FormatError, "no multiple of group_size"),
        (_put("weight_packed", lambda s: torch.zeros(96, 8).int()[0]), FormatError, "not rows and columns"),
        (_put("weight_packed", lambda s: torch.zeros(96, 8)), FormatError, "does not hold a matrix"),
        (_put("weight_packed", lambda s: torch.zeros(40, 8).int()), FormatError, "does not hold a matrix"),
        (_put("weight_zero_point", lambda s: torch.ones(12, 2).int()), FormatError, "says symmetric"),
        (_put("weight_g_idx", lambda s: torch.arange(64).flip(0).int() // 32), UnsupportedError, "actorder='weight'"),
        (_put("input_scale", lambda s: torch.ones(1)), FormatError, "without a place"),
        (_put("bias", lambda s: torch.ones(96).int()), UnsupportedError, "type I32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, error, match):
    written(tmp_path, "llama-int4")
    stored = load_file(tmp_path / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "model.safetensors")
    for backbone in ("auto", "torch"):
        with pytest.raises(error, match=match):
            load(tmp_path, backbone=backbone)


@pytest.mark.parametrize("order", [torch.arange(64).int() // 32, torch.full((64,), -1, dtype=torch.int32)])
def test_the_plain_order_of_columns_may_be_stored(tmp_path, order):
    written(tmp_path, "llama-int4")
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, f"{PROJ}.weight_g_idx": order}, tmp_path / "model.safetensors")
    assert load(tmp_path, backbone="torch").model.name == "torch"


def test_integers_without_a_quantization_config_are_refused_with_a_way_out(tmp_path):
    written(tmp_path, "llama-int4")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quantization_config of compressed-tensors"):
        load(tmp_path)


# --- damage ---

ABSURD = [None, -1, 0, 4, 8, 2**31, 1e30, "x", "", "group", [], {}, True, [1, 2], {"a": 1}, ["re:.*"], 2.5, "\u0000"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    written(folder, "qwen2-biased-tied")
    return folder


def outcome(folder):
    """ "loaded", or the name of the typed error; numbers come out of what loads."""
    try:
        row = RowInput(torch.tensor([3, 4]), torch.arange(2), logits="all")
        assert load(folder).model.run([row]).logits.shape == (2, 300)
    except HastenError as error:
        assert str(error).strip()
        return type(error).__name__
    return "loaded"


def test_every_field_with_every_absurd_value(sound, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((sound / "model.safetensors").read_bytes())
    config = json.loads((sound / "config.json").read_text())
    seen = set()
    for name in ("quantization_config", "quant_method", "format", "ignore", "config_groups", "group_0", "weights", "targets",
                 "num_bits", "group_size", "strategy", "symmetric", "type", "actorder"):  # fmt: skip
        for value in ABSURD:
            broken = copy.deepcopy(config)
            _replace(broken, name, value)
            (tmp_path / "config.json").write_text(json.dumps(broken))
            seen.add(outcome(tmp_path))
    assert seen == {"loaded", "FormatError", "UnsupportedError"}


def _replace(tree, name, value):
    for key in list(tree):
        if key == name:
            tree[key] = value
        elif isinstance(tree[key], dict):
            _replace(tree[key], name, value)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_tensors(sound, tmp_path_factory, data):
    """Bytes changed in the header or in the weights, dtypes and shapes swapped: loaded or a typed error."""
    folder = tmp_path_factory.getbasetemp() / "damaged-compressed"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((sound / "config.json").read_bytes())
    raw = (sound / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        entry = header[data.draw(st.sampled_from(names))]
        other = header[data.draw(st.sampled_from(names))]
        part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name"]))
        if part == "name":
            header[data.draw(st.sampled_from(names))] = other
        else:
            entry[part] = other[part]
    body = bytearray(raw[8 + length :])
    body[data.draw(st.integers(0, len(body) - 1))] ^= 255
    text = json.dumps(header).encode()
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))
    assert outcome(folder)


def test_a_single_number_in_place_of_a_matrix_is_a_typed_error(sound, tmp_path):
    stored = load_file(sound / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    for part in ("packed", "scale", "shape", "zero_point"):
        with suppress(KeyError):
            del stored[f"{name}.weight_{part}"]
    save_file({**stored, f"{name}.weight": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sound / "config.json").read_bytes())
    for backbone in ("auto", "torch"):
        with pytest.raises(FormatError):
            load(tmp_path, backbone=backbone)
