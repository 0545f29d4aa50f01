"""Credits against their definition: closed forms, scripted streams, and the two stores against each other."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from canvases import MASK, Masked, policy, prompts, run, view_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import ConfigError
from hasten.unmask.creditdecoding import Config, CreditDecoding, Credits

MODEL = Masked()


def stream(stage: CreditDecoding, logits: Tensor, open_: Tensor) -> tuple[list[Tensor], Credits]:
    """What the stage makes of logits [steps, W, V] where `open_` [steps, W], and its history after."""
    out, history = [], None
    for one, flags in zip(logits, open_):
        view, row = view_of([0.5] * len(flags), flags)
        view.logits = view.changed = one
        history, fused = stage.apply(history, view, row)
        out.append(fused)
    return out, history


def definition(logits: Tensor, open_: Tensor, config: Config) -> list[Tensor]:
    """The published rule, position by position, with a dictionary each."""
    out, credit = [], [{} for _ in range(logits.shape[1])]
    for one, flags in zip(logits, open_):
        fused = one.clone()
        for i, held in enumerate(credit):
            for token in held:
                held[token] *= config.decay
            probs = one[i].softmax(-1)
            if flags[i]:
                best = int(probs.argmax())
                held[best] = held.get(best, 0.0) + float(probs[best]) ** config.exponent
            for token, value in held.items():
                fused[i, token] += config.fusion * math.log1p(value)
        out.append(fused)
    return out


@given(seed=st.integers(0, 2**20), steps=st.integers(1, 12), decay=st.floats(0, 0.95), exponent=st.floats(0.1, 2))
@settings(max_examples=40, deadline=None)
def test_both_stores_are_the_definition(seed, steps, decay, exponent):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(steps, 5, 6, generator=generator)
    open_ = torch.rand(steps, 5, generator=generator) < 0.8
    for store in ("sparse", "dense"):
        config = Config(decay=decay, exponent=exponent, store=store, slots=6)
        fused, history = stream(CreditDecoding(config, None), logits, open_)
        for one, other in zip(fused, definition(logits, open_, config)):
            assert torch.allclose(one.softmax(-1), other.softmax(-1), atol=1e-6)
        assert history.lost == 0


def test_eight_slots_are_enough_until_a_ninth_token_was_best():
    generator = torch.Generator().manual_seed(0)
    logits, open_ = torch.randn(8, 4, 500, generator=generator), torch.ones(8, 4, dtype=torch.bool)
    dense, _ = stream(CreditDecoding(Config(store="dense"), None), logits, open_)
    sparse, history = stream(CreditDecoding(Config(), None), logits, open_)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(dense, sparse))
    assert history.lost == 0
    assert (history.ids.nbytes + history.values.nbytes) / 4 < 1024
    more = torch.cat((logits, torch.randn(4, 4, 500, generator=generator)))
    assert stream(CreditDecoding(Config(), None), more, torch.ones(12, 4, dtype=torch.bool))[1].lost > 0
    least = stream(CreditDecoding(Config(slots=1), None), logits, open_)[1]
    assert torch.equal(least.ids[:, 0], logits[-1].argmax(-1))  # the newest stays


def at_top(probability: float, token: int, vocab: int = 1000) -> Tensor:
    """Logits [V] of `token` with this probability and the rest spread evenly."""
    probs = torch.full((vocab,), (1 - probability) / (vocab - 1), dtype=torch.float64)
    probs[token] = probability
    return probs.log().float()


@pytest.mark.parametrize("store", ["sparse", "dense"])
def test_a_steady_token_crosses_the_threshold_with_its_eighth_vote(store):
    logits = at_top(0.75, 7).expand(10, 1, -1)
    fused, _ = stream(CreditDecoding(Config(store=store), None), logits, torch.ones(10, 1, dtype=torch.bool))
    sure = [float(one[0].softmax(-1)[7]) for one in fused]
    assert [round(value, 3) for value in sure[:3]] == [0.827, 0.857, 0.874]
    assert next(n for n, value in enumerate(sure, 1) if value >= 0.9) == 8
    assert sure[7] == pytest.approx(0.9016, abs=1e-4)


def test_a_token_that_comes_and_goes_never_does():
    logits = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]]).log().repeat(30, 1, 1)
    fused, _ = stream(CreditDecoding(Config(), None), logits, torch.ones(60, 1, dtype=torch.bool))
    sure = [float(one[0].softmax(-1).max()) for one in fused]
    assert max(sure[1:]) < 0.9
    assert sure[-1] == pytest.approx(0.77, abs=0.01)


def test_credit_has_the_limit_of_its_closed_form():
    config = Config()
    logits = at_top(0.999999, 3).expand(60, 1, -1)
    credit = stream(CreditDecoding(config, None), logits, torch.ones(60, 1, dtype=torch.bool))[1].values.max()
    assert float(credit) == pytest.approx(1 / (1 - config.decay), abs=1e-3)
    assert config.fusion * math.log1p(float(credit)) == pytest.approx(1.254, abs=1e-3)


def test_without_decay_only_the_step_itself_counts():
    generator = torch.Generator().manual_seed(1)
    logits, open_ = torch.randn(5, 3, 20, generator=generator), torch.ones(5, 3, dtype=torch.bool)
    for store in ("sparse", "dense"):
        stage = CreditDecoding(Config(decay=0.0, store=store), None)
        for n, one in enumerate(stream(stage, logits, open_)[0]):
            assert torch.allclose(one, stream(stage, logits[n : n + 1], open_[:1])[0][0])


def test_committed_positions_earn_nothing_and_lose_what_they_had():
    logits, open_ = at_top(0.8, 2).expand(4, 1, -1), torch.tensor([[True], [False], [False], [False]])
    history = stream(CreditDecoding(Config(), None), logits, open_)[1]
    assert float(history.values.max()) == pytest.approx(0.8**0.2 * 0.8**3, abs=1e-5)


@pytest.mark.parametrize("store", ["sparse", "dense"])
def test_a_history_can_be_forked(store):
    stage = CreditDecoding(Config(store=store, slots=2), None)
    generator = torch.Generator().manual_seed(2)
    logits, open_ = 2 * torch.randn(6, 4, 9, generator=generator), torch.ones(6, 4, dtype=torch.bool)
    half = stream(stage, logits[:3], open_[:3])[1]
    kept = copy.deepcopy(half)
    whole = stream(stage, logits, open_)[0]
    for _ in range(2):  # twice from the same value: it was not written to
        history = half
        for n in range(3, 6):
            view, row = view_of([0.5] * 4, open_[n])
            view.logits = view.changed = logits[n]
            history, fused = stage.apply(history, view, row)
            assert torch.equal(fused, whole[n])
    assert torch.equal(kept.values, half.values)


def test_raw_logits_stay_as_they_are_and_what_lies_beyond_the_block_too():
    view, row = view_of([0.5] * 6, [True] * 6)
    row.window = (12, 14)
    view.inside = (view.positions >= 12) & (view.positions < 14)
    before = view.logits.clone()
    for store in ("sparse", "dense"):
        _, fused = CreditDecoding(Config(store=store), None).apply(None, view, row)
        assert torch.equal(view.logits, before)
        assert (fused != before).any(1).tolist() == [False, False, True, True, False, False]


def test_a_bonus_forbids_nothing_and_allows_nothing():
    """What another stage ruled out stays out, and votes come from raw logits whatever another stage did."""
    view, row = view_of([0.9], [True])
    view.changed = torch.tensor([[-torch.inf, 0.0]])
    history, fused = CreditDecoding(Config(), None).apply(None, view, row)
    assert fused[0].tolist()[0] == -math.inf
    assert int(history.ids[0, 0]) == 0


def plain(prompt: list[int], length: int, block: int, tau: float, config: Config) -> tuple[list[int], int]:
    """Threshold decoding with credits as its paper states it, T = 0: (text, forwards)."""
    x, forwards = [*prompt, *[MASK] * length], 0
    for low in range(len(prompt), len(x), block):
        high, seen, flags = min(low + block, len(x)), [], []
        while MASK in x[low:high]:
            seen.append(MODEL.logits(x)[low:high])
            forwards += 1
            flags.append(torch.tensor([token == MASK for token in x[low:high]]))
            best = definition(torch.stack(seen), torch.stack(flags), config)[-1].softmax(-1).max(-1)
            first = max(flags[-1].nonzero()[:, 0].tolist(), key=lambda i: float(best.values[i]))
            for i in flags[-1].nonzero()[:, 0].tolist():
                if i == first or float(best.values[i]) >= tau:
                    x[low + i] = int(best.indices[i])
    return x[len(prompt) :], forwards


@pytest.mark.parametrize("store", ["sparse", "dense"])
def test_decoding_with_credits_is_a_plain_loop(store):
    for prompt in prompts(3, seed=4):
        out = run(MODEL, [prompt], "threshold:tau=0.4", f"creditdecoding:store={store}", max_tokens=12)[0]
        assert (list(out.tokens), out.usage.forwards) == plain(prompt, 12, 32, 0.4, Config())


def test_without_fusion_nothing_changes_and_rows_are_their_own():
    many = prompts(4, seed=5)
    base = run(MODEL, many, "threshold:tau=0.4", max_tokens=12)
    off = run(MODEL, many, "threshold:tau=0.4", "creditdecoding:fusion=0", max_tokens=12)
    assert [(one.tokens, one.usage.forwards) for one in off] == [(one.tokens, one.usage.forwards) for one in base]
    on = run(MODEL, many, "threshold:tau=0.4", "creditdecoding", max_tokens=12)
    assert sum(one.usage.forwards for one in on) < sum(one.usage.forwards for one in base)
    for prompt, one in zip(many, on):
        assert run(MODEL, [prompt], "threshold:tau=0.4", "creditdecoding", max_tokens=12)[0].tokens == one.tokens
    assert not policy(MODEL, "creditdecoding").stages[0].memoryless


@pytest.mark.parametrize(
    ("field", "value"),
    [("fusion", -0.1), ("exponent", 0.0), ("decay", 1.0), ("decay", -0.1), ("slots", 0), ("store", "disk")],
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})
    assert caught.value.field == f"creditdecoding.{field}"
    with pytest.raises(ConfigError):
        Config(fusion=math.nan)
