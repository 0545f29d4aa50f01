"""The registry of diffusion families: its data, what its verdicts rest on, and the models that hasten's loaders make."""

from __future__ import annotations

import copy
import json
from importlib import resources

import diffusion
import pytest

from hasten import registry
from hasten.bench import dllm_survey
from hasten.bench.dllm_survey import AXES, FACTS, Config, Survey, checkpoint, compatible, families, family, parts, read
from hasten.bench.reproduce import dllm_survey as trial
from hasten.engine.contracts import MethodContext
from hasten.errors import ConfigError, UnknownNameError, UnsupportedError
from hasten.models.families import config_from_hf
from hasten.models.hf import CANVASES
from hasten.models.load import load
from hasten.models.masked import MASKED
from hasten.models.stack import capabilities_of

STORED = json.loads((resources.files("hasten.bench") / "families.json").read_text(encoding="utf-8"))
ROWS = STORED["families"]
NAMES = [row["name"] for row in ROWS]
TINY = {  # model type -> tests/diffusion.py
    "llada": "llada", "Dream": "dream", "sdar": "sdar", "llada2_moe": "llada2", "Fast_dLLM_Qwen": "fast",
}  # fmt: skip


# --- the data ---


def test_every_row_is_read_and_the_file_is_in_its_own_form():
    assert [one.name for one in families()] == NAMES
    assert len(set(NAMES)) == len(NAMES) >= 40
    for row in ROWS:
        assert list(row["facts"]) == list(ROWS[0]["facts"]), row["name"]
        assert set(row["facts"]) == set(FACTS)
        assert 2021 <= row["year"] <= 2026
        assert row["paper"] is None or row["paper"][:2] >= "21"


def test_every_fact_names_its_source_and_every_model_its_release():
    for one in families():
        if one.known("weights") == "open":
            assert one.released or one.paper, one.name
        sources = {fact.source for fact in one.facts.values() if fact is not None}
        assert sources, one.name
        hubs = {source for source in sources if "/" in source and not source.startswith("web:")}
        assert hubs <= set(one.released), f"{one.name} takes facts from a release that is not listed"


def test_the_families_that_the_survey_tells_of_are_there():
    told = {"2107.03006", "2211.15029", "2302.05737", "2310.16834", "2406.07524", "2406.04329", "2410.18514", "2410.17891",
            "2503.09573", "2502.09992", "2505.19223", "2508.15487", "2506.20639", "2510.06303", "2505.16990", "2505.16839",
            "2505.16933", "2505.15809", "2505.23606", "2505.20147", "2503.20853", "2506.17298", "2508.02193"}  # fmt: skip
    assert told <= {one.paper for one in families()}


BAD = [
    ("llada", "mask_id", [None, "2502.09992"], "a token id"),
    ("llada", "mask_id", None, "known: hasten loads"),
    ("llada", "mask_id", [126464, "2502.09992"], "below the vocabulary"),
    ("udlm", "mask_id", [5, "2412.10193"], "uniform noise has no mask token"),
    ("sdar", "block", [None, "2510.06303"], "a size with block-causal"),
    ("llada", "block", [32, "2502.09992"], "no blocks"),
    ("dream", "shift", [2, "2508.15487"], "0 or 1"),
    ("dream", "shift", [True, "2508.15487"], "0 or 1"),
    ("dream", "noise", ["absorbed", "2508.15487"], "absorbing, uniform"),
    ("dream", "noise", ["absorbing", "somewhere"], "followed by its source"),
    ("dream", "eos_ids", [151643, "2508.15487"], "a list of token ids"),
    ("dream", "eos_ids", [[152064], "2508.15487"], "below the vocabulary"),
    ("dream", "params", ["7B", "2508.15487"], "a number"),
    ("dream", "vocab_size", [None, "2508.15487"], "a number"),
    ("dream", "license", ["", "2508.15487"], "a text"),
]


@pytest.mark.parametrize(("name", "field", "fact", "says"), BAD)
def test_a_wrong_or_contradictory_fact_is_refused_by_its_field(name, field, fact, says):
    row = copy.deepcopy(ROWS[NAMES.index(name)])
    row["facts"][field] = fact
    with pytest.raises(ConfigError, match=says) as caught:
        read(row)
    assert caught.value.field == f"{name}.{field}"


