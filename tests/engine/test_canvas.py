"""The canvas loop against plain loops: same tokens, same forwards, alone and in batches, with and without caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from canvases import EOS, MASK, Masked, plain_loop, policy, prompts, run

from hasten.engine.engine import Engine, Parts
from hasten.errors import ConfigError, ContextLengthError, HastenError, IncompatibleError
from hasten.types import Event, Request, SamplingParams, commit_log
from hasten.unmask._noise import uniforms
from hasten.unmask.reference import NoCache

MODELS = {
    "full": Masked(),
    "windowed": Masked(tiny.WINDOWED, 1),
    "shifted": Masked(tiny.PLAIN, 2, shift=1),
    "blocks": Masked(tiny.NORMED, 3, block=8),
    "shifted blocks": Masked(tiny.PLAIN, 5, block=8, shift=1),
}


@pytest.mark.parametrize(("length", "block", "steps"), [(24, 24, 24), (24, 8, 24), (24, 8, 6), (21, 8, 9), (7, 32, 3)])
@pytest.mark.parametrize("name", ["full", "windowed", "shifted"])
def test_the_reference_sampler_is_a_plain_loop(name, length, block, steps):
    model = MODELS[name]
    for prompt in prompts(4, seed=length):
        out = run(model, [prompt], f"reference:block={block},steps={steps}", max_tokens=length)[0]
        tokens, forwards = plain_loop(model, prompt, length, block, steps)
        assert list(out.tokens) == tokens
        assert out.usage.forwards == forwards


BLOCKS = ("blocks", "shifted blocks")
ALIGNED = [list(range(30, 38)), list(range(40, 56))]  # prompts of whole blocks: the first token is foretold by the last


def block_loop(model: Masked, prompt: list[int], length: int, tau: float) -> tuple[list[int], int]:
    """Uncached block-causal decoding by threshold: only the blocks so far exist."""
    size, x, forwards = model.capabilities.block, [*prompt, *[MASK] * length], 0
    for low in range(len(prompt) // size * size, len(x), size):
        high = min(low + size, len(x))
        while MASK in x[low:high]:
            probs = model.logits(x[:high]).softmax(-1).max(-1)
            forwards += 1
            open_ = [i for i in range(low, high) if x[i] == MASK]
            best = max(open_, key=lambda i: float(probs.values[i]))
            for i in open_:
                if i == best or float(probs.values[i]) >= tau:
                    x[i] = int(probs.indices[i])
    return x[len(prompt) :], forwards


@pytest.mark.parametrize("tau", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_causal_cache_changes_nothing(name, tau):
    model = MODELS[name]
    for prompt in [*prompts(6, longest=30, seed=5), *ALIGNED]:
        out = run(model, [prompt], f"threshold:tau={tau}", max_tokens=21)[0]
        tokens, forwards = block_loop(model, prompt, 21, tau)
        assert (list(out.tokens), out.usage.forwards) == (tokens, forwards)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("names", [("threshold:tau=0.1",), ("threshold:tau=0.1", "edit:tau=0.2"), ("freedave:d=3",)])
def test_a_policy_that_stores_keys_writes_what_one_without_does(name, temperature, names):
    """Drafted states side by side, and committed places that are looked at again, are the harder cases."""
    model = MODELS[name]
    stored = policy(model, *names)
    engine = Engine(model, cache_bytes=64_000_000)
    params = SamplingParams(max_tokens=21, ignore_eos=True, seed=3, temperature=temperature)
    plain = replace(policy(model, *(one for one in names if "freedave" not in one)), cache=NoCache())
    for prompt in [*prompts(4, longest=30, seed=8), *ALIGNED]:
        requests = [(Request(tuple(prompt), params), Parts(canvas=one)) for one in (stored, plain)]
        kept, without = (outs[0] for outs in engine.run(requests))
        assert kept.tokens == without.tokens
        assert kept.usage.computed_tokens < without.usage.computed_tokens or "freedave:d=3" in names


def test_the_place_before_a_block_is_read_with_it_and_sees_nothing_of_it():
    """With a shift every pass but a block's first has one query more, whose logits do not move with the block's tokens."""
    model = MODELS["shifted blocks"]
    out = run(model, [ALIGNED[0]], "threshold:tau=2", max_tokens=16)[0]
    assert out.usage.forwards == 16
    assert out.usage.computed_tokens == (16 + 7 * 9) * 2  # block and prompt of 8, block and block of 8; then 1 + 8
    before = torch.tensor([*ALIGNED[0], *[MASK] * 8])
    after = torch.cat((before[:8], torch.arange(20, 28)))
    assert torch.equal(model.logits(before)[8], model.logits(after)[8])
    assert not torch.equal(model.logits(before)[9], model.logits(after)[9])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_a_ragged_batch_is_its_rows_alone(name, temperature):
    model, many = MODELS[name], prompts(6, seed=9)
    methods = [("reference",), ("threshold:tau=0.2",)]
    if name not in BLOCKS:
        methods += [
            ("threshold:tau=0.2", "canvas-cache"),
            ("canvas-cache:policy=prefix",),
            ("canvas-cache:policy=vicinity",),
        ]
    for names in methods:
        together = run(model, many, *names, temperature=temperature)
        for prompt, out in zip(many, together, strict=True):
            alone = run(model, [prompt], *names, temperature=temperature)[0]
            assert alone.tokens == out.tokens
            assert alone.usage.forwards == out.usage.forwards


@pytest.mark.parametrize("kind", ["prefix", "dual", "vicinity"])
@pytest.mark.parametrize("name", ["full", "windowed", "shifted"])
def test_a_cache_refreshed_every_step_is_no_cache(name, kind):
    model, many = MODELS[name], prompts(4, seed=3)
    for names in (("reference:block=8",), ("reference:block=8", "threshold:tau=0.2")):
        plain = run(model, many, *names)
        cached = run(model, many, *names, f"canvas-cache:policy={kind},refresh=1")
        assert [one.tokens for one in plain] == [one.tokens for one in cached]


def test_a_dual_cache_computes_the_block_only():
    model = MODELS["full"]
    plain = run(model, [[5, 6]], "reference:block=8", max_tokens=32)[0]
    cached = run(model, [[5, 6]], "reference:block=8", "canvas-cache", max_tokens=32)[0]
    assert plain.usage.computed_tokens == 32 * 34
    assert cached.usage.computed_tokens == 4 * (34 + 7 * 8)


def test_every_position_is_committed_once_and_text_comes_in_order():
    events: list[Event] = []
    out = run(MODELS["full"], [[5, 6, 7]], "threshold:tau=0.2", events=events)[0]
    log = commit_log(events)[0]
    assert sorted(position for _, position, _, _ in log) == list(range(3, 27))
    assert {position: token for _, position, token, _ in log} == dict(enumerate(out.tokens, 3))
    assert [event.kind for event in events if event.kind in ("block", "stop")] == ["block", "stop"]
    assert sum(event.kind == "forward" for event in events) == out.usage.forwards


class Spelled:
    """A decoder that spells token i as one character."""

    def push(self, token: int) -> str:
        return chr(160 + token)

    def flush(self) -> str:
        return ""


def spelled(model: Masked, request: Request, *names: str) -> tuple[object, list[Event]]:
    engine = Engine(model, cache_bytes=64_000_000, decoder=Spelled)
    events: list[Event] = []
    out = engine.run([(request, Parts(canvas=policy(model, *names)))], events.append)[0][0]
    return out, events


def test_streamed_text_is_the_text_and_stop_strings_end_it():
    model = MODELS["full"]
    out, events = spelled(model, Request((5, 6), SamplingParams(max_tokens=20, ignore_eos=True)), "threshold:tau=0.2")
    assert out.text == "".join(chr(160 + token) for token in out.tokens) == "".join(event.text for event in events)
    stop = out.text[9:11]
    cut, events = spelled(
        model, Request((5, 6), SamplingParams(max_tokens=20, ignore_eos=True, stop=(stop,))), "threshold:tau=0.2"
    )
    assert cut.text == out.text[: out.text.index(stop)] == "".join(event.text for event in events)
    assert (cut.finish_reason, cut.stop) == ("stop", stop)


def test_an_end_token_ends_the_canvas_once_all_before_it_is_final():
    model = Masked(seed=4)
    for prompt in prompts(40, seed=2):
        whole = run(model, [prompt], "threshold:tau=0.1", max_tokens=32)[0]
        ended = run(model, [prompt], "threshold:tau=0.1", max_tokens=32, ignore_eos=False)[0]
        if EOS in whole.tokens:
            assert ended.tokens == whole.tokens[: whole.tokens.index(EOS) + 1]
            assert (ended.finish_reason, ended.stop) == ("stop", EOS)
            assert ended.usage.forwards <= whole.usage.forwards
            break
    else:
        pytest.fail("no prompt led to an end token; choose another seed")


def test_slots_of_a_template_are_filled_and_fixed_text_stays():
    model, template = MODELS["full"], (-1, 11, -1, -1, 12, 13, -1)
    for names in (("reference",), ("threshold:tau=0.1", "canvas-cache")):
        request = Request((5, 6), SamplingParams(), template=template)
        out = Engine(model, cache_bytes=8_000_000).run([(request, Parts(canvas=policy(model, *names)))])[0][0]
        assert [token for token, slot in zip(out.tokens, template, strict=True) if slot >= 0] == [11, 12, 13]
        assert MASK not in out.tokens
        assert EOS not in out.tokens


def test_noise_belongs_to_seed_step_and_position():
    model = MODELS["full"]
    one, two, other = (run(model, [[5, 6]], temperature=1.0, seed=seed)[0].tokens for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize(
    ("names", "sampling", "field", "words"),
    [
        (("reference:block=0",), {}, "reference.block", "at least 1"),
        (("reference:steps=2,block=8",), {}, "steps", "one per block"),
        (("threshold:tau=-1",), {}, "threshold.tau", "0, 1"),
        (("canvas-cache:policy=none",), {}, "canvas-cache.policy", "prefix"),
        ((), {"repetition_penalty": 1.2}, "repetition_penalty", "canvas"),
        ((), {"logprobs": 3}, "logprobs", "canvas"),
        ((), {"max_tokens": 0}, "max_tokens", "1"),
    ],
)
def test_bad_settings_are_refused_by_name(names, sampling, field, words):
    with pytest.raises(ConfigError, match=words) as caught:
        run(MODELS["full"], [[5]], *names, **sampling)
    assert caught.value.field == field


def test_a_canvas_over_the_window_and_masks_in_a_prompt_are_refused():
    with pytest.raises(ContextLengthError):
        run(MODELS["full"], [[5]], max_tokens=256)
    with pytest.raises(ConfigError, match="mask token"):
        run(MODELS["full"], [[5, MASK]])
    with pytest.raises(ConfigError, match="no slot"):
        Request((5,), template=(1, 2))
    with pytest.raises(ContextLengthError):
        policy(MODELS["full"]).open(Request((5,), template=(-1,) * 256), MODELS["full"].capabilities)


def test_a_causal_model_has_no_canvas_and_a_masked_one_no_drafts():
    causal = tiny.engine()
    with pytest.raises(IncompatibleError, match="canvas"):
        causal.add(Request((5,), template=(-1,)))
    with pytest.raises(IncompatibleError, match="canvas methods"):
        Engine(MODELS["full"], cache_bytes=8_000_000).add(Request((5,)), Parts())


def test_two_caches_are_one_too_many():
    with pytest.raises(IncompatibleError, match="one cache"):
        policy(MODELS["full"], "canvas-cache", "canvas-cache:policy=prefix")
    with pytest.raises(IncompatibleError, match="exact cache"):
        policy(MODELS["blocks"], "canvas-cache")


def test_logits_that_are_not_finite_end_the_row_and_no_other():
    model = Masked(seed=6)
    good = run(model, [[5, 6]])[0]
    engine = Engine(model, cache_bytes=8_000_000)
    params = SamplingParams(max_tokens=24, ignore_eos=True, seed=7)
    run_row = model.stack.run

    def broken(rows, needs=None):
        done = run_row(rows)
        for i, row in enumerate(rows):
            if int(row.tokens[0]) == 9:
                done.row_logits(i)[:] = torch.nan
        return done

    model.run = broken
    outs = engine.run([(Request((first, 6), params), Parts(canvas=policy(model))) for first in (5, 9)])
    assert outs[0][0].tokens == good.tokens
    assert outs[1][0].finish_reason == "error"


def test_an_aborted_canvas_keeps_what_was_final():
    model = MODELS["full"]
    engine = Engine(model, cache_bytes=8_000_000)
    request = Request((5, 6), SamplingParams(max_tokens=24, ignore_eos=True))
    number = engine.add(request, Parts(canvas=policy(model, "reference:block=4")))
    for _ in range(10):
        engine.step()
    assert engine.abort(number)
    out = next(event.output for event in engine.step() if event.output is not None)
    whole = run(model, [[5, 6]], "reference:block=4")[0]
    assert out.finish_reason == "abort"
    assert 8 <= len(out.tokens) <= 10
    assert out.tokens == whole.tokens[: len(out.tokens)]
    assert engine.idle
    assert engine.scheduler.pool.used_bytes == 0


def test_the_loop_reports_what_the_model_thinks_meanwhile():
    model = MODELS["full"]
    engine = Engine(model, cache_bytes=8_000_000)
    engine.canvas_loop.provisional = True
    events: list[Event] = []
    engine.run([(Request((5,), SamplingParams(max_tokens=8, ignore_eos=True)), Parts(canvas=policy(model)))], events.append)
    proposed = [event for event in events if event.kind == "propose"]
    assert len(proposed) == 7 + 6 + 5 + 4 + 3 + 2 + 1
    assert all(0 < event.confidence <= 1 for event in proposed)


def test_keyed_noise_is_uniform_and_independent_of_the_batch():
    noise = torch.cat([uniforms(3, step, torch.arange(64), 8) for step in range(64)])
    counts = torch.histc(noise.float(), bins=16, min=0, max=1)
    expected = noise.numel() / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 45  # 15 degrees of freedom: one in ten thousand


def test_errors_are_hastens_own():
    with pytest.raises(HastenError):
        run(MODELS["full"], [[200]])
