"""Prophet: its ladder on hand-made logits, its region, and whole canvases against a plain loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from canvases import EOS, MASK, Masked, policy, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten import registry
from hasten.bench.reproduce.prophet import emergence, ladder
from hasten.engine.contracts import MethodContext
from hasten.engine.engine import Engine, Parts
from hasten.engine.parts import CanvasRow, Forward
from hasten.errors import ConfigError, IncompatibleError
from hasten.policy import Policy
from hasten.types import Request, SamplingParams

MODEL, SHIFTED = Masked(), Masked(seed=2, shift=1)
VOCAB = 97


class Speller:
    """One token per character, from 40 on; `bos` would be put first."""

    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        return ([] if bos is False else [1]) + [40 + ord(one) % 40 for one in text]


def start(made: Policy, length: int = 100) -> CanvasRow:
    row = made.open(Request((9, 9), SamplingParams(max_tokens=length)), MODEL.capabilities)
    return made.begin(row, None)


def forward(gaps: list[float], at: int = 2, token: int = 7) -> Forward:
    """Logits whose best token is `token`, ahead of the second by the gap of each position."""
    logits = torch.full((len(gaps), VOCAB), -30.0)
    logits[:, token], logits[:, 3] = torch.tensor(gaps), 0.0
    logits[:, MASK] = -torch.inf
    return Forward(logits, torch.arange(at, at + len(gaps)))


def fills(made: Policy, row: CanvasRow, gaps: list[float], **more: int) -> bool:
    return not bool(made.advance(row, forward(gaps, **more)).row.masked.any())


@pytest.mark.parametrize(
    ("step", "gap", "exit_"),
    [
        (0, 7.5, True), (0, 7.4375, False), (31, 7.4375, False), (31, 7.5, True), (32, 5.0, True), (32, 4.9375, False),
        (65, 4.9375, False), (65, 5.0, True), (66, 2.5, True), (66, 2.4375, False), (98, 2.5, True), (98, 2.4375, False),
    ],
)  # fmt: skip
def test_the_ladder_at_its_rungs(step, gap, exit_):
    """Step 31 is progress 0.32, step 32 is 0.33, step 66 is 0.67."""
    made = policy(MODEL, "prophet:progress=steps", "reference:block=100")
    row = dataclasses.replace(start(made), global_step=step)
    assert fills(made, row, [gap] * 100) == exit_


def test_progress_is_what_was_committed_where_that_is_more():
    made = policy(MODEL, "prophet", "reference:block=100")
    row = start(made)
    accepted = row.accepted.clone()
    accepted[2:69] = True  # two thirds in the first step
    row = dataclasses.replace(row, accepted=accepted, global_step=1)
    assert fills(made, row, [2.5] * 100)
    counted = policy(MODEL, "prophet:progress=steps", "reference:block=100")
    assert not fills(counted, row, [2.5] * 100)


def test_end_tokens_do_not_count_unless_they_are_all():
    made = policy(MODEL, "prophet", "reference:block=100")
    logits = forward([100.0] * 90 + [1.0] * 10, token=EOS).logits
    logits[90:, EOS], logits[90:, 7] = -30.0, 1.0
    seen = Forward(logits, torch.arange(2, 102))
    assert bool(made.advance(start(made), seen).row.masked.any())
    assert fills(made, start(made), [100.0] * 100, token=EOS)


def test_the_answer_alone_decides_and_the_template_does_not_count():
    made = policy(MODEL, "prophet:mode=answer,start=10,length=4", "reference:block=100")
    gaps = [0.0] * 100
    gaps[10:14] = [7.0, 8.0, 7.5, 7.5]
    assert fills(made, start(made), gaps)
    gaps[13] = 7.0
    assert not fills(made, start(made), gaps)
    row = start(made)
    provenance = row.provenance.clone()
    provenance[2 + 13] = 1  # fixed text
    assert fills(made, dataclasses.replace(row, provenance=provenance), [*gaps[:13], -999.0, *gaps[14:]])


@settings(max_examples=40)
@given(st.integers(0, 9999), st.integers(0, 39), st.sampled_from(["masked", "answer", "block"]), st.floats(0, 3))
def test_any_logits_exit_by_the_mean_gap(seed, step, mode, base):
    ladder = f"early={base + 2},middle={base + 1},late={base}"
    knobs = f"prophet:mode={mode},start=5,length=7,progress=steps,{ladder}"
    made = policy(MODEL, knobs, "reference:block=16")
    row = dataclasses.replace(start(made, 40), global_step=step)
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, MASK] = -torch.inf
    taken = made.advance(row, Forward(logits, torch.arange(2, 42))).row
    region = {"masked": range(40), "answer": range(5, 12), "block": range(16)}[mode]
    gaps = [sorted(logits[i].tolist())[::-1] for i in region if mode == "answer" or int(logits[i].argmax()) != EOS]
    gap = sum(row[0] - row[1] for row in gaps) / len(gaps)
    progress = (step + 1) / 40
    limit = base + 2 if progress < 0.33 else base + 1 if progress < 0.67 else base
    if abs(gap - limit) > 1e-4:
        filled = 16 if mode == "block" else 40
        assert int(taken.masked.sum()) == (40 - filled if gap >= limit else 39)


@pytest.mark.parametrize("mode", ["masked", "block", "answer,start=3"])
@pytest.mark.parametrize("model", [MODEL, SHIFTED], ids=["full", "shifted"])
def test_limits_out_of_reach_change_nothing(model, mode):
    never = f"prophet:mode={mode},early=inf,middle=inf,late=inf"
    for names in (("reference:block=8,steps=9",), ("threshold:tau=0.2", "canvas-cache")):
        for one, two in zip(run(model, prompts(3), *names), run(model, prompts(3), *names, never), strict=True):
            assert (one.tokens, one.usage.forwards) == (two.tokens, two.usage.forwards)


@pytest.mark.parametrize("model", [MODEL, SHIFTED], ids=["full", "shifted"])
def test_limits_below_everything_fill_in_one_forward(model):
    for prompt in prompts(3):
        out = run(model, [prompt], "prophet:early=-inf,middle=-inf,late=-inf", "reference:block=8")[0]
        best = model.logits([*prompt, *[MASK] * 24])[len(prompt) :].argmax(-1)
        assert (list(out.tokens), out.usage.forwards) == (best.tolist(), 1)
        out = run(model, [prompt], "prophet:mode=block,early=-inf,middle=-inf,late=-inf", "reference:block=8")[0]
        assert out.usage.forwards == 3


def test_a_block_causal_model_is_filled_block_by_block():
    model = Masked(seed=3, block=8)
    out = run(model, [[5] * 8], "prophet:mode=block,early=-inf,middle=-inf,late=-inf")[0]
    assert out.usage.forwards == 3
    with pytest.raises(IncompatibleError, match="never sees it"):
        policy(model, "prophet")


def plain(model: Masked, prompt: list[int], length: int, block: int, ladder: tuple, mode: str) -> tuple[list[int], int]:
    """Prophet over one token per step as the paper states it, T = 0: (tokens, forwards)."""
    x, n, forwards = [*prompt, *[MASK] * length], len(prompt), 0
    for low in range(n, len(x), block):
        high = min(low + block, len(x))
        while MASK in x[low:high]:
            logits = model.logits(x)
            forwards += 1
            open_ = [i for i in range(n, len(x)) if x[i] == MASK]
            text = [i for i in open_ if int(logits[i].argmax()) != EOS] or open_
            if mode == "answer":
                text = [i for i in range(n + 15, n + 20) if x[i] == MASK or low <= i < high]
            gaps = [float(top[0] - top[1]) for i in text for top in [logits[i].topk(2).values]]
            progress = forwards / length
            limit = ladder[0] if progress < 0.33 else ladder[1] if progress < 0.67 else ladder[2]
            best = logits.argmax(-1)
            if gaps and sum(gaps) / len(gaps) >= limit:
                for i in open_:
                    x[i] = int(best[i])
                return x[n:], forwards
            probs = logits.softmax(-1).amax(-1)
            at = max((i for i in open_ if low <= i < high), key=lambda i: float(probs[i]))
            x[at] = int(best[at])
    return x[n:], forwards


@pytest.mark.parametrize(("mode", "knobs"), [("masked", "mode=masked"), ("answer", "mode=answer,start=15")])
def test_a_canvas_is_the_plain_loop(mode, knobs):
    seen = set()
    for prompt in prompts(4, seed=5):
        for limits in ((1.5, 1.2, 1.0), (2.0, 1.1, 0.4)):
            names = f"prophet:{knobs},early={limits[0]},middle={limits[1]},late={limits[2]}"
            out = run(MODEL, [prompt], names, "reference:block=8")[0]
            tokens, forwards = plain(MODEL, prompt, 24, 8, limits, mode)
            assert (list(out.tokens), out.usage.forwards) == (tokens, forwards)
            seen.add(forwards)
    assert len(seen) > 2, "choose other limits: the runs should end at various steps"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_ragged_batch_is_its_rows_alone(temperature):
    many = prompts(4, seed=9)
    for cache in ((), ("canvas-cache:policy=prefix",)):
        names = ("prophet:early=1.2,middle=1.1,late=0.9", "reference:block=8", *cache)
        together = run(MODEL, many, *names, temperature=temperature)
        assert len({out.usage.forwards for out in together}) > 1
        for prompt, out in zip(many, together, strict=True):
            alone = run(MODEL, [prompt], *names, temperature=temperature)[0]
            assert (alone.tokens, alone.usage.forwards) == (out.tokens, out.usage.forwards)


def test_a_dual_cache_decides_where_a_forward_shows_all_masks():
    """With limits that anything passes, the fill comes with the first forward allowed that shows everything: the next block's."""
    knobs = "prophet:early=-inf,middle=-inf,late=-inf,least=1"
    dual = run(MODEL, [[5, 6]], knobs, "reference:block=8", "canvas-cache")[0]
    assert dual.usage.forwards == 8 + 1
    prefix = run(MODEL, [[5, 6]], knobs, "reference:block=8", "canvas-cache:policy=prefix")[0]
    assert prefix.usage.forwards == 2