def test_closed_weights_have_no_release_and_fields_are_all_there():
    row = copy.deepcopy(ROWS[NAMES.index("mercury")])
    with pytest.raises(ConfigError, match=r"mercury\.released"):
        read({**row, "released": ["inception/mercury"]})
    del row["facts"]["noise"]
    with pytest.raises(ConfigError, match=r"mercury\.noise"):
        read(row)
    row["facts"] |= {"noise": None, "colour": None}
    with pytest.raises(ConfigError, match=r"mercury\.colour"):
        read(row)


# --- what hasten's loaders make of them ---


def test_which_families_load_is_what_the_loaders_tables_say():
    for one in families():
        expected = "hasten" if one.model_type in MASKED else "transformers" if one.model_type in CANVASES else "no"
        assert one.loads == expected
    by_type = {one.model_type for one in families()}
    assert set(MASKED) | set(CANVASES) <= by_type, "a loader knows a model type that the registry does not tell of"


def declared(capabilities):
    """What legality rests on."""
    c = capabilities
    sights = tuple(c.has(name) for name in ("full", "block_causal", "causal", "self_conditioning"))
    return c.kind, c.logit_shift, c.block, c.mask_id, c.cache_exact, *sights


@pytest.mark.parametrize("name", [name for name in NAMES if family(name).loads == "hasten"])
def test_a_released_config_gives_the_capabilities_that_the_registry_states(name):
    """The released sizes of vocabulary and window on a tiny stack; ids that config.json leaves out come from the loader."""
    one = family(name)
    raw = dict(diffusion.VARIANTS[TINY[one.model_type]])
    for field in ("mask_token_id", "block_size", "bd_size", "pad_token_id", "bos_token_id"):
        raw.pop(field, None)
    bundled = one.known("weights") == "bundled"
    raw |= {"vocab_size": one.known("vocab_size") or 160000, "eos_token_id": one.known("eos_ids"), "embedding_size": None}
    raw |= {"mask_token_id": one.known("mask_id"), "bd_size": one.known("block")} if bundled else {}
    made = capabilities_of(config_from_hf(raw), hooks=True)
    assert declared(made) == declared(one.capabilities)
    assert made.eos_ids == one.capabilities.eos_ids
    if one.known("vocab_size"):
        assert made.vocab_size == one.capabilities.vocab_size
    assert (one.cache == "exact") == bool(made.cache_exact)


@pytest.mark.parametrize("kind", MASKED)
def test_a_tiny_checkpoint_loads_round_and_declares_what_its_family_does(kind, tmp_path):
    config = diffusion.VARIANTS[TINY[kind]]
    diffusion.write(tmp_path, config, diffusion.state(config))
    model = load(tmp_path, backbone="torch").model
    same = [one for one in families("loads=hasten") if one.model_type == kind]
    assert same
    for one in same:
        stated, made = one.capabilities, model.capabilities
        assert (made.kind, made.logit_shift, made.block is None) == (stated.kind, stated.logit_shift, stated.block is None)
        assert (made.cache_exact, made.visibilities) == (stated.cache_exact, stated.visibilities)
        assert (made.mask_id is None) == (stated.mask_id is None)
    assert Survey(Config(), MethodContext("x", model)).families == tuple(
        one for one in same if one.known("weights") != "bundled"
    )


@pytest.mark.parametrize("name", ["mini-dlm", "mini-bdlm"])
def test_a_bundled_model_is_what_its_row_says(name):
    loaded = load(name)
    assert declared(loaded.model.capabilities) == declared(family(name).capabilities)
    assert loaded.model.capabilities.max_len == family(name).known("max_len")
    assert round(loaded.config.parameters / 1e9, 4) == family(name).known("params")
    assert [one.name for one in Survey(Config(), MethodContext(name, loaded.model)).families] == [name]


def test_diffusion_gemma_is_what_transformers_and_our_adapter_say():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DiffusionGemmaConfig"):
        pytest.skip("this transformers has no DiffusionGemma")
    import torch

    from hasten.models.diffusion_gemma import DiffusionGemma

    one, config = family("diffusion-gemma"), transformers.DiffusionGemmaConfig()
    text = config.get_text_config()
    assert one.known("block") == config.canvas_length
    assert one.known("vocab_size") == text.vocab_size
    assert one.known("max_len") == text.max_position_embeddings
    small = transformers.DiffusionGemmaConfig(
        text_config=dict(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, sliding_window=6,
            layer_types=["full_attention"], max_position_embeddings=128, num_experts=4, top_k_experts=2,
            moe_intermediate_size=24, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        ),
        canvas_length=256, image_token_id=59, boi_token_id=58, eoi_token_id=57,
    )  # fmt: skip
    with torch.device("meta"):
        made = DiffusionGemma(transformers.DiffusionGemmaForBlockDiffusion(small))
    assert declared(made.capabilities) == declared(one.capabilities)
    context = MethodContext("g", made)
    for slug in ("reference", "threshold", "canvas-cache"):
        assert trial.outcome(context, (slug,), 0) == compatible("diffusion-gemma", slug).state == "refused"


