"""Medusa: exact with any heads, trees written out, and heads that learn."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from feature_layers import context, saved

from hasten.draft.medusa import Config, Medusa
from hasten.engine.contracts import Feedback, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError, FormatError
from hasten.models.feature import identity
from hasten.models.heads import MedusaHeads, load_heads
from hasten.types import Request, SamplingParams


def heads(target, count: int = 3, seed: int = 0, kept: int = tiny.VOCAB) -> MedusaHeads:
    made = MedusaHeads(target, torch.arange(kept), count)
    generator = torch.Generator().manual_seed(seed)
    for _, p in made.trained():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    return made


def stored(folder, target, **options) -> str:
    path = folder / "medusa.safetensors"
    heads(target, **options).save(path, identity(target, ""), {})
    return str(path)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 4, 10])
def test_text_is_that_of_plain_decoding(tmp_path, sampling, batch):
    engine = tiny.engine(rows=batch)
    medusa = Medusa(Config(stored(tmp_path, engine.backbone), floor=0.0), context(engine))
    asked = [
        Request(tuple(range(i + 1, 3 * i + 5)), SamplingParams(max_tokens=20, seed=i, ignore_eos=True, **sampling))
        for i in range(10)
    ]
    plain = [outs[0].tokens for outs in engine.run([(one, PLAIN) for one in asked])]
    for measured in (False, True):
        parts = Parts(medusa, budget=12, measured=measured)
        assert [outs[0].tokens for outs in engine.run([(one, parts) for one in asked])] == plain
    assert not medusa._tips


def test_untrained_heads_repeat_the_targets_own_next_token():
    target = tiny.model()
    state = torch.randn(2, 48)
    fresh = MedusaHeads(target, torch.arange(tiny.VOCAB), 3)
    assert torch.allclose(fresh(state), target.logits(state)[:, None].expand(-1, 3, -1), atol=1e-5)


def test_the_tree_holds_the_likeliest_combinations(tmp_path):
    engine = tiny.engine()
    medusa = Medusa(Config(stored(tmp_path, engine.backbone), nodes=20, ranks=4, floor=0.0), context(engine))
    state = torch.randn(1, 48)
    medusa.observe([Feedback(1, (0,), (5,), (), 7, final=state)])
    [draft] = medusa.propose([RowView(1, [5, 7], 9, 0.0, 0)], [20])
    share = medusa.heads(state[0]).softmax(-1)
    best = share.topk(4)
    found = []
    for depth in (1, 2, 3):
        for ranks in itertools.product(range(4), repeat=depth):
            chance = float(torch.stack([best.values[k, r] for k, r in enumerate(ranks)]).prod())
            found.append((chance, tuple(int(best.indices[k, r]) for k, r in enumerate(ranks))))
    want = sorted(found, reverse=True)[:20]
    drafted: list[tuple[float, tuple[int, ...]]] = []
    for token, parent, score in zip(draft.tokens, draft.parents, draft.scores, strict=True):
        above = drafted[parent] if parent >= 0 else (1.0, ())
        drafted.append((above[0] * score, (*above[1], token)))
    assert [path for _, path in drafted] == [path for _, path in want]
    assert [chance for chance, _ in drafted] == pytest.approx([chance for chance, _ in want], rel=1e-4)
    [nothing] = medusa.propose([RowView(2, [5, 7], 9, 0.0, 0)], [20])
    assert not len(nothing)


def test_heads_learn_from_a_targets_texts():
    from hasten.train.features import Config as TrainConfig
    from hasten.train.features import features, fit, medusa_loss, pad
    from hasten.train.self_text import Texts

    engine, text = tiny.trained()
    asked = [(Request(tuple(text(4)), SamplingParams(max_tokens=24, ignore_eos=True)), PLAIN) for _ in range(48)]
    texts = [[*request.prompt, *outs[0].tokens] for (request, _), outs in zip(asked, engine.run(asked), strict=True)]
    told = Texts(
        torch.tensor([t for one in texts for t in one], dtype=torch.int32), torch.tensor([28] * 48), torch.tensor([4] * 48)
    )
    learnt, held = ([one for batch in features(engine.backbone, part, 300) for one in batch] for part in told.split(8))
    model = MedusaHeads(engine.backbone, torch.arange(tiny.VOCAB), 2)
    config = TrainConfig(steps=60, tokens=300, lr=3e-3, warmup=5)
    before = medusa_loss(model, engine.backbone, *pad(held), config, None)[1]
    fit(model, engine.backbone, learnt, config, loss=medusa_loss)
    after = medusa_loss(model, engine.backbone, *pad(held), config, None)[1]
    assert after[0] > before[0] + 0.3
    assert after[1] > before[1] + 0.2
    ids, states, weight = pad(held[:1])
    want = engine.backbone.logits(states[0]).argmax(-1)
    got = model(states[0])[:, 1].argmax(-1)
    places = [i for i in range(len(want) - 3) if weight[0, i + 3]]
    assert medusa_loss(model, engine.backbone, ids, states, weight, config, None)[1][1] == pytest.approx(
        sum(int(got[i] == want[i + 2]) for i in places) / len(places)
    )


def test_wrong_files_and_settings_are_refused(tmp_path):
    engine = tiny.engine()
    path = stored(tmp_path, engine.backbone)
    with pytest.raises(ConfigError, match="trained for model"):
        load_heads(path, tiny.model(seed=3))
    with pytest.raises(ConfigError, match="kind 'eagle', not 'medusa'"):
        load_heads(saved(tmp_path, "eagle", engine.backbone), engine.backbone)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "medusa.safetensors").read_bytes()[:200])
    with pytest.raises(FormatError, match="cannot be read"):
        load_heads(tmp_path / "cut.safetensors", engine.backbone)
    for knobs, message in (({"nodes": 0}, "nodes"), ({"ranks": 33}, "ranks"), ({"floor": 1.0}, "floor")):
        with pytest.raises(ConfigError, match=f"medusa.{message}"):
            Config(**knobs)
