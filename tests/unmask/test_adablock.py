"""AdaBlock: where blocks end on hand-made logits, and whole canvases against a plain loop."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from canvases import MASK, Masked, policy, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten import registry
from hasten.engine.contracts import MethodContext
from hasten.engine.parts import Forward
from hasten.errors import ConfigError, IncompatibleError
from hasten.types import Event, Request, SamplingParams

MODEL, SHIFTED = Masked(), Masked(seed=2, shift=1)
IDS = ".".join(str(i) for i in range(1, MASK, 4))
DELIMITERS = set(range(1, MASK, 4))
NEWLINE = 5


def planned(confidences: dict[int, float], length: int = 40, **knobs: object) -> int:
    """Length of the first block when the model predicts a delimiter at these offsets with these probabilities."""
    names = {"ids": str(NEWLINE), "block": 8, **knobs}
    made = policy(MODEL, "adablock:" + ",".join(f"{key}={value}" for key, value in names.items()))
    row = made.open(Request((9, 9, 9), SamplingParams(max_tokens=length)), MODEL.capabilities)
    logits = torch.full((length, MODEL.capabilities.vocab_size), -40.0)
    logits[:, 7] = 0.0
    for offset, p in confidences.items():
        logits[offset, NEWLINE], logits[offset, 7] = math.log(p), math.log(1 - p) if p < 1 else -40.0
        logits[offset, 11:21] = math.log((1 - p) / 10) if p < 1 else -40.0
        logits[offset, 7] = -40.0
    logits[:, MASK] = -torch.inf
    seen = Forward(logits, torch.arange(3, 3 + length))
    return made.begin(row, seen).window[1] - 3


@pytest.mark.parametrize(
    ("confidences", "knobs", "length"),
    [
        ({}, {}, 8),
        ({4: 0.9}, {}, 5),
        ({4: 0.9, 2: 0.5}, {}, 5),
        ({4: 0.9, 2: 0.95}, {}, 3),
        ({4: 0.2}, {"tau": 0.3}, 8),
        ({4: 0.4}, {"tau": 0.3}, 5),
        ({0: 0.9}, {}, 1),
        ({9: 0.9}, {}, 10),  # longer than a fixed block
        ({10: 0.9}, {}, 8),  # a quarter of 40 is searched
        ({19: 0.9}, {"window": 20}, 20),
        ({3: 0.8, 6: 0.8}, {}, 4),
        ({4: 1.0}, {"tau": "inf"}, 8),
        ({}, {"block": 100}, 40),  # clipped at the canvas's end
        ({4: 0.2}, {"tau": 0}, 5),
    ],
)
def test_a_block_ends_at_the_surest_delimiter(confidences, knobs, length):
    assert planned(confidences, **knobs) == length


@settings(max_examples=40)
@given(st.dictionaries(st.integers(0, 39), st.floats(0.2, 1.0), max_size=8), st.floats(0, 1), st.integers(1, 50))
def test_any_confidences_give_the_published_rule(confidences, tau, block):
    near = {k: p for k, p in confidences.items() if k < 10}
    best = max(near, key=lambda k: (round(near[k], 6), -k), default=None)
    if best is not None and (
        abs(near[best] - tau) < 1e-4 or any(abs(near[best] - p) < 1e-4 for k, p in near.items() if k != best)
    ):
        return  # too close to call in float32
    expected = best + 1 if best is not None and near[best] >= tau else min(block, 40)
    assert planned(confidences, tau=tau, block=block) == expected


def plain(
    model: Masked, prompt: list[int], length: int, tau: float, block: int, sure: float
) -> tuple[list[int], int, list]:
    """AdaBlock over threshold decoding as the paper states it, T = 0: (tokens, forwards, blocks)."""
    x, low, forwards, blocks = [*prompt, *[MASK] * length], len(prompt), 0, []
    while low < len(x):
        high, first = low, True
        while first or MASK in x[low:high]:
            probs = model.logits(x).softmax(-1).max(-1)
            forwards += 1
            if first:
                left = len(x) - low
                near = range(low, low + min(length // 4, left))
                found = [i for i in near if int(probs.indices[i]) in DELIMITERS]
                best = max(found, key=lambda i: float(probs.values[i]), default=None)
                take = best - low + 1 if best is not None and float(probs.values[best]) >= tau else block
                high, first = low + min(take, left), False
                blocks.append((low, high))
            open_ = [i for i in range(low, high) if x[i] == MASK]
            best = max(open_, key=lambda i: float(probs.values[i]))
            for i in open_:
                if i == best or float(probs.values[i]) >= sure:
                    x[i] = int(probs.indices[i])
        low = high
    return x[len(prompt) :], forwards, blocks


@pytest.mark.parametrize(("length", "tau"), [(24, 0.1), (29, 0.0)])
@pytest.mark.parametrize("model", [MODEL, SHIFTED], ids=["full", "shifted"])
def test_a_canvas_is_the_plain_loop(model, length, tau):
    varied = set()
    for prompt in prompts(3, seed=length):
        events: list[Event] = []
        names = (f"adablock:ids={IDS},tau={tau},block=6", "threshold:tau=0.25")
        out = run(model, [prompt], *names, events=events, max_tokens=length)[0]
        tokens, forwards, blocks = plain(model, prompt, length, tau, 6, 0.25)
        assert (list(out.tokens), out.usage.forwards) == (tokens, forwards)
        assert [(event.position, event.total) for event in events if event.kind == "block"] == blocks
        assert sum(high - low for low, high in blocks) == length
        varied |= {high - low for low, high in blocks}
    assert len(varied) > 2


@pytest.mark.parametrize("cache", ["", "canvas-cache:policy=prefix", "canvas-cache", "canvas-cache:policy=vicinity"])
@pytest.mark.parametrize("model", [MODEL, SHIFTED], ids=["full", "shifted"])
def test_without_delimiters_blocks_are_fixed(model, cache):
    rest = ("threshold:tau=0.25", *filter(None, [cache]))
    for names in (f"adablock:tau=inf,block=7,ids={IDS}", "adablock:tau=inf,block=7"):
        events: list[list[Event]] = [[], []]
        ada = run(model, prompts(3), names, *rest, events=events[0])
        fixed = run(model, prompts(3), "reference:block=7", *rest, events=events[1])
        assert [one.tokens for one in ada] == [one.tokens for one in fixed]
        assert [one.usage.forwards for one in ada] == [one.usage.forwards for one in fixed]
        blocks = [[(e.request, e.position, e.total) for e in some if e.kind == "block"] for some in events]
        assert sorted(blocks[0]) == sorted(blocks[1])


@pytest.mark.parametrize("cache", ["", "canvas-cache", "canvas-cache:policy=prefix"])
def test_a_ragged_batch_is_its_rows_alone(cache):
    names = (f"adablock:ids={IDS},tau=0.1,block=6", "threshold:tau=0.25", *filter(None, [cache]))
    for temperature in (0.0, 0.8):
        many = prompts(3, seed=9)
        together = run(MODEL, many, *names, temperature=temperature)
        for prompt, out in zip(many, together, strict=True):
            alone = run(MODEL, [prompt], *names, temperature=temperature)[0]
            assert (alone.tokens, alone.usage.forwards) == (out.tokens, out.usage.forwards)


def test_one_full_forward_per_block_under_a_dual_cache():
    events: list[Event] = []
    names = (f"adablock:ids={IDS},tau=0.1,block=6", "canvas-cache")
    run(MODEL, [[5, 6, 7]], *names, events=events, max_tokens=40)
    sizes = [event.total for event in events if event.kind == "forward"]
    blocks = [event.total - event.position for event in events if event.kind == "block"]
    expected = [size for block in blocks for size in [43, *[block] * (block - 1)]]
    assert sizes == expected


class Speller:
    """Spells even ids with a line break; 2 is special."""

    special_ids = frozenset({2})

    def token_bytes(self, token: int) -> bytes:
        return b".\n" if token in (2, 4, 30) else b"x"


def test_delimiters_come_from_the_tokenizer():
    context = MethodContext("tiny", MODEL, Speller())
    assert registry.build("adablock", context).delimiters.tolist() == [4, 30]
    assert registry.build("adablock:ids=7.9", context).delimiters.tolist() == [7, 9]


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ("block=0", "adablock.block"),
        ("tau=-0.1", "adablock.tau"),
        ("tau=nan", "adablock.tau"),
        ("ids=5.x", "adablock.ids"),
        ("ids=97", "adablock.ids"),
        ("window=-1", "adablock.window"),
        ("tau=0.3", "adablock.ids"),  # no tokenizer, no delimiters
    ],
)
def test_bad_settings_are_refused_by_name(knobs, field):
    with pytest.raises(ConfigError) as caught:
        policy(MODEL, f"adablock:{knobs}")
    assert caught.value.field == field


def test_trained_blocks_and_a_second_planner_are_refused():
    with pytest.raises(IncompatibleError, match="blocks of its own"):
        policy(Masked(block=8), f"adablock:ids={IDS}")
    with pytest.raises(IncompatibleError, match="one planner"):
        policy(MODEL, f"adablock:ids={IDS}", "reference:block=8")


def test_a_canvas_that_was_cut_keeps_the_window_of_the_whole():
    made = policy(MODEL, f"adablock:ids={NEWLINE},block=8")
    row = made.open(Request((9,), SamplingParams(max_tokens=40)), MODEL.capabilities)
    row = dataclasses.replace(row, end=21)
    logits = torch.zeros(20, MODEL.capabilities.vocab_size)
    logits[9, NEWLINE] = 20.0
    assert made.begin(row, Forward(logits, torch.arange(1, 21))).window == (1, 11)
    logits[9, NEWLINE] = 0.0
    assert made.begin(row, Forward(logits, torch.arange(1, 21))).window == (1, 9)
