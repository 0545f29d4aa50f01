"""`hasten train` end to end on a tiny model: a file that the method then drafts with, and runs that go on when cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hasten as package

SIZES = ("--texts", "10", "--answer", "12", "--tokens", "256", "--vocab", "200")


@pytest.mark.parametrize(
    ("recipe", "ahead", "all_of_it"),
    [("eagle", 4, "floor=0"), ("fspad", 4, "floor=0"), ("hidden-transfer", 3, "floor=0"), ("lud", 3, "beta=0")],
)
def test_a_trained_layer_is_found_by_its_method(hasten, tiny, tmp_path, monkeypatch, recipe, ahead, all_of_it):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    before = hasten("run", tiny, "The quick", "--method", recipe)
    assert before.code == 2
    assert f"hasten train {recipe} {tiny}" in before.err
    result = hasten("train", recipe, tiny, *SIZES, "--steps", "4", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert Path(facts["path"]).is_relative_to(tmp_path)
    assert Path(facts["path"]).stat().st_size == facts["bytes"]
    assert (facts["recipe"], facts["steps"], facts["target"]) == (recipe, 4 if ahead == 4 else 1, tiny)
    assert len(facts["agreement_by_depth"]) == ahead
    plain = hasten("run", tiny, "The quick", "--max-tokens", "20", "--method", "plain")
    drafted = hasten("run", tiny, "The quick", "--max-tokens", "20", "--method", f"{recipe}:{all_of_it}")
    assert drafted.code == 0, drafted.err
    assert drafted.out == plain.out
    assert package.load(tiny).generate("The quick", max_tokens=9, method=[recipe, "prompt-lookup"]).method == (
        recipe, "prompt-lookup",
    )  # fmt: skip


def test_a_small_model_is_aligned_and_drafts(hasten, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    result = hasten("train", "tvdpp", tiny, *SIZES, "--steps", "6", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert (facts["recipe"], facts["loss"], facts["steps"]) == ("tvdpp", "tvdpp", [3, 3])
    assert 0 < facts["acceptance"] <= 1
    plain = hasten("run", tiny, "The quick", "--max-tokens", "20", "--method", "plain")
    drafted = hasten("run", tiny, "The quick", "--max-tokens", "20", "--method", "tvdpp:floor=0")
    assert drafted.code == 0, drafted.err
    assert drafted.out == plain.out
    [made] = (tmp_path / "drafters").rglob("*.safetensors")
    before = made.read_bytes()
    other = hasten("train", "tvdpp", tiny, *SIZES, "--steps", "6", "--loss", "kld")
    assert other.code == 0, other.err
    assert "before aligning" in other.out
    beside = made.with_name("tvdpp-kld.safetensors")  # to compare with, not what the method takes unasked
    assert f"--method tvdpp:weights={beside}" in other.out.replace("\n", "")
    assert beside.is_file()
    assert made.read_bytes() == before
    refused = hasten("train", "tvdpp", tiny, *SIZES, "--loss", "hinge")
    assert refused.code == 2
    assert "train.loss" in refused.err


def test_statistics_are_counted_and_found_by_aded(hasten, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    result = hasten("train", "aded", tiny, *SIZES, "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["pairs"] > 50
    plain = hasten("run", tiny, "The quick", "--max-tokens", "20", "--method", "plain")
    drafted = hasten("run", tiny, "The quick", "--max-tokens", "20", "--method", "aded", "--json")
    assert json.loads(drafted.out)["text"] + "\n" == plain.out
    assert package.load(tiny).parts(("aded",)).drafter.table is not None
    assert package.load(tiny).parts(("aded:table=none",)).drafter.table is None


def test_a_second_run_goes_on_from_the_first(hasten, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    out = str(tmp_path / "layer.safetensors")
    for _ in range(2):
        result = hasten("train", "eagle", tiny, *SIZES, "--steps", "3", "--out", out)
        assert result.code == 0, result.err
        assert "use it" in result.out
    fresh = str(tmp_path / "fresh.safetensors")
    hasten("train", "eagle", tiny, *SIZES, "--steps", "3", "--out", fresh, "--work", str(tmp_path / "other"))
    first, second = load_file(out), load_file(fresh)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = hasten("train", "eagle", tiny, *SIZES, "--steps", "5", "--out", out)
    assert changed.code == 2
    assert "remove it" in changed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "recipe 'nothing'"),
        (("eagle", "--texts", "3"), "train.texts"),
        (("eagle", "--steps", "0"), "train.steps"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model_is_loaded(hasten, arguments, message):
    recipe, *options = arguments
    result = hasten("train", recipe, "no-such-model", *options)
    assert result.code == 2
    assert message in result.err


def test_a_small_model_is_trained_from_nothing(hasten, tmp_path, monkeypatch):
    from dataclasses import replace

    from hasten.train import assess, minis

    recipe = minis.MINIS["mini-ar"]
    small = replace(recipe, shape=replace(recipe.shape, hidden=32, layers=1, heads=2, ffn=48))
    monkeypatch.setattr(minis, "MINIS", {**minis.MINIS, "mini-ar": small})
    monkeypatch.setattr(assess, "SAMPLES", {32: 1})
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    result = hasten("train", "recipes/mini-ar", "--steps", "2", "--tokens", "1100")
    assert result.code == 0, result.err
    assert "sort      32: 0 %" in result.out
    facts = json.loads(hasten("train", "mini-ar", "--steps", "2", "--tokens", "1100", "--no-measure", "--json").out)
    assert (facts["steps_done"], facts["training"]["mixture"]["tokens"]) == (2, 1100)
    assert Path(facts["path"]).is_relative_to(tmp_path)
    llm = package.load(facts["path"])
    assert llm.generate("sort: b a\n", max_tokens=3).usage.completion_tokens <= 3


def test_a_small_model_is_made_surer(hasten, tmp_path, monkeypatch):
    from hasten.train import certainty

    asked = []
    figures = {"accuracy": 90.0, "nfe": 7.5, "tau": 0.2}
    facts = {"path": "there", "bytes": 6_000_000, "minutes": 9.5}
    facts["dparallel"] = {"tau": 0.2, "one_token_per_step": figures, "before": figures, "after": figures}

    def distil(model, config, **where):
        where["progress"]("training", 1, 2)
        asked.append((model, config, where["out"]))
        return facts

    monkeypatch.setattr(certainty, "distil", distil)
    result = hasten("train", "dparallel", "mini-dlm", "--steps", "3", "--out", str(tmp_path))
    assert result.code == 0, result.err
    assert asked == [("mini-dlm", certainty.Config(steps=3), tmp_path)]
    assert "tau 0.2 nats" in result.out
    assert "7.5 forwards per answer" in result.out
    assert json.loads(hasten("train", "dparallel", "mini-dlm", "--json").out) == facts
    assert asked[1][1] == certainty.Config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dparallel", "mini-dlm", "--loss", "tvd"), "--loss does not go with recipe 'dparallel'"),
        (("dparallel", "mini-dlm", "--steps", "0"), "train.steps"),
        (("dparallel", "no-such-model"), "no-such-model"),
        (("dparallel",), "needs a model"),
        (("mini-dlm", "some-model"), "MODEL does not go with recipe 'mini-dlm'"),
        (("recipes/mini-dlm", "--texts", "30"), "--texts does not go with recipe 'mini-dlm'"),
        (("mini-ar", "--steps", "3", "--minutes", "2"), "both given"),
        (("mini-ar", "--start", "somewhere"), "fresh weights"),
        (("mini-ar", "--threads", "0"), "threads"),
        (("eagle", "some-model", "--minutes", "3"), "--minutes does not go with recipe 'eagle'"),
        (("eagle",), "needs a model"),
        (("mini-dml",), "mini-dlm"),
        (("eagle", "some-model", "--no-measure"), "--no-measure does not go with"),
    ],
)
def test_what_does_not_go_together_is_refused(hasten, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    result = hasten("train", *arguments)
    assert result.code == 2
    assert message in result.err
    assert not list(tmp_path.rglob("*.checkpoint"))
