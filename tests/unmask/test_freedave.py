"""FreeDave: the tokens, order and steps of the sampler it wraps, in fewer forwards, under every cache and with every method."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from canvases import MASK, Masked, policy, prompts, run

from hasten import registry
from hasten.engine.contracts import MethodContext
from hasten.engine.engine import Engine, Parts
from hasten.engine.parts import Forward
from hasten.errors import ConfigError, IncompatibleError
from hasten.types import Event, Request, SamplingParams
from hasten.unmask.freedave import Config, Depth, FreeDave

MODELS = {
    "full": Masked(),
    "windowed": Masked(tiny.WINDOWED, 1),
    "shifted": Masked(tiny.PLAIN, 2, shift=1),
    "blocks": Masked(tiny.NORMED, 3, block=8),
}
CACHES = [(), ("canvas-cache:policy=prefix",), ("canvas-cache",)]
PAIRS = [(name, cache) for name in MODELS for cache in CACHES if not (cache and name == "blocks")]


def order(events: list[Event]) -> dict[int, list[tuple[int, int]]]:
    """Per request the committed (position, token), in the order of the commits."""
    logs: dict[int, list[tuple[int, int]]] = {}
    for event in events:
        if event.kind == "commit":
            logs.setdefault(event.request, []).append((event.position, event.token))
    return logs


def same(name: str, many: list[list[int]], base: tuple[str, ...], d: int, length: int) -> None:
    """FreeDave over `base` gives the tokens of `base`, committed in its order, in no more forwards."""
    plain: list[Event] = []
    fast: list[Event] = []
    expected = run(MODELS[name], many, *base, events=plain, max_tokens=length)
    drafted = run(MODELS[name], many, *base, f"freedave:d={d}", events=fast, max_tokens=length)
    assert [one.tokens for one in drafted] == [one.tokens for one in expected]
    assert order(fast) == order(plain)
    for one, other in zip(drafted, expected, strict=True):
        assert one.usage.forwards <= other.usage.forwards
        assert d > 1 or one.usage == dataclasses.replace(other.usage, decode_s=one.usage.decode_s)


@pytest.mark.parametrize(("name", "cache"), PAIRS)
def test_tokens_and_their_order_are_those_of_one_token_per_step(name, cache):
    for d in (1, 4):
        same(name, prompts(3, seed=d), ("reference:block=8", *cache), d, 13)


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 4, 8])
@pytest.mark.parametrize(("name", "cache"), PAIRS)
def test_tokens_and_their_order_over_five_hundred_prompts(name, cache, d):
    for seed in range(16):
        same(name, prompts(32, seed=100 + seed), ("reference:block=8", *cache), d, 24)


@pytest.mark.parametrize(
    "rule",
    [
        ("threshold:tau=0.15",),
        ("reference:block=8,steps=6",),
        ("reference:block=8,score=random",),
        ("reference:block=8", "threshold:tau=0.1", "creditdecoding"),
        ("localleap:kappa=0.2,tau=0.1", "creditdecoding:store=sparse"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_every_sampler_keeps_its_tokens(rule, temperature):
    for name, cache in (("full", ()), ("shifted", ("canvas-cache",))):
        many = prompts(2, seed=3)
        expected = run(MODELS[name], many, *rule, *cache, temperature=temperature, max_tokens=12)
        drafted = run(MODELS[name], many, *rule, *cache, "freedave", temperature=temperature, max_tokens=12)
        assert [one.tokens for one in drafted] == [one.tokens for one in expected]


class Scripted(Masked):
    """A model that is sure of one text: position p holds token text[p], the surer the closer to the front."""

    def __init__(self, text: torch.Tensor) -> None:
        super().__init__()
        self.text, self.run_stack = text, self.stack.run

    def run(self, rows, needs=None):
        done = self.run_stack(rows)
        for i, row in enumerate(rows):
            at = row.positions[list(row.wanted())]
            logits = torch.zeros(len(at), done.logits.shape[-1])
            logits[torch.arange(len(at)), self.text[at]] = 10 - 0.1 * at
            done.row_logits(i)[:] = logits
        return done


def test_a_model_that_is_sure_needs_one_forward_per_d_tokens():
    model = Scripted(torch.randint(1, MASK, (40,), generator=torch.Generator().manual_seed(0)))
    for d in (1, 2, 4, 8):
        out = run(model, [[5, 6]], "reference:block=32", f"freedave:d={d}", max_tokens=32)[0]
        assert list(out.tokens) == model.text[2:34].tolist()
        assert out.usage.forwards == 1 + -(-31 // d)


def test_a_whole_step_of_several_tokens_is_confirmed_at_once():
    model = Scripted(torch.randint(1, MASK, (40,), generator=torch.Generator().manual_seed(0)))
    plain = run(model, [[5, 6]], "reference:block=24,steps=12")[0]
    fast = run(model, [[5, 6]], "reference:block=24,steps=12", "freedave")[0]
    assert (plain.usage.forwards, fast.usage.forwards) == (12, 4)
    assert plain.tokens == fast.tokens


def test_rows_that_accept_differently_are_their_rows_alone():
    model, many = MODELS["full"], prompts(3, seed=8)
    for cache in CACHES:
        together = run(model, many, "reference:block=8", "freedave", *cache, max_tokens=12)
        for prompt, out in zip(many, together, strict=True):
            alone = run(model, [prompt], "reference:block=8", "freedave", *cache, max_tokens=12)[0]
            assert (alone.tokens, alone.usage.forwards) == (out.tokens, out.usage.forwards)


def plain_freedave(model: Masked, prompt: list[int], length: int, block: int, d: int) -> tuple[list[int], int]:
    """The published loop for one token per step, T = 0, without a cache: (text, forwards)."""
    x, forwards = [*prompt, *[MASK] * length], 0

    def best(x: list[int], probs: torch.Tensor, low: int, high: int, count: int) -> list[int]:
        ranked = sorted((i for i in range(low, high) if x[i] == MASK), key=lambda i: -float(probs[i].max()))
        return [int(probs[i].argmax()) if i in ranked[:count] else x[i] for i in range(len(x))]

    for low in range(len(prompt), len(x), block):
        high = min(low + block, len(x))
        probs, forwards = model.logits(x).softmax(-1), forwards + 1
        while left := x[low:high].count(MASK):
            if left == 1:
                x = best(x, probs, low, high, 1)
                break
            states = [best(x, probs, low, high, k) for k in range(1, min(d, left - 1) + 1)]
            seen, forwards, b = [model.logits(one).softmax(-1) for one in states], forwards + 1, 0
            while b + 1 < len(states) and best(states[b], seen[b], low, high, 1) == states[b + 1]:
                b += 1
            x, probs = states[b], seen[b]
    return x[len(prompt) :], forwards


@pytest.mark.parametrize("d", [2, 4])
def test_forwards_are_those_of_the_published_loop(d):
    for prompt in prompts(2, seed=5):
        out = run(MODELS["full"], [prompt], "reference:block=8", f"freedave:d={d}", max_tokens=16)[0]
        assert (list(out.tokens), out.usage.forwards) == plain_freedave(MODELS["full"], prompt, 16, 8, d)


def test_a_part_of_a_step_is_taken_by_subset_only():
    model, many = MODELS["full"], prompts(6, seed=4)
    forwards = {}
    for match in ("exact", "subset"):
        outs = run(model, many, "threshold:tau=0.4", f"freedave:d=3,match={match}", max_tokens=16)
        forwards[match] = [out.usage.forwards for out in outs]
        assert all(MASK not in out.tokens and len(out.tokens) == 16 for out in outs)
    assert forwards["exact"] != forwards["subset"]
    assert not FreeDave(Config(match="subset"), MethodContext("tiny", model)).lossless
    one = [run(model, many, "reference:block=8", f"freedave:match={match}") for match in ("exact", "subset")]
    assert [out.tokens for out in one[0]] == [out.tokens for out in one[1]]  # with one token per step it is the same


def test_text_does_not_depend_on_the_clock():
    model, many = MODELS["full"], prompts(3, seed=1)
    expected = run(model, many, "reference:block=8", "canvas-cache")
    assert [one.tokens for one in run(model, many, "reference:block=8", "canvas-cache", "freedave:d=0")] == [
        one.tokens for one in expected
    ]


@pytest.mark.parametrize(
    ("per_state", "accepted", "chosen"), [(1.0, 8, (1, 2, 4, 8)), (0.01, 8, (8,)), (0.0, 1, (1,)), (1.0, 1, (1,))]
)
def test_the_number_of_drafts_is_what_pays(per_state, accepted, chosen):
    depth, seen = Depth(), []
    for _ in range(400):
        count = depth.choose()
        seen.append(count)
        depth.saw(count, min(count, accepted), 1.0 + (count - 1) * (per_state if accepted > 1 else max(per_state, 0.01)))
    assert {1, 2, 4, 8} <= set(seen[:12])
    common = max({1, 2, 4, 8}, key=seen[20:].count)
    assert common in chosen
    assert seen[20:].count(common) > 0.9 * len(seen[20:])


def test_a_draft_decides_no_token():
    """Drafts made of another forward are refused: the steps are those of the state's own."""
    model = MODELS["full"]
    rules = policy(model, "reference:block=8", "freedave")
    row = rules.begin(rules.open(Request((5, 6), SamplingParams(max_tokens=8)), model.capabilities), None)
    at = torch.arange(2, 10)

    def seen(tokens: torch.Tensor, sign: int = 1) -> Forward:
        return Forward((sign * model.logits(tokens)[at]).masked_fill(torch.arange(97) == MASK, -torch.inf), at)

    right, wrong = seen(row.tokens), seen(row.tokens, -1)
    states = rules.stepper.branches(row, wrong, rules.advance)
    taken, last = rules.stepper.settle(row, right, list(states), [seen(one.tokens) for one in states], rules.advance)
    assert len(taken) == 1
    assert torch.equal(taken[0].row.tokens, rules.advance(row, right).row.tokens)
    assert last is not None