def pinned(model: Masked, spec: str) -> Policy:
    """The policy with a tokenizer at hand."""
    context = MethodContext("tiny", model, Speller())
    base = registry.build("reference:block=8", context)
    return registry.build(spec, context).policy.over(base.policy).over(base.rest).check(model.capabilities)


def test_the_template_stands_in_every_row():
    made = pinned(MODEL, "prophet:mode=answer,template=_is,at=10,early=1.5,middle=1.2,late=1")
    assert made.pins == {10: 40 + 32, 11: 40 + ord("i") % 40, 12: 40 + ord("s") % 40}
    assert made.stops[0].start == 14
    requests = [Request(tuple(p), SamplingParams(max_tokens=24, ignore_eos=True)) for p in prompts(4)]
    outs = Engine(MODEL, cache_bytes=8_000_000).run([(one, Parts(canvas=made)) for one in requests])
    assert all(out[0].tokens[10:13] == tuple(made.pins.values()) for out in outs)


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ("mode=all", "prophet.mode"),
        ("progress=time", "prophet.progress"),
        ("early=1,middle=2", "prophet.middle"),
        ("early=3,middle=2,late=2.5", "prophet.late"),
        ("middle=nan", "prophet.middle"),
        ("least=-1", "prophet.least"),
        ("length=0", "prophet.length"),
        ("mode=answer", "prophet.start"),  # no region
        ("mode=answer,start=24", "prophet.start"),  # behind the canvas
        ("template=x", "prophet.template"),  # no tokenizer
    ],
)
def test_bad_settings_are_refused_by_name(knobs, field):
    with pytest.raises(ConfigError) as caught:
        run(MODEL, [[5]], f"prophet:{knobs}")
    assert caught.value.field == field


