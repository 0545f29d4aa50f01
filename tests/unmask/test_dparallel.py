"""dParallel's decoding against a plain loop, and where its threshold comes from."""

from __future__ import annotations

import json
import math

import pytest
import torch
from canvases import MASK, Masked, prompts, run, view_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engine.contracts import MethodContext
from hasten.errors import ConfigError, FormatError
from hasten.unmask.dparallel import Config, DParallel, calibrated, entropy

MODEL = Masked()


def plain(prompt: list[int], length: int, block: int, tau: float) -> tuple[list[int], int]:
    """The published loop at T = 0: (text, forwards)."""
    x, forwards = [*prompt, *[MASK] * length], 0
    for low in range(len(prompt), len(x), block):
        high = min(low + block, len(x))
        while MASK in x[low:high]:
            probs = MODEL.logits(x).double().softmax(-1)
            forwards += 1
            nats = [-sum(p * math.log(p + 1e-12) for p in one) for one in probs.tolist()]
            open_ = [i for i in range(low, high) if x[i] == MASK]
            first = min(open_, key=lambda i: nats[i])
            for i in open_:
                if i == first or nats[i] <= tau:
                    x[i] = int(probs[i].argmax())
    return x[len(prompt) :], forwards


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0, math.inf])
def test_it_is_the_published_loop(tau):
    for prompt in prompts(3, seed=1):
        out = run(MODEL, [prompt], "reference:block=8", f"dparallel:tau={tau}", max_tokens=12)[0]
        assert (list(out.tokens), out.usage.forwards) == plain(prompt, 12, 8, tau)


def test_forwards_do_not_grow_with_tau_and_a_block_needs_one_at_infinity():
    many = prompts(8, seed=2)
    spent = [
        sum(out.usage.forwards for out in run(MODEL, many, "reference:block=8", f"dparallel:tau={tau}", max_tokens=16))
        for tau in (0, 0.5, 1, 1.5, 2.5, "inf")
    ]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] == 2 * len(many)


@given(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), min_size=1, max_size=16), st.floats(0, 0.7))
@settings(max_examples=100, deadline=None)
def test_a_step_takes_what_is_certain_and_always_the_most_certain(pairs, tau):
    view, row = view_of([0.5] * len(pairs), [flag for _, flag in pairs])
    view.changed = torch.tensor([[a, 0.0] for a, _ in pairs])
    nats, part = entropy(view.changed), DParallel(Config(tau=tau), None)
    open_ = [i for i, (_, flag) in enumerate(pairs) if flag]
    expected = {i for i in open_ if nats[i] <= tau} | {
        i for i in open_[:1] for i in [min(open_, key=lambda k: float(nats[k]))]
    }
    assert part.select(None, view, row, 1)[1].nonzero()[:, 0].tolist() == sorted(expected)
    part.tau = -math.inf  # one position per step
    assert int(part.select(None, view, row, 1)[1].sum()) == (1 if open_ else 0)


def test_entropy_is_that_of_the_distribution():
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -torch.inf  # the mask token
    expected = torch.distributions.Categorical(logits=logits.double().masked_fill(logits == -torch.inf, -1e4)).entropy()
    assert torch.allclose(entropy(logits), expected, atol=1e-9)
    assert float(entropy(torch.zeros(1, 96))) == pytest.approx(math.log(96), abs=1e-6)


def test_the_threshold_is_the_models_own_where_training_left_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    assert calibrated("tiny") == 0.5
    for folder in (tmp_path / "model", tmp_path / "home" / "minis" / "named"):
        folder.mkdir(parents=True)
        (folder / "card.json").write_text(json.dumps({"dparallel": {"tau": 0.125}}))
        name = "named" if folder.name == "named" else str(folder)
        assert DParallel(Config(), MethodContext(name, MODEL)).tau == 0.125
        assert DParallel(Config(tau=0.3), MethodContext(name, MODEL)).tau == 0.3
    (tmp_path / "model" / "card.json").write_text(json.dumps({"dparallel": {"tau": "low"}}))
    with pytest.raises(FormatError, match="nats"):
        calibrated(str(tmp_path / "model"))


def test_rows_are_their_own():
    many = prompts(4, seed=3)
    for prompt, out in zip(many, run(MODEL, many, "dparallel:tau=1.5", max_tokens=12)):
        assert run(MODEL, [prompt], "dparallel:tau=1.5", max_tokens=12)[0].tokens == out.tokens


@pytest.mark.parametrize("tau", [-0.5, math.nan, -math.inf])
def test_a_threshold_outside_its_range_is_named(tau):
    with pytest.raises(ConfigError) as caught:
        Config(tau=tau)
    assert caught.value.field == "dparallel.tau"
