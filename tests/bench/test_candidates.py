"""The combinations that are tried: all legal, the same for the same seed, and exact ones really are."""

from __future__ import annotations

import pytest
from planted import Slowed, Trusting, plant

import hasten
from hasten import registry
from hasten.bench import candidates
from hasten.bench.candidates import SETTINGS, candidate, promises_exact, space
from hasten.errors import ConfigError


@pytest.fixture(scope="module")
def writer():
    return hasten.load("mini-ar", cache_bytes=50_000_000)


@pytest.fixture(scope="module")
def filler():
    return hasten.load("mini-dlm", cache_bytes=50_000_000)


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("model", ["mini-ar", "mini-dlm"])
def test_every_candidate_is_legal_and_no_two_are_alike(model, lossy):
    llm = hasten.load(model, cache_bytes=50_000_000)
    found = space(llm, lossy=lossy, seed=3, most=40).candidates
    assert 3 <= len(found) <= 40
    assert len({frozenset(one.methods) for one in found}) == len(found)
    fresh = hasten.load(model, cache_bytes=50_000_000)
    for one in found:
        fresh.parts(one.methods)
        slugs = [registry.parse(name)[0] for name in registry.expand(one.methods)] if one.methods != ("auto",) else []
        assert len(slugs) == len(set(slugs))
        if not lossy:
            assert one.exact
            assert all(registry.card(slug).exactness in ("exact", "distribution") for slug in slugs)


def test_the_same_seed_gives_the_same_candidates(writer, filler):
    for llm in (writer, filler):
        first = space(llm, lossy=True, seed=7, most=30)
        llm.forget()
        assert space(llm, lossy=True, seed=7, most=30) == first
        assert space(llm, lossy=True, seed=8, most=30).candidates != first.candidates
        fewer = space(llm, lossy=True, seed=7, most=10).candidates
        assert fewer == first.candidates[:10]


def test_every_setting_that_is_listed_exists_and_is_in_range():
    for slug, options in SETTINGS.items():
        config = registry.module(slug).Config
        for settings in options:
            _, given = registry.parse(f"{slug}:{settings}")
            kinds = {name: type(getattr(config(), name)) for name in given}
            config(**{name: text == "true" if kinds[name] is bool else kinds[name](text) for name, text in given.items()})
        assert len(set(options)) == len(options)


def test_what_gives_the_baselines_text_by_its_parts(filler, writer):
    for names, exact in (
        (("freedave:d=4",), True), (("auto",), True), (("canvas-cache:refresh=1",), True), (("reference",), True),
        (("canvas-cache",), False), (("freedave:d=4,match=subset",), False), (("threshold",), False), (("dream",), False),
        (("reference:steps=8",), False), (("fast",), False), (("freedave:d=2", "threshold"), False),
    ):  # fmt: skip
        assert promises_exact(filler, names) is exact, names
    assert promises_exact(writer, ("prompt-lookup", "aded:nodes=8"))
    assert promises_exact(writer, ("auto",))


def test_exact_candidates_give_plain_tokens(writer):
    prompts = [writer.encode("copy: cat sun pen cat sun pen\n"), writer.encode("add: 47+85\n")]
    expected = [writer.generate(one, method="plain", max_tokens=32).tokens for one in prompts]
    for one in space(writer, lossy=False, most=12).candidates:
        assert [writer.generate(p, method=list(one.methods), max_tokens=32).tokens for p in prompts] == expected


def test_a_drafter_that_is_believed_is_lossy_whatever_its_card_says(writer, monkeypatch):
    plant(monkeypatch, sly=(Trusting, "exact"), slow=(Slowed, "exact"))
    found = {one.methods: one.exact for one in space(writer, lossy=True, most=60).candidates}
    assert found["sly",] is False
    assert found["slow",] is True
    kept = space(writer, lossy=False, most=60).candidates
    assert all("sly" not in one.methods for one in kept)


def test_illegal_pairs_are_no_candidates_and_reasons_are_told(writer, filler):
    assert candidate(writer, ("threshold",)) is None
    assert candidate(writer, ("prompt-lookup", "prompt-lookup:nodes=4")) is None
    assert candidate(filler, ("freedave:d=4", "remask")) is None
    assert candidate(writer, ("token-recycling", "prompt-lookup")).exact
    left = space(writer, lossy=False).left_out
    assert "hasten train eagle mini-ar" in left["eagle"]
    assert "draft-model" in left
    assert not set(left) & {registry.parse(n)[0] for one in space(writer, lossy=False).candidates for n in one.methods}


def test_on_a_canvas_methods_of_one_place_are_not_combined(filler):
    for one in space(filler, lossy=True, most=120, seed=1).candidates:
        if one.methods in (("auto",), registry.PRESETS["fast"]):
            continue
        claims = [candidates._claims(candidates._build(filler, name).policy) for name in one.methods]
        assert sum(len(claim) for claim in claims) == len(set().union(*claims)), one


@pytest.mark.parametrize("most", [0, 257])
def test_a_wrong_number_is_refused(writer, most):
    with pytest.raises(ConfigError) as caught:
        space(writer, lossy=False, most=most)
    assert caught.value.field == "candidates"
