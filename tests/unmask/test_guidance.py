"""Classifier-free guidance against plain loops of LLaDA's sampler with its cfg_scale; what it costs, and what it refuses."""

from __future__ import annotations

import dataclasses
import re

import diffusion
import pytest
import tiny
import torch
from canvases import MASK, Masked, policy, prompts, run
from torch import Tensor

import hasten
from hasten import registry
from hasten.combine import combine
from hasten.engine.contracts import MethodContext, RowInput
from hasten.engine.engine import Engine, Parts
from hasten.engine.masks import FULL, BlockCausal
from hasten.engine.parts import Forward
from hasten.errors import ConfigError, IncompatibleError
from hasten.models.load import load
from hasten.policy import Policy
from hasten.types import Event, Request, SamplingParams
from hasten.unmask._noise import uniforms
from hasten.unmask.canvas_cache import CanvasCache
from hasten.unmask.canvas_cache import Config as CacheConfig
from hasten.unmask.diffusion_gemma import Config as GemmaConfig
from hasten.unmask.diffusion_gemma import DiffusionGemma
from hasten.unmask.guidance import Config, Guidance

MODELS = {
    "full": Masked(),
    "windowed": Masked(tiny.WINDOWED, 1),
    "shifted": Masked(tiny.PLAIN, 2, shift=1),
    "blocks": Masked(tiny.NORMED, 3, block=8),
    "shifted blocks": Masked(tiny.PLAIN, 5, block=8, shift=1),
}
FREE = ("full", "windowed", "shifted")
SEED = 7  # of canvases.run


def raw(model: Masked, x: Tensor) -> Tensor:
    """Aligned logits [L, vocab] of one canvas as the model gives them."""
    size, shift = model.capabilities.block, model.capabilities.logit_shift
    out = model.stack.run([RowInput(x, torch.arange(len(x)), None, BlockCausal(size) if size else FULL, "all")]).logits
    return torch.cat((out[:1], out[:-1])) if shift else out


def guided(model: Masked, x: Tensor, given: Tensor, scale: float) -> Tensor:
    """LLaDA's logits with its cfg_scale, the mask token excluded as hasten does."""
    un_x = x.clone()
    un_x[given[: len(x)]] = MASK
    logits, un_logits = raw(model, x), raw(model, un_x)
    logits = un_logits + (scale + 1) * (logits - un_logits)
    logits[:, MASK] = -torch.inf
    return logits


