"""The small language model: one law by dense passes and by caches, nothing outside its vocabulary, and files that fit."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hasten.engine.contracts import RowInput
from hasten.errors import ConfigError, FormatError
from hasten.models.feature import identity
from hasten.models.small import Shape, SmallLM, load_small
from hasten.train.align import Teacher

KEPT = torch.arange(3, 71)
SHAPE = Shape(hidden=32, layers=2, ffn=40, window=9)


def small(target, seed: int = 0, shape: Shape = SHAPE, kept: torch.Tensor = KEPT) -> SmallLM:
    model = SmallLM(target, kept, shape).reset(seed)
    generator = torch.Generator().manual_seed(seed)
    model.bias.data = torch.randn(model.bias.shape, generator=generator) * 0.3
    model.back.data *= 6  # logits that tell tokens apart
    return model


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_dense_passes_and_cached_ones_agree_and_nothing_else_is_drafted(name):
    target = tiny.model(tiny.CONFIGS[name])
    model = small(target)
    ids = torch.randint(0, tiny.VOCAB, (1, 21), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense = model.draft_logits(model.dense(ids))[0]
    model.requires_grad_(False).pack()
    cache = model.pool(1_000_000).open(64)
    first = model.run([RowInput(ids[0, :15], torch.arange(15), cache, logits="all")])
    cache.advance(15)
    second = model.run([RowInput(ids[0, 15:], torch.arange(15, 21), cache, logits="all")])
    whole = torch.cat((first.logits, second.logits))
    assert whole.shape == (21, tiny.VOCAB)
    assert torch.allclose(whole[:, KEPT], dense, atol=1e-4)
    assert float(dense.std()) > 0.3
    share = whole.softmax(-1)
    others = torch.ones(tiny.VOCAB, dtype=torch.bool).index_fill_(0, KEPT, False)
    assert float(share[:, others].sum()) == 0.0
    assert torch.allclose(share.sum(-1), torch.ones(21))


def test_training_touches_everything_but_the_targets_rows():
    target = tiny.model()
    before = {name: p.clone() for name, p in target.named_parameters()}
    model = small(target)
    ids = torch.randint(0, tiny.VOCAB, (2, 12))
    model.draft_logits(model.dense(ids)).logsumexp(-1).sum().backward()
    names = [name for name, _ in model.trained()]
    assert {"into.weight", "back", "bias", "norm.weight"} <= set(names)
    assert not any(name.startswith(("embed.", "head.")) for name in names)
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for _, p in model.trained())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in target.named_parameters())


def test_a_stored_model_is_the_one_that_was_saved_up_to_eight_bits(tmp_path):
    target = tiny.model()
    model = small(target)
    path = tmp_path / "small.safetensors"
    model.save(path, identity(target, ""), {"steps": 3})
    again = load_small(path, target)
    assert again.shape == SHAPE
    assert torch.equal(again.kept, KEPT)
    assert again.rows.numel() == 0
    ids = torch.arange(1, 15)
    with torch.no_grad():
        want = model.draft_logits(model.dense(ids[None]))[0]
    got = again.run([RowInput(ids, torch.arange(14), logits="all")]).logits[:, KEPT]
    assert float((got.softmax(-1) - want.softmax(-1)).abs().sum(-1).max()) < 0.05
    weights = sum(p.numel() for _, p in model.trained())
    assert path.stat().st_size < 1.6 * weights + 6000


def test_the_teacher_is_the_target_over_the_draft_vocabulary():
    from hasten.train.align import read
    from hasten.train.self_text import Texts

    for config in tiny.CONFIGS.values():
        target = tiny.model(config)
        texts = Texts(torch.randint(0, 97, (26,), dtype=torch.int32), torch.tensor([12, 14]), torch.tensor([5, 3]))
        answers = [one for batch in read(target, texts) for one in batch]
        p = Teacher(small(target), target)(answers)
        with torch.no_grad():
            want = [target(ids[None])[0, start - 1 : -1].softmax(-1) for ids, start in texts.each()]
        assert torch.allclose(p, torch.cat(want)[:, KEPT], atol=1e-4)


def test_wrong_files_and_sizes_are_refused(tmp_path):
    target = tiny.model()
    path = tmp_path / "small.safetensors"
    small(target).save(path, identity(target, ""), {})
    with pytest.raises(ConfigError, match="trained for model"):
        load_small(path, tiny.model(seed=3))
    from safetensors.torch import save_file

    state = load_file(path)
    facts = {"hasten": "small-lm", "kind": "small", "target": identity(target, ""), "hidden": "32"}
    save_file(state, path, facts)
    with pytest.raises(ConfigError, match=r"small\.safetensors"):
        load_small(path, target)
    sizes = {name: str(value) for name, value in dataclasses.asdict(SHAPE).items()}
    save_file({**state, "extra": torch.zeros(2)}, path, {**facts, **sizes})
    with pytest.raises(FormatError, match="unexpected extra"):
        load_small(path, target)
    save_file(state, path, {**facts, **sizes, "layers": "3"})
    with pytest.raises(FormatError, match=r"missing layers\.2"):
        load_small(path, target)
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(FormatError, match="cannot be read"):
        load_small(path, target)
    for knobs in ({"hidden": 0}, {"hidden": 100}, {"hidden": 31}, {"layers": 0}, {"ffn": 0}, {"window": 0}):
        with pytest.raises(ConfigError, match=f"small.{next(iter(knobs))}"):
            Shape(**knobs)
    with pytest.raises(ConfigError, match="at most the target's 48"):
        SmallLM(target, KEPT, Shape(hidden=64))
    with pytest.raises(ConfigError, match="kept"):
        SmallLM(target, torch.tensor([tiny.VOCAB]), SHAPE)
