"""Alignment of a draft model on a tiny pair: every loss raises acceptance, resuming changes nothing, predictions hold."""

from __future__ import annotations

import pytest
import tiny
import torch

from hasten.draft.tvdpp import Config as Knobs
from hasten.draft.tvdpp import Tvdpp
from hasten.engine.contracts import MethodContext, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.engine.sampling import Sampler
from hasten.engine.verify import verify
from hasten.errors import ConfigError, HastenError
from hasten.models.assistant import Assistant
from hasten.models.small import Shape, SmallLM
from hasten.train import align as training
from hasten.train.losses import Objective
from hasten.train.self_text import Texts
from hasten.types import Request, SamplingParams

SHAPE = Shape(hidden=32, layers=1, ffn=48, window=64)
CONFIG = training.Config(pretrain=25, align=60, tokens=400, length=30, warmup=5, measure=20, lr=4e-3, align_lr=4e-3)


@pytest.fixture(scope="module")
def told():
    """(engine, answers learnt from, answers held out, text) of a small trained model; the text is another random one."""
    engine, text = tiny.trained()
    asked = [
        (Request(tuple(text(4)), SamplingParams(max_tokens=28, ignore_eos=True, temperature=1.0, seed=i)), PLAIN)
        for i in range(96)
    ]
    full = [[*request.prompt, *outs[0].tokens] for (request, _), outs in zip(asked, engine.run(asked), strict=True)]
    texts = Texts(
        torch.tensor([t for one in full for t in one], dtype=torch.int32),
        torch.tensor([len(one) for one in full]),
        torch.full((96,), 4),
    )
    learnt, held = ([one for part in training.read(engine.backbone, some, 300) for one in part] for some in texts.split(24))
    return engine, learnt, held, torch.tensor(text(3000), dtype=torch.int32)


def new(engine, seed: int = 0) -> SmallLM:
    return SmallLM(engine.backbone, torch.arange(tiny.VOCAB), SHAPE).reset(seed)


@pytest.fixture(scope="module")
def pretrained(told):
    """Weights after a short stage 1, and their held-out acceptance."""
    engine, _, held, text = told
    model = new(engine)
    losses: list[float] = []
    training.pretrain(model, [text], CONFIG, report=lambda step, value: losses.append(value))
    assert losses[-1] < losses[0] - 0.5
    share = training.measure(model, training.Teacher(model, engine.backbone), held)
    return {name: p.detach().clone() for name, p in model.trained()}, share


def start(told, pretrained) -> SmallLM:
    model = new(told[0])
    for name, p in model.trained():
        p.data.copy_(pretrained[0][name])
    return model


def packed(engine, model: SmallLM) -> SmallLM:
    """The same weights, ready to draft."""
    ready = SmallLM(engine.backbone, model.kept, SHAPE)
    for (_, ours), (_, theirs) in zip(ready.trained(), model.trained(), strict=True):
        ours.data.copy_(theirs.detach())
    return ready.requires_grad_(False).pack()


def tokens_per_pass(engine, model: SmallLM) -> float:
    """Block efficiency over sampled answers, with chains of three."""
    own = Tvdpp(Knobs(nodes=3), MethodContext("tiny", engine.backbone), Assistant(packed(engine, model), tiny.VOCAB))
    text = tiny.trained()[1]
    asked = [
        Request(tuple(text(4)), SamplingParams(max_tokens=25, ignore_eos=True, temperature=1.0, seed=1000 + i))
        for i in range(24)
    ]
    outs = [one[0] for one in engine.run([(one, Parts(own)) for one in asked])]
    return sum(len(out.tokens) - 1 for out in outs) / sum(out.usage.forwards for out in outs)


@pytest.mark.parametrize("loss", ["tvdpp", "tvd", "kld", "mixed", "sampled"])
def test_every_loss_raises_held_out_acceptance_over_pretraining(told, pretrained, loss):
    engine, learnt, held, text = told
    model = start(told, pretrained)
    objective = Objective(expectation="sampled", samples=16) if loss == "sampled" else training.named(loss)
    seen: list[float] = []
    best = training.align(
        model,
        engine.backbone,
        learnt,
        held,
        [text],
        CONFIG,
        objective,
        report=lambda step, value, share: seen.append(share),
    )
    assert best >= pretrained[1] + 0.05
    assert best == pytest.approx(training.measure(model, training.Teacher(model, engine.backbone), held), abs=1e-6)
    assert seen == sorted(seen)
    assert len(seen) == CONFIG.align
    if loss == "tvdpp":
        before, after = tokens_per_pass(engine, start(told, pretrained)), tokens_per_pass(engine, model)
        assert after > before + 0.1