def test_more_drafts_than_a_block_has_room_for_are_judged_by_what_they_cost():
    """Else a count that no pass reaches would be tried for ever, as it was on blocks of eight."""
    model = MODELS["full"]
    rules = policy(model, "reference:block=4", "freedave:d=0")
    depth = rules.stepper.depth
    for _ in range(12):
        row = rules.begin(rules.open(Request((5, 6), SamplingParams(max_tokens=4)), model.capabilities), None)
        at, last = torch.arange(2, 6), None
        while row.left:
            own = Forward(model.logits(row.tokens)[at].masked_fill(torch.arange(97) == MASK, -torch.inf), at)
            states = rules.stepper.branches(row, last or own, rules.advance)
            assert len(states) <= 4
            made = [
                Forward(model.logits(one.tokens)[at].masked_fill(torch.arange(97) == MASK, -torch.inf), at)
                for one in states
            ]
            taken, last = rules.stepper.settle(row, last or own, states, made, rules.advance)
            row = taken[-1].row
    assert all(len(depth.seconds[count]) >= Depth.TRIALS for count in Depth.COUNTS)


class Canned:
    """A part of a policy for tests of what is refused."""

    name, range, memoryless, lossless, mutates_committed = "canned", "block", True, False, True

    def revise(self, history, view, row):
        return history, {}


