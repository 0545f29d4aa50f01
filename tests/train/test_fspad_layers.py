"""FSPAD's layer against EAGLE's: trained alike on a small trained target, three seeds (2408.15562, at tiny scale)."""

from __future__ import annotations

import pytest
import tiny
import torch

from hasten.draft.fspad import Config as Settings
from hasten.draft.fspad import Fspad
from hasten.engine.contracts import MethodContext
from hasten.engine.engine import PLAIN, Parts
from hasten.models.feature import FeatureModel, identity
from hasten.train.features import Config, features, fit, loss, pad
from hasten.train.self_text import Texts
from hasten.types import Request, SamplingParams


@pytest.mark.slow
def test_it_is_not_below_eagle_and_far_above_untrained(tmp_path):
    engine, text = tiny.trained()
    asked = [
        (Request(tuple(text(4)), SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.7, seed=i)), PLAIN)
        for i in range(120)
    ]
    told = [[*request.prompt, *outs[0].tokens] for (request, _), outs in zip(asked, engine.run(asked), strict=True)]
    ids = torch.tensor([token for one in told for token in one], dtype=torch.int32)
    texts = Texts(ids, torch.tensor([len(one) for one in told]), torch.full((len(told),), 4))
    learnt, held = texts.split(20)
    train = [one for batch in features(engine.backbone, learnt, 400) for one in batch]
    test = [one for batch in features(engine.backbone, held, 400) for one in batch]
    first: dict[str, list[float]] = {"eagle": [], "fspad": []}
    for seed in range(3):
        config = Config(steps=120, tokens=500, lr=3e-3, warmup=5, unroll=2, seed=seed)
        for kind, values in first.items():
            layer = FeatureModel(kind, engine.backbone, torch.arange(tiny.VOCAB), 2 * 48).reset(seed)
            fit(layer, engine.backbone, train, config)
            values.append(loss(layer, engine.backbone, *pad(test), config, None)[1][0])
            if kind == "fspad" and seed == 0:
                layer.save(tmp_path / "trained.safetensors", identity(engine.backbone, ""), {})
                layer.reset(9).save(tmp_path / "untrained.safetensors", identity(engine.backbone, ""), {})
    means = {kind: sum(values) / 3 for kind, values in first.items()}
    assert means["fspad"] >= means["eagle"] - 0.01, first
    tau = {}
    for name in ("trained", "untrained"):
        drafter = Fspad(Settings(str(tmp_path / f"{name}.safetensors"), floor=0.0), MethodContext("tiny", engine.backbone))
        outs = [
            engine.run([(Request(tuple(text(8)), SamplingParams(max_tokens=41, ignore_eos=True)), Parts(drafter))])[0][0]
            for _ in range(12)
        ]
        tau[name] = sum(40 for _ in outs) / sum(out.usage.forwards for out in outs)
    assert tau["trained"] >= tau["untrained"] + 0.3, tau
