"""EOSER and ASS: schedules in numbers, scores against the formula, canvases against a plain loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from canvases import EOS, MASK, Masked, policy, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engine.engine import Engine, Parts
from hasten.engine.parts import Forward
from hasten.errors import ConfigError, IncompatibleError
from hasten.policy import _view
from hasten.types import Event, Request, SamplingParams
from hasten.unmask.eoser_ass import doubling, geometric
from hasten.unmask.reference import even

MODEL = Masked()


def layout(length: int, **knobs: object) -> list[tuple[int, tuple[int, ...]]]:
    """(size, quotas) of every block of a canvas, without a model."""
    made = policy(MODEL, "eoser-ass:" + ",".join(f"{key}={value}" for key, value in knobs.items()))
    caps = dataclasses.replace(MODEL.capabilities, max_len=1000)
    row = made.open(Request((5, 6), SamplingParams(max_tokens=length)), caps)
    out = []
    while row.window[1] < row.end:
        row = made.begin(row, None)
        low, high = row.window
        out.append((high - low, row.quotas))
        accepted = row.accepted.clone()
        accepted[low:high] = True
        row = dataclasses.replace(row, accepted=accepted)
    return out


def test_the_published_tables():
    assert layout(128) == [(128, (1, 2, 4, 8, 16, 32, 65))]
    assert layout(256) == [(256, (1, 2, 4, 8, 16, 32, 64, 129))]
    assert layout(128, blocks=4) == [(15, (1, 2, 4, 8)), (16, (16,)), (32, (32,)), (65, (65,))]


@pytest.mark.parametrize("length", [2, 16, 100, 127, 128, 129, 256, 500])
def test_all_layouts_take_log2_of_the_length(length):
    steps = length.bit_length() - 1
    for blocks in range(1, steps + 1):
        found = layout(length, blocks=blocks)
        quotas = [quota for _, one in found for quota in one]
        assert len(found) == blocks
        assert (len(quotas), sum(quotas), min(quotas) >= 1) == (steps, length, True)
        assert all(size == sum(one) for size, one in found)


@given(st.integers(1, 600), st.integers(1, 40), st.floats(0.3, 4.0))
def test_any_ratio_gives_quotas_that_sum_up(count, steps, ratio):
    quotas = geometric(count, steps, ratio)
    assert (sum(quotas), min(quotas) >= 1, len(quotas)) == (count, True, min(steps, count))
    assert geometric(count, steps, 1.0) == even(count, min(steps, count))
    assert sum(doubling(count, steps)) == count


@pytest.mark.parametrize("length", [128, 256])
def test_ratio_two_is_the_published_doubling(length):
    assert geometric(length, length.bit_length() - 1, 2.0) == doubling(length, length.bit_length() - 1)


def factor(step: int, steps: int, ass: bool, low: float, high: float) -> float:
    share = 1.0 if steps == 1 else (2 ** (step + 1) - 1) / 2**steps if ass else step / (steps - 1)
    return low + (high - low) * share


def plain(
    model: Masked, prompt: list[int], length: int, quotas: list[tuple[int, int, int]], low: float, ass: bool
) -> list[int]:
    """Commits `quotas` [(start, end, count)] by the score that holds end tokens back, T = 0."""
    x, n = [*prompt, *[MASK] * length], len(prompt)
    for step, (start, end, count) in enumerate(quotas):
        probs = model.logits(x).softmax(-1).max(-1)
        scale = torch.tensor(factor(step, len(quotas), ass, low, 1.0))
        score = {
            i: float(probs.values[i] * (scale if int(probs.indices[i]) == EOS else 1)) for i in range(n + start, n + end)
        }
        ranked = sorted((i for i in score if x[i] == MASK), key=lambda i: -score[i])
        for i in ranked[:count]:
            x[i] = int(probs.indices[i])
    return x[n:]


def flooded(seed: int = 3, push: float = 4.0) -> Masked:
    """A model that wants end tokens nearly everywhere."""
    model = Masked(seed=seed)
    inner = model.stack.run

    def pushed(rows, needs=None):
        done = inner(rows)
        return dataclasses.replace(done, logits=done.logits + push * (torch.arange(97) == EOS))

    model.stack.run = pushed
    model.run = pushed
    return model


FLOODED = flooded()


@pytest.mark.parametrize("model", [MODEL, FLOODED], ids=["plain", "flooded"])
def test_a_canvas_is_the_plain_loop(model):
    for prompt in prompts(4, seed=3):
        out = run(model, [prompt], "eoser-ass", max_tokens=37)[0]
        counts = [1, 2, 4, 8, 22]
        assert list(out.tokens) == plain(model, prompt, 37, [(0, 37, count) for count in counts], 0.01, True)
        assert out.usage.forwards == 5
        out = run(model, [prompt], "eoser-ass:blocks=3", max_tokens=37)[0]
        steps = [(0, 7, 1), (0, 7, 2), (0, 7, 4), (7, 15, 8), (15, 37, 22)]
        assert list(out.tokens) == plain(model, prompt, 37, steps, 0.01, True)
        out = run(model, [prompt], "eoser-ass:ass=false", "reference:block=12,steps=6", max_tokens=24)[0]
        assert list(out.tokens) == plain(model, prompt, 24, [(0, 12, 4)] * 3 + [(12, 24, 4)] * 3, 0.4, False)


def test_factors_of_one_change_nothing():
    for model in (MODEL, FLOODED):
        many = prompts(3)
        for names in (("reference:steps=8,block=12",), ("threshold:tau=0.2",), ("reference:score=entropy",)):
            plain_ = run(model, many, *names)
            held = run(model, many, *names, "eoser-ass:ass=false,low=1")
            assert [one.tokens for one in plain_] == [one.tokens for one in held]
            assert [one.usage.forwards for one in plain_] == [one.usage.forwards for one in held]


def committed(model: Masked, prompt: list[int], *names: str, **sampling: object) -> list[list[int]]:
    """Tokens of each step."""
    events: list[Event] = []
    run(model, [prompt], *names, events=events, **sampling)
    steps: dict[int, list[int]] = {}
    for event in events:
        if event.kind == "commit":
            steps.setdefault(event.step, []).append(event.token)
    return list(steps.values())


def test_end_tokens_come_late_in_a_flooded_model():
    early = {False: 0, True: 0}
    for prompt in prompts(6, seed=1):
        for held in (False, True):
            names = ("eoser-ass:ass=false,low=0.01",) if held else ()
            tokens = [t for step in committed(FLOODED, prompt, "reference:block=32", *names, max_tokens=32) for t in step]
            early[held] += tokens[:16].count(EOS)
    assert early[True] <= early[False] / 2


def test_a_factor_of_zero_takes_no_end_token_first():
    for prompt in prompts(6, seed=2):
        first = committed(FLOODED, prompt, "eoser-ass:low=0", max_tokens=24)[0]
        best = FLOODED.logits([*prompt, *[MASK] * 24])[len(prompt) :].argmax(-1)
        assert (EOS in first) == bool((best == EOS).all())


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(["prob", "entropy", "margin"]))
def test_scores_of_end_tokens_fall_and_no_other_changes(seed, score):
    made = policy(MODEL, "eoser-ass:ass=false,low=0.2", f"reference:score={score}")
    row = made.begin(made.open(Request((5,), SamplingParams(max_tokens=12)), MODEL.capabilities), None)
    logits = torch.randn(12, 97, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, EOS] += 6
    seen = Forward(logits, torch.arange(1, 13))
    view = _view(row, seen)
    view.x0, view.prob = made.scorer.draw(view, row)
    view.score = view.prob
    after = made.scores[0].rescore(view, row)
    ends = view.x0 == EOS
    assert torch.equal(after[~ends], view.prob[~ends])
    assert bool((after[ends] <= view.prob[ends]).all())
    last = made.scores[0].rescore(view, dataclasses.replace(row, global_step=11))
    assert torch.equal(last, view.prob)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_ragged_batch_is_its_rows_alone(temperature):
    many = prompts(4, seed=9)
    for names in (
        ("eoser-ass",),
        ("eoser-ass:blocks=2", "threshold:tau=0.3"),
        ("eoser-ass:ratio=1.5,steps=7", "canvas-cache"),
    ):
        together = run(FLOODED, many, *names, temperature=temperature)
        for prompt, out in zip(many, together, strict=True):
            alone = run(FLOODED, [prompt], *names, temperature=temperature)[0]
            assert (alone.tokens, alone.usage.forwards) == (out.tokens, out.usage.forwards)


def test_every_position_is_committed_once_in_the_planned_steps():
    for names, steps in (("eoser-ass", [1, 2, 4, 17]), ("eoser-ass:ratio=1,steps=5", [5, 5, 5, 5, 4])):
        assert [len(step) for step in committed(MODEL, [5, 6], names, max_tokens=24)] == steps
    with_more = committed(MODEL, [5, 6], "eoser-ass", "threshold:tau=0.1", max_tokens=24)
    assert sum(map(len, with_more)) == 24
    assert len(with_more) <= 4


def test_fixed_text_in_the_canvas_takes_no_quota():
    template = (-1, 11, 12, -1, -1, -1, 13, -1, -1, -1)
    for names in ("eoser-ass", "eoser-ass:blocks=2"):
        made = policy(MODEL, names)
        request = Request((5, 6), SamplingParams(ignore_eos=True), template=template)
        out = Engine(MODEL, cache_bytes=8_000_000).run([(request, Parts(canvas=made))])[0][0]
        assert [out.tokens[i] for i in (1, 2, 6)] == [11, 12, 13]
        assert MASK not in out.tokens
        assert out.usage.forwards <= 2 + (names != "eoser-ass")


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ("eoser=false,ass=false", "eoser-ass.eoser"),
        ("blocks=0", "eoser-ass.blocks"),
        ("blocks=5", "eoser-ass.blocks"),  # a canvas of 24 takes 4 steps
        ("blocks=2,ratio=2", "eoser-ass.blocks"),
        ("steps=-1", "eoser-ass.steps"),
        ("steps=8", "eoser-ass.steps"),
        ("steps=25,ratio=1", "eoser-ass.steps"),
        ("ratio=-1", "eoser-ass.ratio"),
        ("ratio=nan", "eoser-ass.ratio"),
        ("low=1.5", "eoser-ass.low"),
        ("low=0.5,high=0.4", "eoser-ass.high"),
        ("high=1.1", "eoser-ass.high"),
        ("ids=x", "eoser-ass.ids"),
        ("ids=97", "eoser-ass.ids"),
    ],
)
def test_bad_settings_are_refused_by_name(knobs, field):
    with pytest.raises(ConfigError) as caught:
        run(MODEL, [[5]], f"eoser-ass:{knobs}")
    assert caught.value.field == field


def test_a_canvas_of_one_and_models_it_is_not_for_are_refused():
    with pytest.raises(ConfigError, match="at least 2"):
        run(MODEL, [[5]], "eoser-ass", max_tokens=1)
    with pytest.raises(IncompatibleError, match="trained on blocks"):
        policy(Masked(block=8), "eoser-ass")
    policy(Masked(block=8), "eoser-ass:ass=false")
    with pytest.raises(IncompatibleError, match="one planner"):
        policy(MODEL, "eoser-ass", "reference:block=8")
    endless = Masked()
    endless.capabilities = dataclasses.replace(endless.capabilities, eos_ids=())
    with pytest.raises(ConfigError, match="no end token"):
        policy(endless, "eoser-ass")
    turns = Masked()
    turns.capabilities = dataclasses.replace(turns.capabilities, eos_ids=(0, 4), eot_id=4)
    assert policy(turns, "eoser-ass").scores[0].ids.tolist() == [0]
    assert policy(turns, "eoser-ass:ids=0.4").scores[0].ids.tolist() == [0, 4]