def test_predicted_acceptance_is_what_verification_accepts(told, pretrained):
    engine, learnt, held, text = told
    model = start(told, pretrained)
    training.align(model, engine.backbone, learnt, held, [text], CONFIG, Objective())
    predicted = training.measure(model, training.Teacher(model, engine.backbone), held)
    own = Tvdpp(Knobs(nodes=1), MethodContext("tiny", engine.backbone), Assistant(packed(engine, model), tiny.VOCAB))
    accepted = judged = 0
    for seed, one in enumerate(held * 4):  # every position of every text is drafted and judged four times
        with torch.no_grad():
            logits = engine.backbone(one.ids[None])[0]
        tokens = one.ids.tolist()
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), seed, tokens[: one.start], tiny.VOCAB)
        own.open(seed, tokens[: one.start])
        for at in range(one.start, len(tokens)):
            [draft] = own.propose([RowView(seed, tokens[:at], 9, 1.0, seed)], [1])
            rows = torch.stack((logits[at - 1], torch.zeros(tiny.VOCAB)))
            accepted += len(verify("rejection", rows, draft, sampler, at, own.draws).path)
            judged += 1
        own.close(seed)
    assert judged > 2500
    assert accepted / judged == pytest.approx(predicted, abs=0.02)


@pytest.mark.parametrize("stage", ["pretrain", "align"])
def test_a_cut_run_has_the_loss_curve_of_one_that_was_not(told, tmp_path, stage):
    engine, learnt, held, text = told
    config = training.Config(pretrain=9, align=9, tokens=150, length=20, measure=3, warmup=2)
    path = tmp_path / "run.checkpoint"

    class Stop(Exception):
        pass

    def curve(model, stop: int | None, path, config=config) -> list[float]:
        seen: list[float] = []

        def report(step: int, value: float, best: float = 0.0) -> None:
            seen.append(value)
            if step == stop:
                raise Stop

        try:
            if stage == "pretrain":
                training.pretrain(model, [text], config, path, report, every=3)
            else:
                sampled = Objective(expectation="sampled")
                training.align(model, engine.backbone, learnt, held, [text], config, sampled, path, report)
        except Stop:
            pass
        return seen

    whole, cut, resumed = new(engine), new(engine), new(engine)
    curves = curve(whole, None, None), curve(cut, 7, path), curve(resumed, None, path)
    assert len(curves[1]) == 7
    assert curves[1] == curves[0][:7]
    assert curves[2] == curves[0][6:]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.trained(), resumed.trained(), strict=True))
    with pytest.raises(ConfigError, match="remove it"):
        curve(new(engine), None, path, training.Config(pretrain=10, align=10, tokens=150, length=20, measure=3, warmup=2))


def test_the_best_checkpoint_may_be_the_first(told, pretrained):
    engine, learnt, held, _ = told
    model = start(told, pretrained)
    wild = training.Config(align=4, tokens=100, measure=2, align_lr=3.0, warmup=1, clip=1e6)
    best = training.align(model, engine.backbone, learnt, held, [], wild, Objective())
    assert best == pytest.approx(pretrained[1])
    assert all(torch.equal(p, pretrained[0][name]) for name, p in model.trained())


def test_answers_on_disk_and_texts_without_one(told, tmp_path):
    _, learnt, _, _ = told
    training.save_answers(tmp_path / "a.safetensors", learnt)
    for one, other in zip(learnt, training.load_answers(tmp_path / "a.safetensors"), strict=True):
        assert torch.equal(one.ids, other.ids)
        assert (one.start, one.states.shape) == (other.start, other.states.shape)
        assert torch.equal(one.states, other.states)
        assert torch.equal(one.total, other.total)
    empty = Texts(torch.tensor([5, 6, 7, 8], dtype=torch.int32), torch.tensor([2, 2]), torch.tensor([2, 1]))
    assert [len(one.ids) for part in training.read(tiny.model(), empty) for one in part] == [2]


def test_what_is_wrong_is_said_before_or_with_the_step(told):
    engine, _, held, text = told
    model = new(engine)
    with pytest.raises(ConfigError, match="no answers"):
        training.align(model, engine.backbone, [], held, [text], CONFIG, Objective())
    with pytest.raises(ConfigError, match="holds more than 30 tokens"):
        training.pretrain(model, [text[:10]], CONFIG)
    model.back.data[0, 0] = torch.nan
    with pytest.raises(HastenError, match="step 0"):
        training.pretrain(model, [text], CONFIG)
    broken = tiny.model()
    broken.norm.weight.data[0] = torch.nan
    texts = Texts(torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([3]), torch.tensor([1]))
    with pytest.raises(HastenError, match="logits are not finite"):
        list(training.read(broken, texts))
    for knobs in ({"pretrain": 0}, {"align": 0}, {"tokens": 0}, {"measure": 0}, {"lr": 0.0}, {"share": 0.0}):
        with pytest.raises(ConfigError, match=f"train.{next(iter(knobs))}"):
            training.Config(**knobs)
    with pytest.raises(ConfigError, match=r"train\.loss"):
        training.named("hinge")


def test_the_corpus_holds_no_text_of_the_suites():
    from hasten.bench import suites

    seen: list[str] = []
    training.corpus(lambda text: seen.append(text) or [])
    everything = "\n".join(seen)
    assert len(everything) > 1_000_000
    prompts = [source for _, source in suites._functions()] + [text for _, text in suites._texts()]
    assert len(prompts) > 40
    assert [text[:60] for text in prompts if text[:150] in everything] == []
