"""Training of Learn2PD's filter: the oracle's replay on a scripted model, the fit, its measures, and the whole recipe."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from canvases import EOS, Masked, prompts, run
from scripted import Scripted, answer, tasks

from hasten.engine.contracts import MethodContext
from hasten.engine.engine import Engine
from hasten.errors import ConfigError, IncompatibleError
from hasten.train import parallel_filter as filtering
from hasten.train.parallel_filter import Config, Records, auc, fit, measure, replay, split, tau_for
from hasten.train.recipes import Recipe
from hasten.train.recipes import train as train_recipe
from hasten.types import SamplingParams

MODEL = Scripted()
CONFIG = Config(canvas=24, block=8, steps=1500)


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def engine(model: Masked) -> Engine:
    return Engine(model, cache_bytes=16_000_000)


@pytest.fixture(scope="module")
def records() -> tuple[Records, dict[str, int]]:
    return replay(engine(MODEL), MethodContext("tiny", MODEL), tasks(60), CONFIG, quiet)


@pytest.mark.parametrize(
    "model", [Masked(), Masked(seed=2, shift=1), Masked(seed=3, block=8)], ids=["full", "shifted", "blocks"]
)
def test_the_oracle_writes_the_reference_answer(model):
    """On models that are mostly wrong: where nothing is right the answer itself is written."""
    many = prompts(4, seed=3)
    found, counts = replay(engine(model), MethodContext("tiny", model), many, CONFIG, quiet)
    names = () if model.capabilities.block else ("reference:block=8",)
    plain = run(model, many, *names, ignore_eos=False)
    assert counts["reference_forwards"] == sum(out.usage.forwards for out in plain)
    assert counts["oracle_forwards"] <= counts["reference_forwards"]
    assert found.prompt.unique().tolist() == [0, 1, 2, 3]
    assert len(found.inputs) >= counts["oracle_forwards"]
    assert bool((found.right <= found.known).all())


def test_the_records_are_what_an_oracle_sees(records):
    """Replayed by hand: right predictions are committed, all of a block where nothing is right."""
    found, counts = records
    assert counts["oracle_forwards"] < counts["reference_forwards"] / 2
    for number, prompt in enumerate(tasks(3 * 20)[:3]):
        mine = found.of(torch.tensor([number]))
        y, x, step, cut = answer(prompt, 24), [*prompt, *[96] * 24], 0, []
        end = 4 + y.index(EOS)
        while True:
            best = MODEL.logits(x).softmax(-1).max(-1)
            low = next(i for i in range(4, 28, 8) if 96 in x[i : i + 8])
            open_ = [i for i in range(low, low + 8) if x[i] == 96]
            hit = [i for i in range(low, low + 8) if int(best.indices[i]) == y[i - 4]]
            assert torch.allclose(mine.inputs[step], best.values[low : low + 8])
            assert mine.right[step].nonzero()[:, 0].tolist() == [i - low for i in hit]
            assert mine.open[step].nonzero()[:, 0].tolist() == [i - low for i in open_]
            for i in [i for i in open_ if i in hit] or open_:
                x[i] = y[i - 4]
            cut += [(step, end + 1 - low)] if low + 8 > end + 1 else []
            step += 1
            if 96 not in x[4 : end + 1]:
                break
        assert len(mine.inputs) == step + len(cut)
        for i, (whole, size) in enumerate(cut, step):
            assert torch.equal(mine.inputs[i, :size], mine.inputs[whole, :size])
            assert not bool(mine.inputs[i, size:].any())
            assert torch.equal(mine.right[i, :size], mine.right[whole, :size])
            assert mine.known[i].tolist() == [True] * size + [False] * (8 - size)


def test_no_prompt_is_in_two_parts(records):
    parts = split(records[0], seed=1)
    owners = [set(part.prompt.tolist()) for part in parts]
    assert [len(one) for one in owners] == [48, 6, 6]
    assert len(owners[0] | owners[1] | owners[2]) == 60
    assert sum(len(part.inputs) for part in parts) == len(records[0].inputs)


def test_the_filter_knows_more_than_a_confidence(records):
    learn, stop, test = split(records[0], seed=0)
    model, steps = fit(learn, stop, CONFIG, quiet)
    facts = measure(model, test)
    assert steps <= CONFIG.steps
    assert facts["auc"] > facts["auc_of_confidence"] + 0.05
    tau = tau_for(model, stop)
    assert measure(model, stop, tau)["false_positives"] <= 0.01
    again, _ = fit(learn, stop, CONFIG, quiet)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_area_under_the_curve_counts_pairs():
    scores, right = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.2]), torch.tensor([False, True, False, True, False])
    pairs = [(a > b) + 0.5 * (a == b) for a in (0.4, 0.8) for b in (0.1, 0.4, 0.2)]
    assert auc(scores, right) == pytest.approx(sum(pairs) / 6, abs=1e-6)
    assert auc(scores, torch.ones(5, dtype=torch.bool)) == 0.5


def language_model(model: Masked, name: str = "tiny") -> SimpleNamespace:
    """What the recipe uses of an LLM; its chat messages become the scripted tasks."""
    given = iter(tasks(400))
    return SimpleNamespace(
        name=name, model=model, engine=engine(model), tokenizer=SimpleNamespace(chat=lambda messages: next(given))
    )


def test_the_recipe_makes_a_filter_that_the_method_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    model = Scripted()
    model.capabilities = MODEL.capabilities
    seen: list[str] = []
    facts = train_recipe(
        "learn2pd",
        language_model(model),
        Recipe(prompts=100, canvas=32, steps=1000),
        progress=lambda what, done, total: seen.append(what),
    )
    assert set(seen) == {"writing answers", "replaying answers", "training"}
    assert facts["path"].endswith("drafters/tiny/learn2pd.safetensors")
    assert facts["parameters"] == 2112
    assert facts["oracle_forwards"] < facts["reference_forwards"]
    plain = run(model, tasks(12), "reference", ignore_eos=False, max_tokens=32)
    quick = run(model, tasks(12), "learn2pd", ignore_eos=False, max_tokens=32)
    assert sum(out.usage.forwards for out in quick) <= 0.6 * sum(out.usage.forwards for out in plain)
    same = sum(a.tokens == b.tokens for a, b in zip(plain, quick, strict=True))
    assert same >= 11


def test_models_and_sizes_it_is_not_for_are_refused(tmp_path, monkeypatch):
    causal = Masked()
    causal.capabilities = dataclasses.replace(causal.capabilities, kind="causal")
    with pytest.raises(IncompatibleError, match="fills canvases"):
        filtering.train(language_model(causal), tasks(4), CONFIG, tmp_path / "x", quiet)
    with pytest.raises(ConfigError, match="trained on"):
        filtering.train(language_model(Masked(block=4)), tasks(4), CONFIG, tmp_path / "x", quiet)
    with pytest.raises(ConfigError, match="leave room"):
        filtering.train(language_model(MODEL), tasks(4), Config(canvas=255, block=8), tmp_path / "x", quiet)
    with pytest.raises(ConfigError, match="at least 8"):
        Recipe(prompts=1)
    with pytest.raises(ConfigError, match="no tokenizer"):
        filtering.tasks(SimpleNamespace(name="tiny", tokenizer=None), 8, 24, 0)
    assert SamplingParams(max_tokens=CONFIG.canvas).max_tokens == 24


def test_small_models_learn_from_their_own_tasks():
    worlds = pytest.importorskip("hasten.worlds")
    llm = SimpleNamespace(name="mini-dlm", tokenizer=SimpleNamespace(encode=lambda text: text))
    found = filtering.tasks(llm, 40, 64, 0)
    assert len(set(found)) == 40
    assert {worlds.split_of(text) for text in found} == {"train"}
