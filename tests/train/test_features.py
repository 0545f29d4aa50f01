"""Training of feature drafters: a layer learns, resuming changes nothing, and the loss is the one written out."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F

from hasten.engine.engine import PLAIN, Engine
from hasten.errors import ConfigError, HastenError
from hasten.models.feature import FeatureModel
from hasten.train.features import Config, features, fit, frequent, loss, pad
from hasten.train.self_text import Texts
from hasten.types import Request, SamplingParams


@pytest.fixture(scope="module")
def told() -> tuple[Engine, Texts]:
    """Texts that a small trained model wrote itself, sampled, from prompts of four tokens."""
    engine, text = tiny.trained()
    asked = [
        (Request(tuple(text(4)), SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.7, seed=i)), PLAIN)
        for i in range(64)
    ]
    texts = [[*request.prompt, *outs[0].tokens] for (request, _), outs in zip(asked, engine.run(asked), strict=True)]
    return engine, Texts(
        torch.tensor([t for text in texts for t in text], dtype=torch.int32),
        torch.tensor([len(text) for text in texts]),
        torch.full((64,), 4),
    )


def new(engine, kind: str = "eagle", seed: int = 0) -> FeatureModel:
    return FeatureModel(kind, engine.backbone, torch.arange(tiny.VOCAB), 64).reset(seed)


def examples(engine, texts) -> list:
    return [one for batch in features(engine.backbone, texts, 200) for one in batch]


def test_features_are_the_states_the_output_layer_reads(told):
    engine, texts = told
    data = examples(engine, texts)
    assert len(data) == len(texts)
    ids, states, prompt = data[7]
    assert prompt == 4
    with torch.no_grad():
        dense = engine.backbone(ids[None])[0]
    assert torch.allclose(engine.backbone.logits(states), dense, atol=1e-4)


def test_the_loss_written_out(told):
    engine, texts = told
    data = examples(engine, texts)[:3]
    data[1] = (data[1][0][:17], data[1][1][:17], 9)
    model, target = new(engine, "fspad", 3), engine.backbone
    config = Config(unroll=1, feature_weight=0.7)
    value, [agreement] = loss(model, target, *pad(data), config, None)
    total, right, count = 0.0, 0, 0
    for ids, states, prompt in data:
        out = model.dense(states[None, :-2], target.embeddings(ids[1:-1])[None])[0]
        for i in range(len(ids) - 2):
            if i + 2 < prompt:
                continue
            teacher = target.logits(states[i + 1])
            student = target.logits(out[i, :48])
            total -= float((teacher.softmax(-1) * student.log_softmax(-1)).sum().detach())
            total += 0.7 * float(F.smooth_l1_loss(out[i, 48:], states[i + 1]).detach())
            right += int(teacher.argmax() == student.argmax())
            count += 1
    assert float(value.detach()) == pytest.approx(total / count, rel=1e-4)
    assert agreement == pytest.approx(right / count)


@pytest.mark.parametrize("kind", ["eagle", "fspad"])
def test_a_trained_layer_agrees_with_its_target_far_more_often(told, kind):
    engine, texts = told
    train, held = texts.split(8)
    model, target = new(engine, kind), engine.backbone
    seen: list[list[float]] = []
    config = Config(steps=60, tokens=300, lr=3e-3, warmup=5, unroll=2)
    before = loss(model, target, *pad(examples(engine, held)), config, None)[1]
    fit(model, target, examples(engine, train), config, report=lambda step, value, agreement: seen.append(agreement))
    after = loss(model, target, *pad(examples(engine, held)), config, None)[1]
    assert len(seen) == 60
    assert before[0] < 0.2
    assert after[0] > 0.5
    assert after[1] > before[1] + 0.2


def test_a_cut_run_continues_as_if_it_had_not_been(told, tmp_path):
    engine, texts = told
    data, target = examples(engine, texts), engine.backbone
    config = Config(steps=8, tokens=120, unroll=1)
    whole, cut = new(engine), new(engine)
    fit(whole, target, data, config)

    class Stop(Exception):
        pass

    def stop(step: int, value: float, agreement: list[float]) -> None:
        if step == 6:
            raise Stop

    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        fit(cut, target, data, config, checkpoint=path, every=3, report=stop)
    resumed = new(engine, seed=5)
    fit(resumed, target, data, config, checkpoint=path, every=3)
    for (name, a), (_, b) in zip(whole.trained(), resumed.trained(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ConfigError, match="remove it"):
        fit(new(engine), target, data, Config(steps=9, tokens=120, unroll=1), checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run(told):
    engine, texts = told
    model = new(engine)
    model.join.weight.data[0, 0] = torch.nan
    with pytest.raises(HastenError, match="step 0"):
        fit(model, engine.backbone, examples(engine, texts), Config(steps=2, tokens=50))


def test_frequent_ids_and_texts_on_disk(tmp_path):
    texts = Texts(torch.tensor([5, 5, 2, 9, 9, 9, 2], dtype=torch.int32), torch.tensor([3, 4]), torch.tensor([1, 2]))
    assert frequent(texts, 2, 20).tolist() == [2, 9]
    assert frequent(texts, 3, 20).tolist() == [2, 5, 9]
    texts.save(tmp_path / "t.safetensors")
    again = Texts.load(tmp_path / "t.safetensors")
    assert [(ids.tolist(), p) for ids, p in again.each()] == [([5, 5, 2], 1), ([9, 9, 9, 2], 2)]
    first, second = texts.split(1)
    assert (len(first), len(second)) == (1, 1)
    assert second.ids.tolist() == [9, 9, 9, 2]
    with pytest.raises(ConfigError, match="held_out"):
        texts.split(2)
    blob = (tmp_path / "t.safetensors").read_bytes()
    for cut in (0, 20, len(blob) - 3):
        (tmp_path / "t.safetensors").write_bytes(blob[:cut])
        with pytest.raises(HastenError, match=r"t\.safetensors"):
            Texts.load(tmp_path / "t.safetensors")


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("tokens", 0), ("unroll", 0), ("lr", 0.0), ("clip", -1.0)])
def test_a_bad_setting_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"train.{field}"):
        Config(**{field: value})
