"""The reference samplers, plain loops, against the engine's methods of the same name: token by token, forward by forward."""

from __future__ import annotations

import pytest
import torch
from diffusion import DREAM, LLADA, SDAR, state, write

import hasten
from hasten.bench.compare import Prompt, runner
from hasten.bench.samplers import NAMES, runners
from hasten.errors import IncompatibleError

PAIRS = {
    "LLaDA loop": ["reference"],
    "Dream loop": ["dream"],
    "Fast-dLLM loop": ["threshold"],
    "Fast-dLLM cached loop": ["threshold", "canvas-cache"],
}


@pytest.fixture(scope="module")
def mini():
    return hasten.load("mini-dlm", cache_bytes=100_000_000)


@pytest.mark.parametrize("name", PAIRS)
def test_a_loop_and_the_engine_are_one_sampler(mini, name):
    for text, size in (("sort: k a d b\n", 20), ("records: 21 bob 31\n", 40 if "Fast" in name else 33)):
        ids = tuple(mini.encode(text))
        own = runners(mini)[name](Prompt(0, "x", ids), size)
        engine = runner(mini, PAIRS[name], ends=True)(Prompt(0, "x", ids), size)
        assert own.tokens == engine.tokens
        assert (own.passes, own.computed) == (engine.passes, engine.computed)
        assert {place for place, _ in own.commits} >= set(range(len(own.tokens)))
        assert max(forward for _, forward in own.commits) == own.passes
        assert own.seconds > 0


@pytest.mark.parametrize("config", [LLADA, DREAM], ids=["llada", "dream"])
@pytest.mark.parametrize("name", PAIRS)
def test_with_and_without_a_logit_shift(tmp_path, config, name):
    write(tmp_path, config, state(config))
    llm = hasten.load(tmp_path, dtype="float32", cache_bytes=50_000_000)
    draw = torch.Generator().manual_seed(3)
    ids = tuple(torch.randint(5, 250, (6,), generator=draw).tolist())
    own = runners(llm)[name](Prompt(0, "x", ids), 40)
    engine = runner(llm, PAIRS[name], ends=True)(Prompt(0, "x", ids), 40)
    assert own.tokens == engine.tokens
    assert sorted(own.commits) == list(engine.commits), "the same places in the same forwards; nothing ties here"


def test_a_choice_of_them_and_models_they_are_not_for(tmp_path, mini):
    assert list(runners(mini)) == list(PAIRS)
    assert list(runners(mini, ("dream",))) == ["Dream loop"]
    assert set(NAMES) == {"llada", "dream", "fast-dllm"}
    write(tmp_path, SDAR, state(SDAR))
    for other in (hasten.load("mini-ar", cache_bytes=50_000_000), hasten.load(tmp_path, cache_bytes=50_000_000)):
        with pytest.raises(IncompatibleError, match="full attention"):
            runners(other)
