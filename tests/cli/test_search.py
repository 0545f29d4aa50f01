"""`hasten methods`: every field of the catalog is shown and searched, the best match comes first, typos have a hint."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten as package
from hasten import registry
from hasten.bench import dllm_survey

CATALOG = registry.catalog()
FIELDS = {"slug", "title", "state", "exactness", "paper", "date", "venue", "folder", "plugs_into", "claim", "does",
          "no_help", "needs", "conflicts", "knobs", "show", "file"}  # fmt: skip


def texts(value) -> list[str]:
    """Every text within a field."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def test_the_catalog_holds_every_work_and_every_method_with_the_same_fields():
    assert all(set(entry) == FIELDS == set(registry.SEARCHED) for entry in CATALOG)
    slugs = [entry["slug"] for entry in CATALOG]
    assert set(slugs) == {work.slug for work in registry.works()} | {card.slug for card in package.methods()}
    assert len(slugs) == len(set(slugs))
    by_slug = {entry["slug"]: entry for entry in CATALOG}
    for card in package.methods():
        entry = by_slug[card.slug]
        assert {field: entry[field] for field in card.to_dict()} == card.to_dict()
        assert (entry["state"], entry["file"]) == ("works", registry.modules()[card.slug].replace(".", "/") + ".py")
    for work in registry.works():
        entry = by_slug[work.slug]
        assert (entry["does"], entry["state"], entry["venue"], entry["show"]) == (
            work.claim,
            work.state,
            work.venue,
            work.show,
        )
        assert all(entry[field] for field in ("title", "paper", "date", "exactness", "claim", "folder"))
        assert bool(entry["file"]) == (work.state == "works")


def test_every_text_of_every_entry_is_found_and_shown(hasten):
    """Whatever a card says, a search for its words has the entry among its answers, and its page says it."""
    for entry in CATALOG:
        for field in FIELDS:
            for text in filter(None, texts(entry[field])):
                words = [word for word in text.split() if "=" not in word]
                assert registry.search([entry], words, registry.SEARCHED) == [entry], (entry["slug"], field)
    for slug in ("threshold", "lavida"):
        entry = next(one for one in CATALOG if one["slug"] == slug)
        page = hasten("methods", slug).out
        assert all(text in page for field in FIELDS for text in texts(entry[field]))


def test_the_list_shows_slug_state_exactness_paper_date_file_title_and_claim(hasten):
    listed = hasten("methods").out
    for entry in CATALOG:
        line = next(line for line in listed.splitlines() if line.startswith(f"{entry['slug']}  "))
        for field in ("state", "exactness", "paper", "date", "file"):
            assert entry[field] in line
        assert f"    {entry['title']}\n    {entry['claim']}\n" in listed


@pytest.mark.parametrize(
    ("query", "first"),
    [
        (["freedave"], "freedave"),
        (["token", "recycling"], "token-recycling"),
        (["2509.26432"], "adablock"),
        (["survey"], "dllm-survey"),
        (["cache", "vicinity"], "canvas-cache"),
        (["hasten/draft/rsd.py"], "rsd"),
        (["EAGLE"], "eagle"),
    ],
)
def test_the_best_match_comes_first(hasten, query, first):
    assert json.loads(hasten("methods", *query, "--json").out)[0]["slug"] == first


def test_a_hit_in_the_name_beats_one_in_the_text():
    entries = [
        {"slug": "aa", "claim": "like beta"}, {"slug": "betamax", "claim": ""}, {"slug": "bb", "claim": "alphabetadelta"},
        {"slug": "beta", "claim": ""}, {"slug": "beta-two", "claim": ""},
    ]  # fmt: skip
    found = registry.search(entries, ["BETA"], {"slug": 30, "claim": 5})
    assert [one["slug"] for one in found] == ["beta", "beta-two", "betamax", "aa", "bb"]
    assert registry.search(entries, [], {"slug": 30}) == entries
    assert [one["slug"] for one in registry.search(entries, ["beta", "like"], {"slug": 30, "claim": 5})] == ["aa"]


