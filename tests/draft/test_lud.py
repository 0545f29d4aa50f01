"""LUD: lossless for any inputs, threshold and span; trusting, it commits k + 1 tokens a pass and says that it is lossy."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from ahead import by_hand, inputs, maps, requests, stored, texts, trained_texts
from drafters import Clock
from feature_layers import context, saved
from hypothesis import given
from hypothesis import strategies as st

from hasten.draft.lud import Config, Lud
from hasten.engine.contracts import Feedback, LogitsRule, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.engine.sampling import draw, uniform
from hasten.errors import ConfigError, FormatError, IncompatibleError
from hasten.models.pseudo import TrainedInputs, load_inputs
from hasten.train import ahead
from hasten.types import Request, SamplingParams
from hasten.union import Union

SAMPLINGS = {"greedy": {}, "sampled": {"temperature": 0.7, "top_p": 0.9}}


def drafter(folder, engine, guesser=None, **settings) -> Lud:
    made = guesser or inputs(engine.backbone)
    return Lud(Config(stored(folder, made, engine.backbone), **{"beta": 0.0, **settings}), context(engine))


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
@pytest.mark.parametrize("places", ["ends", "all"])
@pytest.mark.parametrize(("config", "batch"), [("plain", 1), ("plain", 4), ("windowed", 5), ("normed", 2)])
def test_lossless_text_is_that_of_plain_decoding(tmp_path, sampling, places, config, batch):
    engine = tiny.engine(tiny.CONFIGS[config], rows=batch)
    asked = requests(5, **SAMPLINGS[sampling])
    plain = texts(engine, None, asked)
    for settings in ({}, {"beta": 0.3, "k": 2}):
        own = drafter(tmp_path, engine, places=places, **settings)
        assert texts(engine, own, asked, budget=12) == plain
        assert not own._ahead
    assert texts(engine, own, asked, budget=12, measured=True) == plain
    assert engine.scheduler.pool.used_bytes == 0


@pytest.mark.parametrize("mode", ["lossless", "trust"])
@pytest.mark.parametrize("settings", [{"beta": 1.5}, {"k": 0}])
def test_without_spans_it_is_plain_decoding_pass_by_pass(tmp_path, mode, settings):
    engine = tiny.engine()
    own = drafter(tmp_path, engine, mode=mode, **settings)
    [request] = requests(1)
    plain = engine.run([(request, PLAIN)])[0][0]
    none = engine.run([(request, Parts(own, budget=4))])[0][0]
    assert none.tokens == plain.tokens
    assert (none.usage.forwards, none.usage.computed_tokens) == (plain.usage.forwards, plain.usage.computed_tokens)


def test_a_span_is_the_leading_confident_guesses_of_the_dense_form(tmp_path):
    engine = tiny.engine()
    own = drafter(tmp_path, engine)
    ids = torch.arange(3, 15)
    final = by_hand(engine.backbone, own.inputs, ids, 11, 3)
    shares = engine.backbone.logits(final).softmax(-1)
    best, confident = shares.argmax(-1).tolist(), shares.amax(-1).tolist()
    row = RowView(1, [*ids.tolist(), 7], 9, 0.0, 0)
    for beta in (0.0, *(value - 1e-4 for value in confident), *(value + 1e-4 for value in confident)):
        drafting = drafter(tmp_path, engine, own.inputs, beta=beta)
        drafting.observe([Feedback(1, (0,), (14,), (), 7, pseudo=final)])
        [draft] = drafting.propose([row], [9])
        m = next((i for i, value in enumerate(confident) if value < beta), 3)
        assert draft.tokens == tuple(best[:m])
        assert draft.parents == tuple(range(-1, m - 1))
        if m:
            assert draft.scores == pytest.approx(confident[:m], rel=1e-3)
    drafting.observe([Feedback(1, (0,), (14,), (), 7)])  # the tip had no placeholders
    assert not len(drafting.propose([row], [9])[0])


def test_trusting_it_commits_its_spans_and_reads_on_from_a_clean_cache(tmp_path):
    engine = tiny.engine()
    own = drafter(tmp_path, engine, mode="trust")

    [request] = [Request((5, 9, 2, 7), SamplingParams(max_tokens=33, ignore_eos=True))]
    out = engine.run([(request, Parts(own, budget=8))])[0][0]
    assert out.usage.accepted_tokens == out.usage.drafted_tokens > 0
    # every token that was not part of a span is what the model says after the text so far: the cache held nothing else
    with torch.no_grad():
        text = [*request.prompt, *out.tokens]
        says = engine.backbone(torch.tensor([text]))[0].argmax(-1).tolist()
    engine.add(request, Parts(own, budget=8))
    engine.step()
    row, at = engine.scheduler.running[0], len(request.prompt)
    while not engine.idle:
        row = engine.scheduler.running[0]
        assert row.cache.length == len(row.tokens) - 1
        assert row.tokens == text[: len(row.tokens)]
        assert row.tokens[-1] == says[len(row.tokens) - 2]
        with torch.no_grad():
            fresh = read_all(engine.backbone, row.tokens[:-1])
        held = row.cache.slab[:, :, :, : row.cache.length]
        assert torch.allclose(held, fresh, atol=1e-4)
        at += 1
        engine.step()


def read_all(target, tokens):
    from ahead import read

    cache, _ = read(target, torch.tensor(tokens))
    return cache.slab[:, :, :, : cache.length]


def passes(engine, own, asked) -> tuple[int, list[tuple[int, ...]]]:
    outs = [outs[0] for outs in engine.run([(one, Parts(own, budget=8)) for one in asked])]
    return sum(out.usage.forwards for out in outs), [out.tokens for out in outs]


def test_tokens_per_pass_do_not_grow_with_beta_and_reach_k_plus_1(tmp_path):
    engine = tiny.engine()
    final = torch.randn(3, 48, generator=torch.Generator().manual_seed(4))
    row, spans = RowView(1, [1, 2, 3], 9, 0.0, 0), []
    for beta in (0.0, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 1.0):
        own = drafter(tmp_path, engine, mode="trust", beta=beta)
        own.observe([Feedback(1, (0,), (2,), (), 3, pseudo=final)])
        spans.append(len(own.propose([row], [8])[0]))
    assert spans == sorted(spans, reverse=True)
    assert spans[0] == 3
    assert spans[-1] == 0
    # guesses that repeat nothing: three different tokens whatever comes before
    own = drafter(tmp_path, engine, mode="trust")
    own.inputs.logits = lambda final: torch.eye(tiny.VOCAB)[[40, 41, 42]].expand(len(final), -1, -1) * 9
    count, _ = passes(engine, own, [Request((5, 9), SamplingParams(max_tokens=41, ignore_eos=True))])
    assert count == 10  # 40 tokens after the first, four at a time


def test_trust_stops_at_repeats(tmp_path):
    engine = tiny.engine()
    own = drafter(tmp_path, engine, mode="trust")

    def span(tokens: list[int], guesses: list[int]) -> tuple[int, ...]:
        return own._span(RowView(1, tokens, 9, 0.0, 0), torch.eye(tiny.VOCAB)[guesses] * 9).tokens

    assert span([1, 2, 3], [4, 5, 6]) == (4, 5, 6)
    assert span([1, 2, 3], [3, 5, 6]) == ()
    assert span([1, 2, 3], [4, 4, 6]) == (4,)
    assert span([4, 5, 4], [5, 6, 7]) == ()
    assert span([1, 2, 3], [2, 3, 2]) == (2,)


class Without(LogitsRule):
    """Forbids one token."""

    name = "without"

    def __init__(self, token: int) -> None:
        self.token = token

    def open(self, prompt, max_tokens):
        return None

    def apply(self, state, logits):
        return logits.index_fill(0, torch.tensor([self.token]), -torch.inf)

    def advance(self, state, token):
        return None

    def forced(self, state):
        return ()


def test_trust_obeys_rules_and_end_tokens(tmp_path):
    engine = tiny.engine()
    own = drafter(tmp_path, engine, mode="trust")
    own.inputs.logits = lambda final: torch.eye(tiny.VOCAB)[[40, 41, 42]].expand(len(final), -1, -1) * 9
    request = Request((5, 9), SamplingParams(max_tokens=20, ignore_eos=True))
    free = engine.run([(request, Parts(own, budget=8))])[0][0].tokens
    ruled = engine.run([(request, Parts(own, (Without(41),), budget=8))])[0][0].tokens
    assert 41 in free
    assert 41 not in ruled
    assert 40 in ruled
    stopped = engine.run([(Request((5, 9), SamplingParams(max_tokens=20, stop_ids=(41,))), Parts(own, budget=8))])[0][0]
    assert stopped.tokens == free[: free.index(41) + 1]
    assert stopped.finish_reason == "stop"


def test_trust_and_temperature_need_a_word(tmp_path):
    engine = tiny.engine()
    warm = requests(1, temperature=0.8)[0]
    with pytest.raises(ConfigError, match=r"temperature = 0\.8 with drafts that nobody verifies"):
        engine.add(warm, Parts(drafter(tmp_path, engine, mode="trust"), budget=4))
    own = drafter(tmp_path, engine, mode="trust", sampled=True)
    assert texts(engine, own, [warm], budget=4) == texts(engine, own, [warm], budget=4)
    final = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    [draft] = (
        own.observe([Feedback(1, (0,), (2,), (), 3, pseudo=final)]),
        own.propose([RowView(1, [1, 2, 3], 9, 0.8, 7)], [1]),
    )[1]
    share = (own.inputs.logits(final)[0] / 0.8).softmax(-1)
    assert draft.tokens == (draw(share, uniform(7, 3)),)
    other = drafter(tmp_path, engine)
    with pytest.raises(IncompatibleError, match="nobody verifies drafts of 'lud'"):
        Union([own, other])
    assert texts(engine, other, [warm], budget=4) == texts(engine, None, [warm])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1.2), st.integers(1, 6))
def test_units_hold_while_the_model_is_sure(confidence, alpha, most):
    told = torch.tensor(confidence, dtype=torch.float64)
    lengths = ahead.units(told, alpha, most)
    assert torch.equal(lengths, ahead.units(told, alpha, most))
    for start, length in enumerate(lengths.tolist()):
        assert 1 <= length <= most
        assert all(value >= alpha for value in confidence[start + 1 : start + length])
        end = start + length
        assert length == most or end == len(confidence) or confidence[end] < alpha  # maximal


def test_marking_is_that_of_the_model():
    engine = tiny.engine()
    told = [torch.arange(3, 23), torch.arange(40, 49)]
    for ids, sure in zip(told, ahead.confidences(engine.backbone, told), strict=True):
        with torch.no_grad():
            want = engine.backbone(ids[None])[0].softmax(-1)
        assert torch.allclose(sure[1:], want[torch.arange(len(ids) - 1), ids[1:]], atol=1e-5)
        assert float(sure[0]) == 1.0
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="alpha"):
            ahead.units(sure, alpha, 3)


@pytest.mark.parametrize("kind", ["inputs", "maps"])
@pytest.mark.parametrize("config", list(tiny.CONFIGS))
def test_training_sees_what_decoding_will(kind, config):
    target = tiny.model(tiny.CONFIGS[config])
    guesser = inputs(target) if kind == "inputs" else maps(target, (0, 1, 2))
    told, anchors = [torch.arange(3, 15), torch.arange(30, 37)], [torch.tensor([0, 4, 9]), torch.tensor([5])]
    real, guessed = ahead.states(target, guesser, told, anchors)
    for ids, final, mine, places in zip(told, real, guessed, anchors, strict=True):
        with torch.no_grad():
            assert torch.allclose(target.logits(final), target(ids[None])[0], atol=1e-4)
        for j, anchor in enumerate(places.tolist()):
            assert torch.allclose(mine[j], by_hand(target, guesser, ids, anchor, 3), atol=1e-4)


def test_trained_it_saves_passes_at_little_loss(tmp_path, monkeypatch):
    engine, told = trained_texts()
    target = engine.backbone
    learnt, held = told.split(8)
    whole = TrainedInputs(target, torch.arange(tiny.VOCAB), 3, 4, 8).reset(target)
    config = ahead.Config(steps=120, tokens=300, lr=5e-3, warmup=5, share=1.0, outside=0.5)
    data = ahead.Marked(learnt, target, whole, config, True)
    assert any(int(unit.max()) == 4 for _, _, unit in data)
    last = ahead.Marked(held, target, whole, config, False)
    before = ahead.agreement(target, whole, last)
    ahead.fit(whole, target, data, config)
    assert ahead.agreement(target, whole, last)[0] > before[0] + 0.5
    Clock(monkeypatch, engine, lambda tokens: 1.0)  # the real one would choose how much of a span is trusted
    asked = [Request(tuple(ids[:4].tolist()), SamplingParams(max_tokens=25, ignore_eos=True)) for ids, _ in told.each()]
    plain = texts(engine, None, asked)
    count, trusted = passes(engine, drafter(tmp_path, engine, whole, mode="trust", beta=0.9), asked)
    assert count <= 0.8 * 24 * len(asked)
    assert sum(a != b for a, b in zip(trusted, plain, strict=True)) <= 0.03 * len(asked)
    untrained = TrainedInputs(target, torch.arange(tiny.VOCAB), 3, 4, 8).reset(target)
    assert passes(engine, drafter(tmp_path, engine, untrained, mode="trust", beta=0.9), asked)[0] > 0.8 * 24 * len(asked)


def test_a_cut_training_goes_on_as_if_it_had_not_been(tmp_path):
    engine, told = trained_texts()
    target = engine.backbone
    config = ahead.Config(steps=8, tokens=120, lr=5e-3, warmup=2)

    def fresh() -> TrainedInputs:
        return TrainedInputs(target, torch.arange(tiny.VOCAB), 2, 2, 4).reset(target)

    class Stop(Exception):
        pass

    def stop(step, value, agreement):
        if step == 5:
            raise Stop

    whole, again = fresh(), fresh()
    data = ahead.Marked(told, target, whole, config, True)
    ahead.fit(whole, target, data, config)
    with pytest.raises(Stop):
        ahead.fit(fresh(), target, data, config, checkpoint=tmp_path / "c", every=3, report=stop)
    ahead.fit(again, target, data, config, checkpoint=tmp_path / "c", every=3)
    for (name, one), (_, other) in zip(whole.trained(), again.trained(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name
    with pytest.raises(ConfigError, match="was made with"):
        ahead.fit(fresh(), target, data, dataclasses.replace(config, lr=1e-3), checkpoint=tmp_path / "c")
    for knobs in ({"share": 0.0}, {"share": 1.5}, {"outside": 1.1}, {"alpha": float("nan")}, {"steps": 0}):
        with pytest.raises(ConfigError, match=next(iter(knobs))):
            dataclasses.replace(config, **knobs)


def test_wrong_files_and_settings_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    engine = tiny.engine()
    target = engine.backbone
    path = stored(tmp_path, inputs(target), target)
    assert load_inputs(path, target).count == 3
    with pytest.raises(ConfigError, match="trained for model"):
        load_inputs(path, tiny.model(seed=3))
    with pytest.raises(ConfigError, match="kind 'eagle', not 'lud'"):
        load_inputs(saved(tmp_path, "eagle", target), target)
    with pytest.raises(ConfigError, match="kind 'hidden-transfer', not 'lud'"):
        load_inputs(stored(tmp_path, maps(target), target), target)
    with pytest.raises(ConfigError, match="no weights of 'lud'"):
        Lud(Config(), context(engine))
    with pytest.raises(ConfigError, match="at most the 3 inputs"):
        Lud(Config(path, k=4), context(engine))
    nan, inf = float("nan"), float("inf")
    for knobs in ({"k": -1}, {"beta": -0.1}, {"beta": nan}, {"beta": inf}, {"mode": "lossy"}, {"places": "root"}):
        with pytest.raises(ConfigError, match=f"lud.{next(iter(knobs))}"):
            Config(**knobs)
    with safe_open(path, "pt") as file:
        facts, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(state, tmp_path / "bad.safetensors", {**facts, "rank": "x"})
    with pytest.raises(FormatError, match="rank and beside"):
        load_inputs(tmp_path / "bad.safetensors", target)
    state.pop("inputs"), state.pop("inputs.scale")
    save_file(state, tmp_path / "bad.safetensors", facts)
    with pytest.raises(FormatError, match="missing inputs"):
        load_inputs(tmp_path / "bad.safetensors", target)
    for rank in (0, 5000):
        with pytest.raises(ConfigError, match="rank"):
            TrainedInputs(target, torch.arange(9), 2, rank, 4)
