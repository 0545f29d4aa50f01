"""The names of arms: what `a,b,c+d` means, and what is refused before anything runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hasten
from hasten.bench import arms
from hasten.errors import HastenError, IncompatibleError, UnknownNameError


def test_commas_separate_and_plus_joins():
    assert arms.parse("plain, threshold + canvas-cache,fast") == {
        "plain": ("plain",),
        "threshold+canvas-cache": ("threshold", "canvas-cache"),
        "fast": ("fast",),
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("reference:block=16,steps=8", [("reference:block=16,steps=8",)]),
        ("reference:block=16,steps=8,plain", [("reference:block=16,steps=8",), ("plain",)]),
        ("plain,reference:block=16,steps=8+threshold", [("plain",), ("reference:block=16,steps=8", "threshold")]),
        ("threshold+reference:block=16,steps=8", [("threshold", "reference:block=16,steps=8")]),
        ("threshold:tau=0.8,threshold:tau=0.9", [("threshold:tau=0.8",), ("threshold:tau=0.9",)]),
    ],
)
def test_settings_may_hold_commas(text, parts):
    assert list(arms.parse(text).values()) == parts


PARTS = st.sampled_from(
    ["plain", "threshold", "threshold:tau=0.8", "reference:block=16,steps=8", "token-recycling", "fast"]
)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=5, unique_by=lambda one: "+".join(one)))
def test_what_is_joined_comes_apart_again(many):
    assert arms.parse(",".join("+".join(one) for one in many)) == {"+".join(one): tuple(one) for one in many}


@given(st.text(alphabet="ab,+:= \n\x00plainthreshold", max_size=40))
def test_any_text_is_arms_or_an_error_of_ours(text):
    try:
        found = arms.parse(text)
    except HastenError as error:
        assert str(error)
    else:
        assert found
        assert all(found.values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "methods = ''"), ("plain,", "methods"), ("plain,,fast", "methods"), ("plain+", "methods"), ("+plain", "methods"),
        ("plain,plain", "twice"), ("plain,treshold", "did you mean 'threshold'"), ("threshold:tau=9", "tau"),
        ("threshold:tua=0.5", "tua"), ("plain:x=1", "preset"), ("threshold:tau", "slug:knob=value"),
        (",".join(f"threshold:tau=0.{i}" for i in range(10, 30)), "at most 16"), ("diffucoder", "planned"),
    ],
)  # fmt: skip
def test_a_wrong_arm_is_named(text, says):
    with pytest.raises(HastenError, match=says):
        arms.parse(text)


def test_illegal_pairs_are_refused_before_anything_runs():
    llm = hasten.load("mini-ar", cache_bytes=50_000_000)
    for text, names in (
        ("plain+prompt-lookup", "'plain'"),
        ("threshold", "masked"),
        ("prompt-lookup+prompt-lookup", "combined"),
    ):
        with pytest.raises(IncompatibleError, match=names):
            arms.runners(llm, arms.parse(text), fixed=True)
    assert list(arms.runners(llm, arms.parse("plain,auto"), fixed=True)) == ["plain", "auto"]


def test_peers_are_known_by_name_and_left_out_with_a_reason():
    assert arms.check_peers(["llada", "none", "llada"]) == ("llada",)
    with pytest.raises(UnknownNameError, match=r"llama\.cpp"):
        arms.check_peers(["lama.cpp"])
    why: dict[str, str] = {}
    canvas = hasten.load("mini-dlm", cache_bytes=50_000_000)
    assert list(arms.peers(canvas, ("llada", "transformers"), fixed=False, left_out=why)) == ["LLaDA loop"]
    assert why == {"transformers": "it is for models that write from left to right"}
    why = {}
    writer = hasten.load("mini-ar", cache_bytes=50_000_000)
    assert arms.peers(writer, ("llama.cpp", "dream"), fixed=False, left_out=why) == {}
    assert "GGUF" in why["llama.cpp"]
    assert "fill canvases" in why["dream"]


@pytest.mark.slow
def test_transformers_gives_the_same_answers():
    pytest.importorskip("transformers")
    from hasten.bench.compare import Prompt

    llm = hasten.load("mini-ar", cache_bytes=50_000_000)
    prompt = Prompt(0, "x", tuple(llm.encode("sort: k a d b\n")))
    found = arms.peers(llm, ("transformers",), fixed=False, left_out={})
    assert list(found) == ["transformers", "transformers prompt lookup"]
    plain = llm.generate(list(prompt.ids), method="plain", max_tokens=32).tokens
    for run in found.values():
        assert run(prompt, 32).tokens == plain
    long = arms.peers(llm, ("transformers",), fixed=True, left_out={})["transformers"](prompt, 32)
    assert len(long.tokens) == 32
    assert long.tokens[: len(plain)] == plain
