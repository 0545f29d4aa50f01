"""The network that is trained: what it sees, that padding changes nothing, and that its exports are what models/ loads."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hasten.errors import ConfigError, FormatError
from hasten.models.families import FAMILIES, config_from_hf, state_from_hf
from hasten.models.load import load
from hasten.models.tokenizer import Tokenizer
from hasten.models.transformer import Transformer
from hasten.train import alphabet, network
from hasten.train.network import KINDS, Network, Shape, attend, block_causal
from hasten.train.released import ANSWER, config_of, export, model_type, read, released

TINY = Shape(hidden=32, layers=2, heads=2, ffn=48)


LAYOUTS = (*KINDS, "shift", "shifted block")  # the last two: every state foretells the next place


def tiny(layout: str, seed: int = 0) -> Network:
    """A network whose weights are large enough to matter."""
    kind = {"shift": "full", "shifted block": "block"}.get(layout, layout)
    net = Network(replace(TINY, kind=kind, shift=kind != layout), seed)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return net


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, alphabet.SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("train", [False, True])
def test_padding_and_other_rows_change_nothing(kind, train):
    net, row = tiny(kind), ids(1, 19)
    with torch.set_grad_enabled(train):
        alone = net(row)
        batch = torch.full((3, 27), alphabet.PAD)
        batch[0], batch[1, :19], batch[2, :11] = ids(1, 27, 1), row[0], ids(1, 11, 2)
        known = torch.arange(27)[None] < torch.tensor([[27], [19], [11]])
        together = net(batch, known)
        dirty = net(batch.masked_fill(~known, 60), known)
    assert torch.allclose(together[1, :19], alone[0], atol=1e-5)
    assert torch.allclose(dirty[1, :19], alone[0], atol=1e-5)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_sees_what_its_kind_allows(kind):
    net, row = tiny(kind), ids(1, 24)
    with torch.no_grad():
        before = net(row)
        changed = row.clone()
        changed[0, 17] = (row[0, 17] - 4 + 1) % (alphabet.SIZE - 4) + 4
        moved = (net(changed) - before).abs().amax(-1)[0] > 1e-6
    first = {"full": 0, "causal": 17, "block": 16}[kind]
    assert moved.tolist() == [place >= first for place in range(24)]


def test_a_mask_overrides_the_kind():
    row = ids(1, 12)
    full, causal = tiny("full"), tiny("causal")
    causal.load_state_dict(full.state_dict())
    triangle = torch.ones(12, 12, dtype=torch.bool).tril()
    with torch.no_grad():
        assert torch.allclose(full(row, mask=triangle), causal(row), atol=1e-5)
        assert torch.allclose(full(row, mask=block_causal(12, 12)), full(row), atol=1e-5)


def test_both_ways_of_attention_agree(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 20, 20, generator=generator) < 0.6
    mask[..., 0] = True
    for given, causal in ((None, False), (None, True), (mask, False), (mask[:, :, :1], False)):
        short = attend(q, k, v, given, causal)
        monkeypatch.setattr(network, "LONG", 1)
        assert torch.allclose(attend(q, k, v, given, causal), short, atol=1e-6)
        monkeypatch.undo()


def test_hand_written_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 2, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, generator=generator, requires_grad=True)

    def scaled(a, b):
        return network._Scaled.apply(a, b, 1e-5)

    assert torch.allclose(scaled(x, weight), F.rms_norm(x, (8,), weight, 1e-5))
    assert torch.autograd.gradcheck(scaled, (x, weight))
    cos, sin = (torch.randn(5, 1, 8, generator=generator) for _ in range(2))
    cos, sin = (torch.cat((one[..., :4], sign * one[..., :4]), -1) for one, sign in ((cos, 1), (sin, -1)))
    y = torch.randn(3, 5, 2, 8, generator=generator, requires_grad=True)
    plain = y * cos + y.roll(4, -1) * sin
    ours = network._Turned.apply(y, cos, sin)
    grad = torch.randn(y.shape, generator=generator)
    assert torch.allclose(ours, plain, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(ours, y, grad)[0], torch.autograd.grad(plain, y, grad)[0], atol=1e-6)
    z = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    index, back = torch.tensor([2, 4, 0]), torch.tensor([2, 3, 0, 3])
    assert torch.autograd.gradcheck(lambda a: network._Moved.apply(a, index, back), (z,))


def test_the_mask_is_never_written_by_a_diffusion_network():
    for kind in KINDS:
        with torch.no_grad():
            scores = tiny(kind).logits(tiny(kind)(ids(1, 9)))
        assert (scores[..., alphabet.MASK] == float("-inf")).all() == (kind != "causal")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_exports_are_read_back_and_small(kind, tmp_path):
    net = tiny(kind)
    export(net, tmp_path, {"name": "x"})
    back = read(tmp_path)
    assert back.shape == net.shape
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, net.state_dict()[name].half().float())
    assert {one.dtype for one in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "card.json").read_text())["name"] == "x"
    assert load(tmp_path).model.capabilities.canvas == (ANSWER if net.shape.kind == "full" else None)
    assert (
        sum(p.numel() for p in Network(replace(net.shape, hidden=256, layers=4, heads=4, ffn=704)).parameters()) * 2 < 12e6
    )


def test_llada_names_are_those_of_the_release():
    layer = "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out"
    expected = {f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in layer.split()}
    expected |= {"model.transformer.wte.weight", "model.transformer.ln_f.weight"}
    assert set(released(tiny("full"))) == expected
    config = config_of(TINY)
    assert (config["model_type"], config["d_model"], config["mlp_hidden_size"]) == ("llada", 32, 48)
    assert (config["weight_tying"], config["mask_token_id"], config["n_kv_heads"]) == (True, alphabet.MASK, 2)


def test_a_shifted_network_is_the_other_one_whose_states_moved_on():
    plain, moved = tiny("full"), tiny("shift")
    assert not any(
        "_norm" in name.replace("attn_norm", "").replace("ffn_norm", "") for name in tiny("shifted block").state_dict()
    )
    with torch.no_grad():
        before, after = plain(ids(2, 17)), moved(ids(2, 17))
    assert torch.equal(after[:, 1:], before[:, :-1])
    assert torch.equal(after[:, 0], before[:, 0]), "nothing stands before the first place"


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_decoder_stack_computes_the_same(kind, tmp_path):
    net = tiny(kind)
    assert model_type(net.shape) in FAMILIES
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(weight.half().float())
    export(net, tmp_path, {})
    config = config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    stored = load_file(tmp_path / "model.safetensors")
    stack = Transformer.from_state(
        config, ((n, w.float()) for n, w in state_from_hf(config, list(stored), stored.__getitem__)), torch.float32
    )
    from hasten.engine.masks import CAUSAL, FULL, BlockCausal

    visibility = {"full": FULL, "causal": CAUSAL, "block": BlockCausal(net.shape.block)}[net.shape.kind]
    row = ids(1, 21)
    with torch.no_grad():
        theirs = stack(row, visibility=visibility)
        ours = net.logits(net(row))
    assert config.logit_shift == net.shape.shift
    if net.shape.shift:
        theirs, ours = theirs[:, :-1], ours[:, 1:]
    plain = [i for i in range(alphabet.SIZE) if i != alphabet.MASK]
    assert torch.allclose(theirs[..., plain], ours[..., plain], atol=2e-5)


def test_dream_names_are_those_of_the_release():
    names = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    parts = [*names.split(), "input_layernorm", "post_attention_layernorm"]
    expected = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts}
    expected |= {f"model.layers.{i}.self_attn.{part}_proj.bias" for i in range(2) for part in "qkv"}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert set(released(tiny("shift"))) == expected
    config = config_of(tiny("shift").shape)
    assert (config["model_type"], config["mask_token_id"], config["tie_word_embeddings"]) == ("Dream", alphabet.MASK, True)


def test_fast_dllm_names_are_those_of_the_release_and_of_dream():
    assert set(released(tiny("shifted block"))) == set(released(tiny("shift"))), "the weights fit one to one"
    config = config_of(replace(tiny("shifted block").shape, block=4))
    assert (config["model_type"], config["bd_size"], config["mask_token_id"]) == ("Fast_dLLM_Qwen", 4, alphabet.MASK)
    ours = config_from_hf(config)
    assert (ours.block, ours.logit_shift, ours.qkv_bias, ours.qk_norm) == (4, 1, True, False)


def test_another_model_is_not_read(tmp_path):
    with pytest.raises(FormatError, match="small model"):
        read(tmp_path)
    export(tiny("full"), tmp_path, {})
    state = load_file(tmp_path / "model.safetensors")
    state.pop("model.transformer.ln_f.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="ln_f"):
        read(tmp_path)


def test_the_tokenizer_reads_and_writes_every_character(tmp_path):
    alphabet.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    rng = Random(0)
    plain = [chr(code) for code in range(32, 127)] + ["\n"]
    for _ in range(50):
        text = "".join(rng.choices(plain, k=rng.randint(1, 40)))
        assert tokenizer.encode(text) == [alphabet.BOS, *alphabet.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<mask><eos>") == [alphabet.BOS, *alphabet.encode("<mask><eos>")]
    assert tokenizer.encode("<mask>", special=True) == [alphabet.BOS, alphabet.MASK]
    assert tokenizer.encode("a\u00e9b", bos=False) == alphabet.encode("a?b")
    assert tokenizer.chat([{"role": "user", "content": "sort: b a<eos>"}]) == tokenizer.encode("sort: b a<eos>\n")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (100, 2, (3,), 0)


@pytest.mark.parametrize(
    ("field", "bad"), [("kind", "x"), ("hidden", 0), ("heads", 3), ("layers", 0), ("block", 0), ("shift", True)]
)
def test_a_bad_shape_is_refused(field, bad):
    with pytest.raises(ConfigError, match=field):
        Shape(**{"kind": "causal", field: bad})