def llada(
    model: Masked, prompt: list[int], length: int, block: int, steps: int, scale: float, temperature: float = 0.0
) -> tuple[list[int], int]:
    """LLaDA's sampler with guidance, as released but for whose noise it draws: (canvas after the prompt, steps)."""
    x = torch.tensor([*prompt, *[MASK] * length])
    given, blocks, step = x != MASK, -(-length // block), 0
    for low in range(len(prompt), len(x), block):
        high = min(low + block, len(x))
        turns = max(1, min(high - low, steps // blocks))
        for turn in range(turns):
            logits = guided(model, x, given, scale).double()
            noise = (-uniforms(SEED, step, torch.arange(len(x)), logits.shape[-1]).log()) ** temperature
            x0 = (logits.exp() / noise).argmax(-1)
            confidence = logits.softmax(-1).gather(-1, x0[:, None])[:, 0]
            confidence[(x != MASK) | (torch.arange(len(x)) >= high)] = -torch.inf
            quota = (high - low) // turns + (turn < (high - low) % turns)
            best = confidence.topk(quota).indices
            x[best], step = x0[best], step + 1
    return x[len(prompt) :].tolist(), step


def by_threshold(model: Masked, prompt: list[int], length: int, tau: float, scale: float) -> tuple[list[int], int]:
    """Threshold decoding of guided logits: (canvas after the prompt, steps). A block-causal model sees the blocks so far."""
    size, x, steps = model.capabilities.block, torch.tensor([*prompt, *[MASK] * length]), 0
    given = x != MASK
    for low in range(len(prompt) // size * size if size else len(prompt), len(x), size or 32):
        high = min(low + (size or 32), len(x))
        while MASK in x[low:high]:
            prob, token = guided(model, x[: high if size else len(x)], given, scale).softmax(-1).max(-1)
            open_ = [i for i in range(low, high) if x[i] == MASK]
            best, steps = max(open_, key=lambda i: float(prob[i])), steps + 1
            for i in open_:
                if i == best or float(prob[i]) >= tau:
                    x[i] = token[i]
    return x[len(prompt) :].tolist(), steps


# --- what it writes ---


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("length", "block", "steps", "scale"), [(16, 16, 16, 0.5), (24, 8, 6, 2.0), (13, 8, 5, 1.0)])
@pytest.mark.parametrize("name", FREE)
def test_it_is_lladas_sampler_with_its_scale(name, length, block, steps, scale, temperature):
    model, many = MODELS[name], prompts(2, seed=length)
    methods = (f"reference:block={block},steps={steps}", f"guidance:scale={scale}")
    guided_outs = run(model, many, *methods, max_tokens=length, temperature=temperature)
    for prompt, out in zip(many, guided_outs, strict=True):
        tokens, taken = llada(model, prompt, length, block, steps, scale, temperature)
        assert (list(out.tokens), out.usage.forwards) == (tokens, 2 * taken)
    unguided = run(model, many, methods[0], max_tokens=length, temperature=temperature)
    assert [list(one.tokens) for one in unguided] == [
        llada(model, prompt, length, block, steps, 0.0, temperature)[0] for prompt in many
    ], "the loop at scale 0 is the sampler without"


@pytest.mark.parametrize(("name", "tau"), [*((name, 0.3) for name in MODELS), ("blocks", 2.0), ("shifted blocks", 2.0)])
def test_a_threshold_looks_at_guided_logits_with_and_without_blocks_of_the_models_own(name, tau):
    model, differ = MODELS[name], False
    for prompt in [*prompts(1, longest=30, seed=5), list(range(40, 56))]:
        out = run(model, [prompt], f"threshold:tau={tau}", "guidance:scale=1.5", max_tokens=21)[0]
        tokens, steps = by_threshold(model, prompt, 21, tau, 1.5)
        assert (list(out.tokens), out.usage.forwards) == (tokens, 2 * steps)
        differ |= tokens != by_threshold(model, prompt, 21, tau, 0.0)[0]
    assert differ, "guidance changed nothing; the comparison says nothing"


class Spy:
    """A planner and a logit stage that keep the logits they are shown."""

    name, memoryless, lossless, mutates_committed = "spy", True, True, False

    def __init__(self, plans: bool) -> None:
        self.range = "block_start_full" if plans else "block"
        self.planned: list[tuple[Tensor, Tensor]] = []
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def plan(self, view, row):
        self.planned.append((view.positions, view.logits))
        return row.end

    def apply(self, history, view, row):
        self.seen.append((row.tokens, view.positions, view.logits))
        return history, view.changed


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["llada", "dream", "sdar", "fast"])
def test_every_part_sees_the_logits_of_the_formula(kind, scale, tmp_path):
    """On small checkpoints of the families, against plain arithmetic over their weights, to 1e-5."""
    config = diffusion.VARIANTS[kind]
    weights = diffusion.state(config, seed=4)
    diffusion.write(tmp_path, config, weights)
    model, size, spy = (
        load(tmp_path, backbone="torch").model,
        diffusion.block_of(config),
        Spy(diffusion.block_of(config) is None),
    )
    parts = {"stages": (spy,)} if size else {"stages": (spy,), "planner": spy}
    rules = dataclasses.replace(policy(model, f"guidance:scale={scale}"), **parts).check(model.capabilities)
    prompt, mask = (17, 200, 33, 4, 250), config["mask_token_id"]
    request = Request(prompt, SamplingParams(max_tokens=9, ignore_eos=True))
    Engine(model, cache_bytes=8_000_000).run([(request, Parts(canvas=rules))])

    def plain(tokens: Tensor) -> Tensor:
        allowed = diffusion.blocks(len(tokens), size) if size else None
        out = diffusion.plain(config, weights, tokens, allowed)
        return torch.cat((out[:1], out[:-1])) if model.capabilities.logit_shift else out

    for tokens, positions, logits in [*((spy.seen[0][0], *one) for one in spy.planned), *spy.seen]:
        masked = torch.cat((torch.full((5,), mask), tokens[5:]))
        with_prompt, without = plain(tokens)[positions], plain(masked)[positions]
        expected = without + (scale + 1) * (with_prompt - without)
        expected[:, mask] = -torch.inf
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert float((with_prompt - without).abs().max()) > 0.1
    assert len(spy.seen) == 9
    assert bool(spy.planned) == (size is None)


def test_the_arg_max_of_the_unguided_logits_is_not_taken_over():
    """Backbones of large vocabularies hand it along; guidance may move it."""
    guide, at = Guidance(Config(scale=1.0), MethodContext("tiny", MODELS["full"])), torch.arange(1)
    one = torch.zeros(1, 97).index_fill(1, torch.tensor([3]), 1.0)
    other = torch.zeros(1, 97).index_fill(1, torch.tensor([3]), 3.0)  # where the prompt makes it less likely
    joined = guide.join(Forward(one, at, torch.tensor([3])), Forward(other, at, torch.tensor([3])))
    assert joined.best is None
    assert float(joined.logits[0, 3]) == 3 + 2 * (1 - 3)
    assert int(joined.logits.argmax()) != 3


# --- beside other parts ---


@pytest.mark.parametrize(
    ("name", "others"),
    [("shifted", ()), ("shifted", ("reference:block=8", "canvas-cache")), ("blocks", ("freedave",)), ("blocks", ())],
)
def test_scale_0_is_off_in_tokens_cost_and_caches(name, others):
    many = prompts(2, seed=2)
    for temperature in (0.0, 0.8):
        plain = run(MODELS[name], many, *others, temperature=temperature)
        off = run(MODELS[name], many, *others, "guidance:scale=0", temperature=temperature)
        for one, other in zip(plain, off, strict=True):
            assert one.tokens == other.tokens
            assert one.usage == dataclasses.replace(other.usage, decode_s=one.usage.decode_s)


SETTINGS = {"adablock": "adablock:ids=5", "threshold": "threshold:tau=0.2", "reference": "reference:block=8,steps=6"}
CANVAS = [
    one.slug for one in registry.cards() if one.plugs_into == "unmask" and one.slug != "learn2pd"
]  # it needs training


@pytest.mark.parametrize("slug", CANVAS)
def test_every_canvas_method_goes_with_it_or_is_refused_by_both_names(slug):
    """The ones that go write other text with it, the same in a batch as alone."""
    model, spec, many = MODELS["shifted"], SETTINGS.get(slug, slug), prompts(3, seed=6)
    if slug == "guidance":
        with pytest.raises(IncompatibleError, match="one guide"):
            policy(model, "guidance", "guidance:scale=2")
        return
    if slug in ("canvas-cache", "diffusion-gemma"):
        for names in ((slug, "guidance"), ("guidance", slug)):
            with pytest.raises(IncompatibleError, match=rf"'guidance'.*'{slug}'.*second forward"):
                policy(model, *names)
        return
    together = run(model, many, spec, "guidance:scale=2", max_tokens=14)
    for prompt, out in zip(many, together, strict=True):
        alone = run(model, [prompt], "guidance:scale=2", spec, max_tokens=14)[0]
        assert (alone.tokens, alone.usage.forwards) == (out.tokens, out.usage.forwards)
        assert MASK not in out.tokens
        assert out.usage.forwards % 2 == 0
    assert [one.tokens for one in together] != [one.tokens for one in run(model, many, spec, max_tokens=14)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_guided_rows_and_others_of_a_batch_are_their_rows_alone(name, temperature):
    model, many = MODELS[name], prompts(4, longest=20, seed=9)
    kinds = [(), ("guidance:scale=1",), ("threshold:tau=0.2", "guidance:scale=3")]
    kinds.append(("threshold:tau=0.2",) if model.capabilities.block else ("threshold:tau=0.2", "canvas-cache"))
    engine = Engine(model, cache_bytes=64_000_000)
    params = SamplingParams(max_tokens=16, ignore_eos=True, seed=SEED, temperature=temperature)
    chosen = [kinds[i % len(kinds)] for i in range(len(many))]
    requests = [
        (Request(tuple(prompt), params), Parts(canvas=policy(model, *names)))
        for prompt, names in zip(many, chosen, strict=True)
    ]
    for prompt, names, [out] in zip(many, chosen, engine.run(requests), strict=True):
        alone = run(model, [prompt], *names, temperature=temperature, max_tokens=16)[0]
        assert alone.tokens == out.tokens
        assert (alone.usage.forwards, alone.usage.computed_tokens) == (out.usage.forwards, out.usage.computed_tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_freedave_keeps_the_guided_samplers_tokens_and_their_order(name, temperature):
    """Its drafts come from guided forwards, and every drafted state has a companion of its own."""
    model, many, fewer = MODELS[name], prompts(3, seed=3), False
    for rule in (("reference:block=8",), ("threshold:tau=0.2",), ("reference:block=8", "creditdecoding")):
        log: list[list[Event]] = [[], []]
        methods = (*rule, "guidance:scale=1")
        plain = run(model, many, *methods, temperature=temperature, max_tokens=13, events=log[0])
        fast = run(model, many, *methods, "freedave:d=3", temperature=temperature, max_tokens=13, events=log[1])
        assert [one.tokens for one in fast] == [one.tokens for one in plain]
        orders = [[(e.request, e.position, e.token) for e in events if e.kind == "commit"] for events in log]
        assert sorted(orders[0], key=lambda one: one[0]) == sorted(orders[1], key=lambda one: one[0])
        fewer |= any(one.usage.forwards < other.usage.forwards for one, other in zip(fast, plain, strict=True))
    assert fewer


# --- what it costs ---


@pytest.mark.parametrize("name", ["full", "shifted blocks"])
def test_both_forwards_are_counted_and_run_in_one_pass(name):
    model, calls, events = MODELS[name], [], []

    class Watched:
        """The model, with a note of every call."""

        def __getattr__(self, attribute):
            return getattr(model, attribute)

        def run(self, rows, needs=None):
            calls.append(rows)
            return model.stack.run(rows)

    out = run(Watched(), [[5, 6, 7]], "reference:block=8", "guidance:scale=1", max_tokens=13, events=events)[0]
    assert len(calls) == 13
    for canvas, companion in calls:
        assert torch.equal(canvas.positions, companion.positions)
        assert canvas.visibility == companion.visibility
        assert canvas.cache is companion.cache is None
        assert canvas.wanted() == companion.wanted()
        assert canvas.tokens[:3].tolist() == [5, 6, 7]
        assert companion.tokens[:3].tolist() == [MASK] * 3
        assert torch.equal(canvas.tokens[3:], companion.tokens[3:])
    forwards = [event for event in events if event.kind == "forward"]
    assert len(forwards) == out.usage.forwards == 26
    queries = 13 * 16 if name == "full" else 5 * 8 + 8 * 16  # blocks end at 8 and 16; what lies behind is not computed
    assert sum(event.total for event in forwards) == out.usage.computed_tokens == 2 * queries


def test_admission_knows_of_both_forwards():
    model, request = MODELS["full"], Request((5, 6), SamplingParams(max_tokens=24, n=2))
    engine = Engine(model, cache_bytes=8_000_000)
    kept = engine.scheduler.pool.row_bytes(1) * 2
    need = {name: engine.need(request, Parts(canvas=policy(model, *name))) - kept for name in ((), ("guidance",))}
    assert need["guidance",] == 2 * need[()]


def test_the_bound_on_what_a_canvas_may_cost_counts_both(monkeypatch):
    from hasten.engine import engine as module

    model = MODELS["full"]
    monkeypatch.setattr(module, "LIMITS", dataclasses.replace(module.LIMITS, canvas_steps=24 * 24))
    run(model, [[5, 6]], max_tokens=24)
    with pytest.raises(ConfigError, match=rf"2 times, costs {2 * 24 * 24};"):
        run(model, [[5, 6]], "guidance", max_tokens=24)


# --- what was given ---


def test_fixed_text_is_given_like_the_prompt():
    """Where a prompt ends and fixed text begins makes no difference; pins are fixed text."""
    model, rules = MODELS["full"], policy(MODELS["full"], "guidance:scale=2")
    engine, params = Engine(model, cache_bytes=8_000_000), SamplingParams(seed=3, temperature=0.6)
    template = (-1, 11, -1, -1, 12, -1)
    outs = [
        engine.run([(Request(prompt, params, template=(*fixed, *template)), Parts(canvas=rules))])[0][0].tokens
        for prompt, fixed in (((5, 6, 7), ()), ((5,), (6, 7)))
    ]
    assert outs[1][2:] == outs[0]
    row = rules.open(Request((5, 6), template=template), model.capabilities)
    assert rules.guide.companion(row).tokens.tolist() == [MASK] * 8
    written = dataclasses.replace(row, tokens=row.tokens.index_fill(0, torch.tensor([2]), 40))
    assert rules.guide.companion(written).tokens.tolist() == [MASK, MASK, 40, *[MASK] * 5]
    assert row.tokens.tolist() == [5, 6, MASK, 11, MASK, MASK, 12, MASK]
    pinned = dataclasses.replace(rules, pins={1: 9}).open(Request((5,), SamplingParams(max_tokens=3)), model.capabilities)
    assert rules.guide.companion(pinned).tokens.tolist() == [MASK] * 4


def test_a_companion_that_is_not_finite_ends_its_row_and_no_other():
    model = Masked(seed=6)
    good = run(model, [[5, 6]])[0]
    run_row = model.stack.run

    def broken(rows, needs=None):
        done = run_row(rows)
        for i, row in enumerate(rows):
            if int(row.tokens[0]) == MASK:
                done.row_logits(i)[:] = torch.nan
        return done

    model.run = broken
    params = SamplingParams(max_tokens=24, ignore_eos=True, seed=SEED)
    rules = [policy(model), policy(model, "guidance")]
    outs = Engine(model, cache_bytes=8_000_000).run([(Request((5, 6), params), Parts(canvas=one)) for one in rules])
    assert outs[0][0].tokens == good.tokens
    assert outs[1][0].finish_reason == "error"


# --- what is refused ---


def test_keys_that_are_kept_are_refused_by_both_names_however_a_policy_is_made():
    model = MODELS["full"]
    guide = Guidance(Config(), MethodContext("tiny", model))
    cache = CanvasCache(CacheConfig(refresh=1), MethodContext("tiny", model))
    with pytest.raises(IncompatibleError, match=r"'guidance' cannot be combined with 'canvas-cache'"):
        Policy(guide=guide, cache=cache).check(model.capabilities)
    gemma = DiffusionGemma(GemmaConfig(), MethodContext("tiny", model))
    with pytest.raises(IncompatibleError, match=r"'guidance' cannot be combined with 'diffusion-gemma'"):
        guide.policy.join(gemma.policy).check(model.capabilities)


def test_models_that_fill_no_canvas_mask_by_mask_are_refused_by_name():
    from hasten.pass_cost import PassCost

    with pytest.raises(IncompatibleError, match=r"'guidance' needs 'masked'"):
        hasten.load("mini-ar").parts(("guidance",))
    model = Masked()
    model.capabilities = dataclasses.replace(model.capabilities, mask_id=None, self_conditioning=True)
    with pytest.raises(IncompatibleError, match=r"'guidance' fills a canvas mask by mask"):
        combine(("guidance",), MethodContext("uniform", model), PassCost)


def test_it_is_chosen_by_name_and_leaves_presets_that_keep_no_keys_as_they_are():
    llm = hasten.load("mini-dlm", cache_bytes=50_000_000)
    plain = llm.generate("sort: k a d\n", max_tokens=16, method=["plain", "guidance:scale=1"])
    exact = llm.generate("sort: k a d\n", max_tokens=16, method=["exact", "guidance:scale=1"])
    assert plain.tokens == exact.tokens
    assert plain.method == ("reference", "guidance")
    with pytest.raises(IncompatibleError, match=re.escape("'guidance' cannot be combined with 'canvas-cache'")):
        llm.parts(("fast", "guidance"))


@pytest.mark.parametrize("value", [-0.5, 100.5, float("nan")])
def test_a_scale_outside_its_range_is_named(value):
    with pytest.raises(ConfigError) as caught:
        Config(scale=value)
    assert caught.value.field == "guidance.scale"