# --- verdicts ---

ILLEGAL = [
    ("llada", ("prompt-lookup",), "needs 'causal'"),
    ("llada", ("grammar",), "needs 'causal'"),
    ("llada", ("freedave", "edit"), "text that stays"),
    ("llada", ("freedave", "remask"), "text that stays"),
    ("llada", ("prophet", "edit"), "trusts committed text"),
    ("llada", ("freedave", "canvas-cache:policy=vicinity"), "refreshing inside a block"),
    ("llada", ("threshold", "threshold"), "cannot be combined"),
    ("sdar", ("canvas-cache",), "exact cache already"),
    ("sdar", ("adablock",), "blocks of its own"),
    ("llada-2.0", ("eoser-ass",), "trained on blocks of 32"),
    ("sdar", ("prophet",), "reads the whole canvas"),
    ("udlm", ("threshold",), "no mask token"),
    ("lavida", ("reference",), "no full attention"),
    ("diffusion-gemma", ("reference",), "no mask token"),
    ("diffusion-gemma", ("diffusion-gemma", "threshold"), "no mask token"),
    ("diffusion-gemma", ("fast",), "no mask token"),
    ("llada", ("diffusion-gemma",), "needs 'self_conditioning'"),
    ("udlm", ("auto",), "needs 'self_conditioning'"),
    ("llada", ("dllm-survey",), "no part in filling a canvas"),
    ("llada", ("adablock", "eoser-ass"), "one planner"),
]


@pytest.mark.parametrize(("name", "methods", "why"), ILLEGAL)
def test_illegal_combinations_are_refused_with_a_reason(name, methods, why):
    verdict = compatible(name, *methods)
    assert (verdict.state, why in verdict.reason) == ("refused", True), verdict


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("llada", ("adablock", "creditdecoding", "localleap")),
        ("dream", ("threshold", "canvas-cache", "freedave")),
        ("sdar", ("freedave", "threshold")),
        ("sdar", ("prophet:mode=block",)),
        ("llada-2.1", ("threshold:tau=0.95", "edit")),
        ("mini-dlm", ("learn2pd",)),
        ("llada", ("fast",)),
        ("mmada", ("factor",)),
        ("diffusion-gemma", ("diffusion-gemma:steps=12",)),
        ("diffusion-gemma", ("auto",)),
    ],
)
def test_legal_combinations_are_legal(name, methods):
    assert compatible(name, *methods).state == "legal"


def test_what_must_be_trained_first_says_how():
    verdict = compatible("llada", "learn2pd")
    assert verdict.state == "lacks"
    assert "hasten train learn2pd" in verdict.reason


def test_where_too_little_is_known_there_is_no_verdict():
    for name in ("mercury", "gidd", "seed-diffusion", "sedd-absorbing", "d3pm-absorbing"):
        assert {one["state"] for one in parts(name).values()} == {"unknown"}


def test_verdicts_come_from_the_parts_and_not_from_a_list(monkeypatch):
    """A part that declares another need is judged by it, on families that were never asked."""
    import dataclasses

    original = registry.card
    changed = dataclasses.replace(original("threshold"), needs=("causal",))
    monkeypatch.setattr(registry, "card", lambda slug: changed if slug == "threshold" else original(slug))
    compatible.cache_clear()
    try:
        assert compatible("llada-1.5", "threshold").state == "refused"
    finally:
        compatible.cache_clear()


def test_every_part_is_judged_for_every_family_and_grouped_without_loss():
    slugs = {one.slug for one in registry.cards() if one.plugs_into in registry.FOLDERS}
    for name in NAMES[::4]:
        judged = parts(name)
        assert set(judged) == slugs
        assert all(one["reason"] or one["state"] == "legal" for one in judged.values())
        spread = [slug for _, together, _ in dllm_survey.grouped(name) for slug in together]
        assert sorted(spread) == sorted(slugs)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="'llada'"):
        family("lada")
    with pytest.raises(UnknownNameError, match="'freedave'"):
        compatible("llada", "freedav")
    with pytest.raises(UnsupportedError, match="planned"):
        compatible("llada", "dllm-cfg")
    with pytest.raises(ConfigError, match="methods"):
        compatible("llada")


