"""How canvas parts combine: one place one part, illegal pairs refused by both names, and a step that is a pure function."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from canvases import MASK, Masked, policy

from hasten import registry
from hasten.combine import presets
from hasten.engine.contracts import MethodContext
from hasten.engine.parts import FIXED, PROMPT, SLOT, Forward
from hasten.errors import ConfigError, IncompatibleError
from hasten.policy import Policy
from hasten.types import Request, SamplingParams


class Part:
    """A part that claims whatever it is told to."""

    range, memoryless, lossless, mutates_committed = "block", True, False, False

    def __init__(self, name: str, **claims: object) -> None:
        self.name = name
        for key, value in claims.items():
            setattr(self, key, value)


@pytest.mark.parametrize("place", ["planner", "schedule", "scorer", "stepper", "reviser", "cache"])
def test_a_place_for_one_is_not_given_twice(place):
    one, two = Policy(**{place: Part("a")}), Policy(**{place: Part("b")})
    with pytest.raises(IncompatibleError, match=rf"'a' cannot be combined with 'b'.*one {place}"):
        one.join(two)
    assert getattr(one.join(Policy()), place).name == "a"
    assert getattr(Policy().join(two), place).name == "b"


def test_places_for_several_take_all_in_order():
    one = Policy(selectors=(Part("a"),), stops=(Part("x"),))
    two = Policy(selectors=(Part("b"),), scores=(Part("y"),))
    joined = one.join(two)
    assert [part.name for part in joined.selectors] == ["a", "b"]
    assert [part.name for part in joined.parts] == ["y", "a", "b", "x"]


def test_pins_of_two_methods_may_not_meet():
    assert Policy(pins={1: 5}).join(Policy(pins={2: 6})).pins == {1: 5, 2: 6}
    with pytest.raises(IncompatibleError, match="offset 1"):
        Policy(pins={1: 5}).join(Policy(pins={1: 5}))


def test_a_baseline_gives_only_what_is_missing():
    done = Policy(selectors=(Part("mine"),)).over(Policy(selectors=(Part("base"),), cache=Part("cache")))
    assert ([part.name for part in done.selectors], done.cache.name) == (["mine"], "cache")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"stepper": Part("verify", verifies=True), "reviser": Part("undo", mutates_committed=True)}, "'verify'.*'undo'"),
        (
            {"stops": (Part("early", range="all_masked"),), "reviser": Part("undo", mutates_committed=True)},
            "'early'.*'undo'",
        ),
        ({"stepper": Part("verify", verifies=True), "cache": Part("often", periodic=True)}, "'verify'.*'often'"),
    ],
)
def test_illegal_pairs_are_refused_by_both_names(parts, words):
    with pytest.raises(IncompatibleError, match=words):
        Policy(**parts).check(Masked().capabilities)


def test_a_planner_of_blocks_is_refused_on_a_model_of_blocks():
    plans = Policy(planner=Part("plans", range="block_start_full"))
    assert plans.check(Masked().capabilities) is plans
    with pytest.raises(IncompatibleError, match=r"'plans'.*blocks of 4"):
        plans.check(Masked(block=4).capabilities)


def test_an_incomplete_policy_says_what_is_missing():
    with pytest.raises(IncompatibleError, match="no schedule"):
        Policy().open(Request((5,), SamplingParams(max_tokens=4)), Masked().capabilities)


def test_a_canvas_knows_prompt_fixed_text_and_slots():
    model = Masked()
    row = policy(model).open(Request((5, 6), template=(-1, 9, -1)), model.capabilities)
    assert row.provenance.tolist() == [PROMPT, PROMPT, SLOT, FIXED, SLOT]
    assert row.accepted.tolist() == [True, True, False, True, False]
    assert row.tokens.tolist() == [5, 6, MASK, 9, MASK]
    assert (row.prompt_len, row.end, row.planned) == (2, 5, 2)


def test_pins_are_fixed_text_and_may_not_cover_a_template():
    model = Masked()
    pinned = dataclasses.replace(policy(model), pins={1: 9})
    assert pinned.open(Request((5,), SamplingParams(max_tokens=3)), model.capabilities).tokens.tolist() == [
        5,
        MASK,
        9,
        MASK,
    ]
    for request in (Request((5,), template=(-1, 7)), Request((5,), SamplingParams(max_tokens=1))):
        with pytest.raises(ConfigError, match="free offset"):
            pinned.open(request, model.capabilities)


def test_a_step_changes_nothing_it_is_given():
    model = Masked()
    made = policy(model, "threshold:tau=0.1", "reference:block=8,steps=6")
    row = made.begin(made.open(Request((5, 6), SamplingParams(max_tokens=16)), model.capabilities), None)
    forward = Forward(model.logits(row.tokens), torch.arange(len(row.tokens)))
    before = (row.tokens.clone(), row.accepted.clone(), forward.logits.clone(), dict(row.history))
    first, second = made.advance(row, forward), made.advance(row, forward)
    assert torch.equal(row.tokens, before[0])
    assert torch.equal(row.accepted, before[1])
    assert torch.equal(forward.logits, before[2])
    assert row.history == before[3]
    assert first.writes == second.writes
    assert torch.equal(first.row.tokens, second.row.tokens)
    assert len(first.writes) == int(first.row.accepted.sum() - row.accepted.sum()) >= 2


def test_logit_bias_reaches_the_candidates():
    model = Masked()
    made = policy(model)
    sampling = SamplingParams(max_tokens=8, logit_bias={42: 100.0})
    row = made.begin(made.open(Request((5, 6), sampling), model.capabilities), None)
    taken = made.advance(row, Forward(model.logits(row.tokens), torch.arange(len(row.tokens))))
    assert [token for _, token, _ in taken.writes] == [42]


def test_presets_stand_for_parts_and_take_no_settings():
    for name, parts in registry.PRESETS.items():
        assert registry.expand((name, "threshold")) == (*parts, "threshold")
    assert registry.expand(("threshold:tau=0.5",)) == ("threshold:tau=0.5",)
    with pytest.raises(ConfigError, match="preset"):
        registry.expand(("fast:tau=1",))


def test_presets_are_those_of_the_kind_of_model():
    full, blocks = Masked().capabilities, dataclasses.replace(Masked().capabilities, block=8)
    assert presets(full) is registry.PRESETS
    assert presets(dataclasses.replace(full, mask_id=None))["auto"] == ("diffusion-gemma",)
    assert presets(blocks)["fast"] == ("factor:f=0.5",), "its cache is there anyhow"
    assert {**presets(blocks), "fast": ()} == {**registry.PRESETS, "fast": ()}


def test_every_part_declares_what_the_checks_ask():
    context = MethodContext("tiny", Masked())
    for slug, module in registry.modules().items():
        if module.startswith("hasten.unmask.") and slug not in ("learn2pd",):  # needs weights made for a model
            spec = f"{slug}:ids=5" if slug == "adablock" else slug  # whose delimiters come from a tokenizer
            for part in registry.build(spec, context).policy.parts:
                assert part.range in ("block", "all_masked", "block_start_full")
                assert {type(part.memoryless), type(part.lossless), type(part.mutates_committed)} == {bool}
