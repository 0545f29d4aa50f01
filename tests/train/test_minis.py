"""The recipes of the small models: what they write, what they begin with, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hasten.errors import ConfigError, FormatError, HastenError, IncompatibleError
from hasten.train import alphabet, minis
from hasten.train.network import Network, Shape

TINY = Shape(hidden=32, layers=2, heads=2, ffn=48)


@pytest.fixture
def small_recipes(monkeypatch):
    """The recipes with networks and numbers of steps for tests."""
    monkeypatch.setattr(
        minis, "MINIS",
        {
            name: replace(one, shape=replace(TINY, kind=one.shape.kind, shift=one.shape.shift), steps=2)
            for name, one in minis.MINIS.items()
        },
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mini-dlm", "mini-ar", "mini-bdlm"])
def test_a_recipe_writes_a_model_with_its_card(name, small_recipes, tmp_path):
    from hasten.train.released import export, read

    how = {"tokens": 1100, "counts": {}, "work": tmp_path / "work", "out": tmp_path / name}
    if name == "mini-bdlm":
        export(Network(replace(TINY, shift=True)), tmp_path / "start", {})
        how["start"] = tmp_path / "start"
    facts = minis.pretrain(name, **how)
    assert (facts["name"], facts["license"], facts["steps_done"]) == (name, "Apache-2.0", 2)
    assert facts["tokens_seen"] > facts["answer_tokens_seen"] > 0
    assert read(tmp_path / name).shape == minis.MINIS[name].shape
    assert minis.pretrain(name, **how)["minutes"] == facts["minutes"], "a finished run is only measured again"


def test_the_recipe_of_mini_dlm_begins_with_its_twin(monkeypatch, tmp_path):
    """Before the first step it foretells what the model in blocks does under one mask; the places behind come into sight
    later."""
    from hasten.models.catalog import MINI
    from hasten.train.released import read

    recipe = minis.MINIS["mini-dlm"]
    monkeypatch.setattr(minis, "MINIS", {"mini-dlm": replace(recipe, steps=1, lr=1e-9)})
    how = {"tokens": 1100, "counts": {}, "work": tmp_path / "work", "out": tmp_path / "out"}
    facts = minis.pretrain("mini-dlm", **how)
    assert facts["started_from"] == "mini-bdlm"
    assert (facts["training"]["masking"]["shaped"], facts["training"]["mixture"]["late"]) == (0.6, recipe.late)
    assert (
        minis.pretrain("mini-dlm", **{**how, "work": tmp_path / "plain"}, form="mgdm")["training"]["masking"]["shaped"] == 0
    )
    made, twin = read(tmp_path / "out"), read(MINI / "mini-bdlm")
    ids = torch.tensor([[alphabet.BOS, *alphabet.encode("sum: 7 5 9\n07+5=12")]])
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with torch.no_grad():
        moved, plain = (one.logits(one(ids, mask=causal)) for one in (made, twin))
    assert torch.equal(moved.argmax(-1), plain.argmax(-1))


def test_the_recipe_of_mini_bdlm_begins_with_all_weights_of_a_dream_and_with_no_other_layout(monkeypatch, tmp_path):
    from hasten.train.released import export, read

    recipe = replace(minis.MINIS["mini-bdlm"], steps=1, lr=1e-9)
    assert (recipe.shape.kind, recipe.shape.shift, recipe.shape.block, recipe.start) == ("block", True, 8, "mini-ar")
    monkeypatch.setattr(minis, "MINIS", {"mini-bdlm": replace(recipe, shape=replace(TINY, kind="block", shift=True))})
    how = {"tokens": 1100, "counts": {}, "work": tmp_path / "work", "out": tmp_path / "out"}
    dream = Network(replace(TINY, shift=True), 3)
    export(dream, tmp_path / "dream", {})
    export(Network(TINY), tmp_path / "llada", {})
    with pytest.raises(IncompatibleError, match=r"layout of llada.*their own token.*Fast_dLLM_Qwen.*the next") as caught:
        minis.pretrain("mini-bdlm", **how, start=tmp_path / "llada")
    assert (caught.value.field, "mini-ar" in caught.value.hint) == ("start", True)
    assert minis.pretrain("mini-bdlm", **how, start=tmp_path / "dream")["started_from"] == "mini-ar"
    made = read(tmp_path / "out").state_dict()
    assert made.keys() == dream.state_dict().keys()
    for name, weight in dream.state_dict().items():
        assert torch.allclose(made[name], weight, atol=2e-3, rtol=1e-3), name


def test_minutes_become_steps_once(small_recipes, tmp_path):
    how = {"tokens": 1100, "counts": {}, "work": tmp_path / "work", "out": tmp_path / "out", "minutes": 0.002}
    facts = minis.pretrain("mini-ar", **how)
    assert facts["steps_done"] >= 1
    assert minis.pretrain("mini-ar", **how)["steps_done"] == facts["steps_done"]


def test_wrong_requests_are_refused(small_recipes, tmp_path):
    for how, message in (
        ({"steps": 1, "minutes": 1.0}, "both given"),
        ({"minutes": 0.0}, "minutes"),
        ({"start": tmp_path}, "fresh weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            minis.pretrain("mini-ar", work=tmp_path / "w", out=tmp_path / "o", **how)
    with pytest.raises(HastenError, match="mini-x"):
        minis.pretrain("mini-x")
    with pytest.raises(FormatError):
        minis.pretrain("mini-bdlm", start=tmp_path / "nothing", work=tmp_path / "w", out=tmp_path / "o")