WORDS = st.one_of(
    st.sampled_from(sorted({word for entry in CATALOG for word in f"{entry['slug']} {entry['claim']}".split()})),
    st.text(st.characters(blacklist_characters="=", blacklist_categories=("Cs", "Z")), min_size=1, max_size=8),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, max_size=3))
def test_any_words_find_exactly_the_entries_that_hold_them_all(words):
    def holds(entry, word: str) -> bool:
        return any(word.lower() in str(text).lower() for field in FIELDS for text in texts(entry[field]))

    found = registry.search(CATALOG, words, registry.SEARCHED)
    assert {one["slug"] for one in found} == {one["slug"] for one in CATALOG if all(holds(one, word) for word in words)}
    if not found:
        assert len(registry.near(CATALOG, words, registry.SEARCHED)) <= 3


def test_a_field_can_be_asked_for_alone(hasten):
    found = json.loads(hasten("methods", "needs=full", "--json").out)
    assert {one["slug"] for one in found} == {one.slug for one in package.methods() if "full" in one.needs}
    planned = json.loads(hasten("methods", "state=planned folder=bench", "--json").out)
    assert {one["slug"] for one in planned} == {
        w.slug for w in registry.works() if (w.folder, w.state) == ("bench", "planned")
    }
    nothing = json.loads(hasten("methods", "needs=none", "state=works", "--json").out)
    assert {one["slug"] for one in nothing} == {one.slug for one in package.methods() if not one.needs}
    refused = hasten("methods", "stat=planned")
    assert (refused.code, "'state'" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("query", "meant"),
    [("tokn-recycling", "token-recycling"), ("frredave", "freedave"), ("speculativ3", "speculative"), ("promt", "prompt")],
)
def test_a_typo_has_a_hint(hasten, query, meant):
    result = hasten("methods", query)
    assert result.code == 0
    assert f"nothing matches {query!r}; did you mean " in result.out
    assert repr(meant) in result.out


def test_a_word_that_is_like_nothing_has_no_hint(hasten):
    assert hasten("methods", "zzzzqq").out == "nothing matches 'zzzzqq'; `hasten methods` lists all\n"
    assert hasten("methods", "freedave", "lookup").out.startswith("nothing matches 'freedave lookup'; `hasten")


def test_a_methods_name_in_full_shows_its_page_though_others_tell_of_it(hasten):
    assert len(registry.search(CATALOG, ["threshold"], registry.SEARCHED)) > 1
    assert hasten("methods", "threshold").out.startswith("slug: threshold\n")


# --- families ---


def test_families_are_a_table_of_all_columns(hasten):
    lines = hasten("methods", "--families").out.splitlines()
    assert re.split(r"  +", lines[0]) == [name.replace("_", " ") for name in dllm_survey.COLUMNS]
    assert [re.split(r"  +", line) for line in lines[1:]] == [
        list(dllm_survey.cells(one)) for one in dllm_survey.families()
    ]


def test_families_answer_questions_and_one_is_shown_in_full(hasten):
    found = json.loads(hasten("methods", "--families", "cache=exact", "loads=hasten", "--json").out)
    assert [one["name"] for one in found] == ["llada-2.0", "llada-2.1", "sdar", "trado", "fast-dllm-v2", "mini-bdlm"]
    assert found[2]["mask_id"] == {"value": 151669, "source": "JetLM/SDAR-1.7B-Chat"}
    assert found[2]["parts"]["canvas-cache"]["state"] == "refused"
    page = hasten("methods", "--families", "llada").out
    assert "mask id: 126336  [GSAI-ML/LLaDA-8B-Instruct]" in page
    assert "active: unknown" in page
    assert re.search(r"legal: .*\bfreedave\b", page)
    assert re.search(r"refused: .*\bprompt-lookup\b.* needs 'causal'", page)


def test_families_refuse_wrong_questions_and_hint_at_typos(hasten):
    refused = hasten("methods", "--families", "attention=ful")
    assert (refused.code, refused.out, "'full'" in refused.err) == (2, "", True)
    assert "did you mean 'llada'" in hasten("methods", "--families", "ladda").out
    assert json.loads(hasten("methods", "--families", "zzzz", "--json").out) == []
