"""Learn2PD: the filter against a plain loop, cuts at the end of text, and files that do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from canvases import EOS, MASK, Masked, policy, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scripted import VOCAB, Scripted, answer, tasks

from hasten.engine.engine import Engine, Parts
from hasten.engine.parts import Forward
from hasten.errors import ConfigError, FormatError
from hasten.policy import _view
from hasten.types import Request, SamplingParams
from hasten.unmask.learn2pd import Filter, load_filter

MODEL, SHIFTED, BLOCKS, SCRIPTED = Masked(), Masked(seed=2, shift=1), Masked(seed=3, block=8), Scripted()


def written(folder: Path, block: int = 8, seed: int = 0, bias: float = 0.0, scale: float = 6.0) -> str:
    """The file of a random filter that trusts some positions and not others."""
    made = Filter(block)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale / block)
        made.second.bias += bias
    path = folder / f"filter-{block}-{seed}-{bias}.safetensors"
    made.save(path, "tiny", EOS, {"seed": seed})
    return str(path)


def threshold(folder: Path, at: float, block: int = 8) -> str:
    """The file of a filter that is sure from a confidence of `at` on."""
    made = Filter(block)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
        made.first.weight.copy_(torch.eye(block) * 1e5)
        made.second.weight.copy_(torch.eye(block))
        made.second.bias.fill_(-1e5 * at + 3.17805)
    path = folder / f"threshold-{at}-{block}.safetensors"
    made.save(path, "tiny", EOS, {})
    return str(path)


def spec(weights: str, **knobs: object) -> str:
    return "learn2pd:" + ",".join(f"{k}={v}" for k, v in {"block": 8, "weights": weights, **knobs}.items())


def plain(model: Masked, filter_: Filter, prompt: list[int], length: int, tau: float, quota: int) -> tuple[list[int], int]:
    """The filter over an even quota as the paper states it, T = 0, blocks of 8: (tokens, forwards)."""
    w1, b1 = filter_.first.weight.tolist(), filter_.first.bias.tolist()
    w2, b2 = filter_.second.weight.tolist(), filter_.second.bias.tolist()
    x, forwards = [*prompt, *[MASK] * length], 0
    for low in range(len(prompt), len(x), 8):
        high = min(low + 8, len(x))
        while MASK in x[low:high]:
            best = model.logits(x).softmax(-1).max(-1)
            forwards += 1
            c = [*best.values[low:high].tolist(), *[0.0] * 8][:8]
            h = [max(0.0, sum(w * v for w, v in zip(row, c, strict=True)) + b) for row, b in zip(w1, b1, strict=True)]
            out = [sum(w * v for w, v in zip(row, h, strict=True)) + b for row, b in zip(w2, b2, strict=True)]
            open_ = [i for i in range(low, high) if x[i] == MASK]
            ranked = sorted(open_, key=lambda i: -float(best.values[i]))[:quota]
            for i in open_:
                if i in ranked or float(torch.tensor(out[i - low]).sigmoid()) > tau:
                    x[i] = int(best.indices[i])
    return x[len(prompt) :], forwards


@pytest.mark.parametrize(("length", "steps", "quota"), [(24, 0, 1), (21, 0, 1), (24, 12, 2)])
@pytest.mark.parametrize("model", [MODEL, SHIFTED], ids=["full", "shifted"])
def test_a_canvas_is_the_plain_loop(tmp_path, model, length, steps, quota):
    few = 0
    for seed, prompt in enumerate(prompts(4, seed=length)):
        path = written(tmp_path, seed=seed)
        names = (spec(path, tau=0.6), f"reference:block=8,steps={steps}")
        out = run(model, [prompt], *names, max_tokens=length)[0]
        made = load_filter(path, 8, "tiny")
        assert (list(out.tokens), out.usage.forwards) == plain(model, made, prompt, length, 0.6, quota)
        few += out.usage.forwards < (steps or length)
    assert few > 1, "the filters should save some forwards"


@pytest.mark.parametrize("model", [MODEL, SHIFTED], ids=["full", "shifted"])
def test_a_filter_that_is_never_sure_enough_changes_nothing(tmp_path, model):
    path = written(tmp_path, bias=50.0)
    for names in (("reference:block=8",), ("reference:block=8,steps=9",), ("reference:block=8", "canvas-cache")):
        for one, two in zip(
            run(model, prompts(3), *names), run(model, prompts(3), *names, spec(path, tau=1, eotp="off")), strict=True
        ):
            assert (one.tokens, one.usage.forwards) == (two.tokens, two.usage.forwards)


def test_a_filter_that_is_a_threshold_is_the_threshold(tmp_path):
    path = threshold(tmp_path, 0.2)
    for model in (MODEL, BLOCKS):
        names = () if model is BLOCKS else ("reference:block=8",)
        one = run(model, prompts(4), "threshold:tau=0.2", *names)
        two = run(model, prompts(4), spec(path, tau=0.96, eotp="off"), *names)
        assert [out.tokens for out in one] == [out.tokens for out in two]
        assert [out.usage.forwards for out in one] == [out.usage.forwards for out in two]


@settings(max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 20), st.floats(0.1, 0.9))
def test_windows_of_any_length_go_through_in_pieces(tmp_path_factory, seed, length, tau):
    path = written(tmp_path_factory.getbasetemp(), seed=seed % 7)
    made = policy(MODEL, spec(path, tau=tau, eotp="off"), "reference:block=20")
    row = made.begin(made.open(Request((5,), SamplingParams(max_tokens=length)), MODEL.capabilities), None)
    logits = torch.randn(length, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    logits[:, MASK] = -torch.inf
    view = _view(row, Forward(logits, torch.arange(1, length + 1)))
    view.x0, view.prob = made.scorer.draw(view, row)
    view.score = -view.prob  # what other methods do to scores is not the filter's concern
    says = made.selectors[0].final(view)
    made_filter = load_filter(path, 8, "tiny")
    c = torch.cat((logits.softmax(-1).amax(-1), torch.zeros(-length % 8)))
    expected = torch.cat([made_filter(c[i : i + 8]).sigmoid() for i in range(0, len(c), 8)])[:length]
    clear = (expected - tau).abs() > 1e-4
    assert torch.equal(says[clear], (expected > tau)[clear])


def test_ragged_batches_are_their_rows_alone(tmp_path):
    path = written(tmp_path, seed=1)
    for model, cache in ((MODEL, ()), (MODEL, ("canvas-cache",)), (BLOCKS, ())):
        blocks = () if model is BLOCKS else ("reference:block=8",)
        for eotp, temperature in (("filter", 0.0), ("eager", 0.8)):
            names, more = (spec(path, tau=0.5, eotp=eotp), *cache, *blocks), {"ignore_eos": False}
            many = prompts(2, seed=9)
            together = run(model, many, *names, temperature=temperature, **more)
            for prompt, out in zip(many, together, strict=True):
                alone = run(model, [prompt], *names, temperature=temperature, **more)[0]
                assert (alone.tokens, alone.usage.forwards) == (out.tokens, out.usage.forwards)


# --- end of text ---


def test_a_canvas_is_cut_where_the_text_ends(tmp_path):
    path = threshold(tmp_path, 0.9)
    for prompt in tasks(3, longest=10):
        right = answer(prompt, 64)[: prompt[-1] + 1]
        used = {}
        for eotp in ("off", "committed", "filter", "eager"):
            out = run(
                SCRIPTED, [prompt], spec(path, tau=0.9, eotp=eotp), "reference:block=8", max_tokens=64, ignore_eos=False
            )[0]
            used[eotp] = out.usage.computed_tokens
            if eotp != "eager":
                assert list(out.tokens) == right
        assert used["eager"] <= used["off"] / 2
        assert used["filter"] <= used["off"]


def test_an_eager_cut_takes_the_surest_end_and_a_trusted_one_the_first(tmp_path):
    path = threshold(tmp_path, 0.9)
    logits = torch.full((40, VOCAB), -8.0)
    logits[:, MASK] = -torch.inf
    logits[:, 7] = -4.0
    for offset, height in ((12, 5.0), (20, 9.0), (30, 7.0)):
        logits[offset, EOS] = height
    seen = Forward(logits, torch.arange(1, 41))

    def end(eotp: str, **more: object) -> int:
        made = policy(SCRIPTED, spec(path, tau=0.9, eotp=eotp), "reference:block=8")
        sampling = SamplingParams(max_tokens=40, **more)
        row = made.begin(made.open(Request((5,), sampling), SCRIPTED.capabilities), None)
        return made.advance(row, seen).row.end - 1

    assert (end("off"), end("committed"), end("filter"), end("eager")) == (40, 40, 40, 21)
    logits[5, EOS], logits[3, EOS] = 12.0, 13.0  # in the block: the filter trusts both
    assert (end("committed"), end("filter"), end("eager")) == (40, 4, 4)
    assert end("eager", ignore_eos=True) == 40
    logits[:3, EOS] = 20.0  # final from the first position on
    assert end("committed") == 1


def test_a_canvas_never_grows(tmp_path):
    path = written(tmp_path, seed=2, bias=1.0)
    made = policy(MODEL, spec(path, tau=0.5, eotp="eager"), "reference:block=8")
    for prompt in prompts(3, seed=4):
        row = made.begin(made.open(Request(tuple(prompt), SamplingParams(max_tokens=32)), MODEL.capabilities), None)
        while row.left:
            logits = MODEL.logits(row.tokens)
            logits[:, EOS] += 2
            taken = made.advance(row, Forward(logits, torch.arange(len(logits)))).row
            assert row.window[0] < taken.end <= row.end
            row = taken


def test_slots_of_a_template_are_not_cut(tmp_path):
    made = policy(SCRIPTED, spec(written(tmp_path), eotp="eager"), "reference:block=8")
    request = Request((5, 4, 9, 3), template=(-1,) * 6 + (11,) + (-1,) * 6)
    out = Engine(SCRIPTED, cache_bytes=1_000_000).run([(request, Parts(canvas=made))])[0][0]
    assert len(out.tokens) == 13
    assert out.tokens[6] == 11


# --- files ---


def test_the_filter_has_two_square_maps(tmp_path):
    assert sum(p.numel() for p in Filter(32).parameters()) == 2 * 32**2 + 2 * 32 == 2112
    made = load_filter(written(tmp_path), 8, "tiny")
    assert not any(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"target": "other"}, ConfigError, "target 'other'"),
        ({"block": "16"}, ConfigError, "block '16'"),
        ({"score": "margin"}, ConfigError, "score 'margin'"),
        ({"hasten": "feature-drafter"}, FormatError, "no filter"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, change, kind, words):
    facts = {"hasten": "parallel-filter", "target": "tiny", "block": "8", "score": "prob", **change}
    path = tmp_path / "other.safetensors"
    save_file({n: p.detach().clone() for n, p in Filter(8).named_parameters()}, path, facts)
    with pytest.raises(kind, match=words):
        policy(MODEL, spec(str(path)))


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read"):
        policy(MODEL, spec(str(path)))
    facts = {"hasten": "parallel-filter", "target": "tiny", "block": "8", "score": "prob"}
    whole = {n: p.detach().clone() for n, p in Filter(8).named_parameters()}
    for state in ({**whole, "more": torch.zeros(1)}, {"first.weight": torch.zeros(8, 8)},
                  {**whole, "second.bias": torch.full((8,), torch.nan)}):  # fmt: skip
        save_file(state, path, facts)
        with pytest.raises(FormatError, match="finite weights"):
            policy(MODEL, spec(str(path)))


def test_without_a_filter_the_way_to_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="hasten train learn2pd tiny"):
        policy(MODEL, "learn2pd")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="block '8'"):
        policy(MODEL, spec(written(tmp_path), block=16))


@pytest.mark.parametrize(
    ("knobs", "field"),
    [({"tau": 0}, "learn2pd.tau"), ({"tau": 1.1}, "learn2pd.tau"), ({"eotp": "on"}, "learn2pd.eotp"), ({"block": 0}, "learn2pd.block")],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(tmp_path, knobs, field):
    with pytest.raises(ConfigError) as caught:
        policy(MODEL, spec(written(tmp_path), **knobs))
    assert caught.value.field == field


def test_a_model_without_an_end_token_is_not_cut(tmp_path):
    endless = Masked()
    endless.capabilities = dataclasses.replace(endless.capabilities, eos_ids=())
    with pytest.raises(ConfigError, match="no end token"):
        policy(endless, spec(written(tmp_path)))
    assert policy(endless, spec(written(tmp_path), eotp="off")).stops == ()
