"""FSPAD: exact with any layer, shapes by the formula, the two losses apart, and EAGLE's layer as its special case."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from feature_layers import context, layer, saved

from hasten.draft.fspad import Config, Fspad
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError, FormatError
from hasten.models.feature import load_feature_model
from hasten.train.features import Config as TrainConfig
from hasten.train.features import loss
from hasten.types import Request, SamplingParams


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 4])
def test_text_is_that_of_plain_decoding(tmp_path, sampling, batch):
    engine = tiny.engine(rows=batch)
    fspad = Fspad(Config(str(saved(tmp_path, "fspad", engine.backbone)), floor=0.0), context(engine))
    asked = [
        Request(tuple(range(i + 1, 3 * i + 5)), SamplingParams(max_tokens=20, seed=i, ignore_eos=True, **sampling))
        for i in range(8)
    ]
    plain = [outs[0].tokens for outs in engine.run([(one, PLAIN) for one in asked])]
    for measured in (False, True):
        parts = Parts(fspad, budget=12, measured=measured)
        assert [outs[0].tokens for outs in engine.run([(one, parts) for one in asked])] == plain


def test_trained_parameters_follow_the_formula():
    target = tiny.model()
    c, ffn = target.config, 40
    d, kv = c.hidden, c.kv_heads * c.head_dim
    attention = d * (c.heads * c.head_dim + 2 * kv) + c.heads * c.head_dim * d
    eagle = 2 * d * d + d + attention + d + 3 * d * ffn
    assert sum(p.numel() for _, p in layer("eagle", target, ffn=ffn).trained()) == eagle
    assert sum(p.numel() for _, p in layer("fspad", target, ffn=ffn).trained()) == eagle + 3 * d * ffn + d + ffn * d
    out = layer("fspad", target, ffn=ffn).dense(torch.randn(2, 5, d), torch.randn(2, 5, d))
    assert out.shape == (2, 5, 2 * d)


def test_without_its_sampler_and_with_tied_halves_it_is_eagles_layer():
    target = tiny.model()
    eagle, fspad = layer("eagle", target, seed=4), layer("fspad", target, seed=9)
    state = dict(eagle.trained())
    for name, p in fspad.trained():
        if name == "layers.0.down.weight":
            p.data = torch.cat((state[name].data, state[name].data))
        elif name in state:
            p.data = state[name].data.clone()
    fspad.mix.weight.data.zero_()
    features, embeds = torch.randn(2, 7, target.config.hidden), torch.randn(2, 7, target.config.hidden)
    want, both = eagle.dense(features, embeds), fspad.dense(features, embeds)
    assert torch.allclose(fspad.norm(both), want, atol=1e-5)
    assert torch.allclose(fspad.fed_back(both), want, atol=1e-5)


def test_each_loss_touches_its_own_half_only():
    target = tiny.model()
    model = layer("fspad", target, seed=2).requires_grad_(True)
    d = target.config.hidden
    features, embeds = torch.randn(1, 6, d), torch.randn(1, 6, d)
    down = model.layers[0].down.weight
    model.fed_back(model.dense(features, embeds)).square().sum().backward()
    assert (down.grad[:d] == 0).all()
    assert (down.grad[d:] != 0).any()
    model.zero_grad()
    F.linear(model.norm(model.dense(features, embeds)), model.head.weight).square().sum().backward()
    assert (down.grad[d:] == 0).all()
    assert (down.grad[:d] != 0).any()


def test_embeddings_and_output_rows_get_no_gradient():
    target = tiny.model()
    model = layer("fspad", target).requires_grad_(True)
    model.head.requires_grad_(False)
    ids = torch.randint(0, tiny.VOCAB, (2, 9))
    value, agreement = loss(model, target, ids, torch.randn(2, 9, 48), torch.ones(2, 9), TrainConfig(unroll=2), None)
    value.backward()
    assert len(agreement) == 2
    assert model.head.weight.grad is None
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for _, p in model.trained())


def test_an_eagle_file_and_missing_tensors_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    engine = tiny.engine()
    path = saved(tmp_path, "fspad", engine.backbone)
    with safe_open(path, "pt") as file:
        facts, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    eagle = saved(tmp_path, "eagle", engine.backbone)
    with safe_open(eagle, "pt") as file:
        other = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(other, path, facts)
    with pytest.raises(FormatError, match=r"missing .*gate"):
        load_feature_model(path, "fspad", engine.backbone)
    state.pop("join.weight")
    save_file({**state, "extra": torch.zeros(1)}, path, facts)
    with pytest.raises(FormatError, match=r"missing join\.weight; unexpected extra"):
        load_feature_model(path, "fspad", engine.backbone)
    with pytest.raises(ConfigError, match=r"fspad\.depth.*0"):
        Config(depth=0)