def test_templates_outside_the_canvas_or_on_other_text_are_refused():
    engine = Engine(MODEL, cache_bytes=8_000_000)
    made = pinned(MODEL, "prophet:mode=answer,template=xy,at=3")
    with pytest.raises(ConfigError, match="offset"):
        engine.add(Request((5,), SamplingParams(max_tokens=4)), Parts(canvas=made))
    with pytest.raises(ConfigError, match="offset"):
        engine.add(Request((5,), template=(-1, -1, -1, 9, -1, -1, -1)), Parts(canvas=made))
    with pytest.raises(ConfigError, match="slot"):
        engine.add(Request((5,), SamplingParams(max_tokens=6)), Parts(canvas=made))
    with pytest.raises(IncompatibleError, match="two methods pin"):
        Policy(pins=made.pins).join(Policy(pins=made.pins))


def test_measured_limits_keep_the_share_of_right_fills():
    """(progress, gap, whether a fill would be the final answer), as `calibrate` notes them."""
    notes = [(0.1, 9.0, True), (0.1, 8.0, False), (0.2, 7.0, True)]
    notes += [(0.5, gap / 10, gap > 30) for gap in range(20, 60)] + [(0.9, gap / 10, gap > 55) for gap in range(20, 60)]
    assert ladder(notes) == (9.0, 5.6, 5.6)  # late is 5.6, so that the middle is no lower
    early, middle, late = ladder(notes, share=0.5)
    assert early >= middle >= late
    assert ladder([(0.1, 1.0, False)]) == (float("inf"),) * 3
    assert emergence(notes)["0.9"] == 0.1