def test_what_cannot_be_checked_is_refused_by_name():
    model = MODELS["full"]
    with pytest.raises(IncompatibleError, match=r"'freedave'.*'canvas-cache'"):
        policy(model, "freedave", "canvas-cache:policy=vicinity")
    with pytest.raises(IncompatibleError, match=r"'freedave'.*'canned'"):
        dataclasses.replace(policy(model, "freedave"), reviser=Canned()).check(model.capabilities)
    with pytest.raises(IncompatibleError, match="one stepper"):
        policy(model, "freedave", "freedave:d=2")


class Plans:
    """Blocks of 3 to 7, by what the model thinks of the first open position."""

    name, range, memoryless, lossless, mutates_committed = "plans", "block_start_full", True, False, False

    def plan(self, view, row):
        return row.window[0] + 3 + int(view.x0[0]) % 5


class Ends:
    """Cuts the canvas behind a token below 12, or fills it when everything is sure by `sure`."""

    name, range, memoryless, lossless, mutates_committed = "ends", "all_masked", True, False, False

    def __init__(self, when, sure=0.0):
        self.when, self.sure = when, sure

    def check(self, view, row, chosen):
        if self.when == "before":
            return ("fill_all" if float(view.prob[view.masked].min()) > self.sure else "continue"), -1
        found = view.positions[chosen & (view.x0 < 12)]
        return ("truncate", int(found[-1]) + 1) if len(found) else ("continue", -1)


class Sums:
    """Adds what all forwards of the block said so far: a draft that kept its own history would be found out."""

    name, range, memoryless, lossless, mutates_committed = "sums", "block", False, False, False

    def apply(self, history, view, row):
        logits = view.logits.clamp(min=-20)
        total = logits if history is None else history + logits
        return total, view.logits + 0.5 * total


@pytest.mark.parametrize("cache", [(), ("canvas-cache",)])
@pytest.mark.parametrize("part", ["plans", "cuts", "fills", "sums"])
def test_other_parts_act_on_confirmed_states(part, cache):
    """Blocks planned from a forward, a canvas that gets shorter or is filled, a stage that remembers: as without drafts."""
    model, ended = MODELS["full"], []
    extra = {
        "plans": {"planner": Plans()}, "sums": {"stages": (Sums(),)}, "cuts": {"stops": (Ends("after"),)}, "fills": {"stops": (Ends("before", 0.2),)}
    }[part]  # fmt: skip
    for names in ((), ("freedave",)):
        rules = dataclasses.replace(policy(model, "reference:block=8", *names, *cache), **extra).check(model.capabilities)
        engine = Engine(model, cache_bytes=64_000_000)
        params = SamplingParams(max_tokens=16, ignore_eos=True, seed=7)
        outs = engine.run([(Request(tuple(p), params), Parts(canvas=rules)) for p in prompts(4, seed=6)])
        ended.append(outs)
    plain, *drafted = [[(out[0].tokens, out[0].usage.forwards) for out in outs] for outs in ended]
    for fast in drafted:
        assert [tokens for tokens, _ in fast] == [tokens for tokens, _ in plain]
        assert sum(n for _, n in fast) < sum(n for _, n in plain) or part == "fills"
    if part == "cuts":
        assert any(len(tokens) < 16 for tokens, _ in plain)
    if part == "fills":
        assert any(n < 16 for _, n in plain)


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [("d=-1", "d", "16"), ("d=17", "d", "16"), ("match=some", "match", "subset"), ("d=0,match=subset", "d", "match exact")],
)
def test_bad_settings_are_refused_by_name(settings, field, words):
    with pytest.raises(ConfigError, match=words) as caught:
        registry.build(f"freedave:{settings}", MethodContext("tiny", MODELS["full"]))
    assert caught.value.field == f"freedave.{field}"