def test_a_checkpoint_is_named_or_refused_by_its_field():
    assert checkpoint("llada") == "GSAI-ML/LLaDA-8B-Instruct"
    assert checkpoint("mini-dlm") == "mini-dlm"
    assert checkpoint("diffusion-gemma").startswith("google/")
    for name, field in (("mercury", "weights"), ("udlm", "weights"), ("mdlm", "model_type")):
        with pytest.raises(UnsupportedError) as caught:
            checkpoint(name)
        assert caught.value.field == field


# --- questions ---


def names(query: str) -> list[str]:
    return [one.name for one in families(query)]


def test_questions_have_the_answers_that_the_facts_give():
    everything = families()
    assert set(names("cache=exact")) == {one.name for one in everything if one.known("attention") not in (None, "full")}
    assert set(names("noise=uniform")) == {one.name for one in everything if one.known("noise") == "uniform"}
    assert names("mask_id=151666") == ["dream", "dream-coder", "diffucoder"]
    assert set(names("shift=1 loads=hasten")) == {
        "dream",
        "dream-coder",
        "diffucoder",
        "fast-dllm-v2",
        "mini-dlm",
        "mini-bdlm",
    }
    assert names("cache=exact weights=closed") == []
    assert names("LLaDA 2.1")[0] == "llada-2.1"
    assert names("sdar")[0] == "sdar"
    assert "llada-2.0" in names("exact prefix")
    assert names("2508.15487") == ["dream"]
    assert names("GSAI-ML/LLaDA-1.5") == ["llada-1.5"]


def test_allows_asks_the_parts():
    assert set(names("allows=canvas-cache")) == {
        one.name for one in families() if compatible(one.name, "canvas-cache").state in ("legal", "lacks")
    }
    exact = set(names("allows=freedave cache=exact loads=hasten"))
    assert exact == {"llada-2.0", "llada-2.1", "sdar", "trado", "fast-dllm-v2", "mini-bdlm"}


def test_wrong_questions_are_refused_and_typos_have_a_hint():
    for query in ("atention=full", "attention=ful", "allows=freedav"):
        with pytest.raises(UnknownNameError):
            families(query)
    assert families("blok-causal") == []
    assert "block-causal" in dllm_survey.near("blok-causal")


def test_every_word_of_the_taxonomy_is_explained():
    for words in AXES.values():
        assert all(len(meaning) > 3 for meaning in words.values())
    used = {(axis, one.known(axis)) for one in families() for axis in FACTS if axis in AXES}
    assert all(value in AXES[axis] for axis, value in used if value is not None)


# --- the reproduction ---


def test_the_reproduction_runs_through(monkeypatch):
    monkeypatch.setattr(trial, "LAYOUTS", ("dream", "sdar", "fast-dllm-v2"))
    monkeypatch.setattr(trial, "SEEDS", (1,))
    monkeypatch.setattr(trial, "CANVAS", 12)
    monkeypatch.setattr(trial, "PROMPTS", 2)
    seen: list = []
    result = trial.reproduce(True, lambda *at: seen.append(at))
    assert result.direction_holds
    assert result.extra["wrong"] == []
    assert result.quality["method"] == 100.0 > result.quality["baseline"] > 20
    assert seen[-1] == ("asking for parts", result.extra["requests"], result.extra["requests"])
    exact = {bar["label"]: bar["median"] for bar in result.extra["bars"]}
    assert (exact["dream, approximate"] < 1, exact["sdar, exact"]) == (True, 1.0)


def test_a_wrong_forecast_is_found(monkeypatch):
    monkeypatch.setattr(trial, "LAYOUTS", ("sdar",))
    monkeypatch.setattr(trial, "SEEDS", (1,))
    monkeypatch.setattr(trial, "CANVAS", 8)
    monkeypatch.setattr(trial, "PROMPTS", 1)
    monkeypatch.setattr(trial, "foresee", lambda name, methods: "legal")
    result = trial.reproduce(True, lambda *at: None)
    assert not result.direction_holds
    assert {"family": "sdar", "methods": ["adablock"], "foretold": "legal", "came": "refused"} in result.extra["wrong"]
