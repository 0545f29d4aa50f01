"""One name per method: its file, card, config, test file and docs page all follow from the slug."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest
from source_tree import METHOD_FOLDERS, PACKAGE, ROOT

from hasten import registry
from hasten.types import MethodCard

METHODS = [
    (folder, path.stem)
    for folder in METHOD_FOLDERS
    for path in sorted((PACKAGE / folder).glob("*.py"))
    if not path.stem.startswith("_")
]
METHODS += [
    (work.folder, work.slug.replace("-", "_"))
    for work in registry.works()
    if work.folder in registry.MIXED and (PACKAGE / work.folder / f"{work.slug.replace('-', '_')}.py").is_file()
]


def test_the_registry_finds_exactly_these_files():
    ours = {slug: name for slug, name in registry.modules().items() if name.startswith("hasten.")}
    assert ours == {stem.replace("_", "-"): f"hasten.{folder}.{stem}" for folder, stem in METHODS}
    assert len(ours) == len(METHODS), "two folders hold a file of the same name"


@pytest.mark.parametrize(("folder", "stem"), METHODS)
def test_the_module_declares_its_card_config_and_class(folder, stem):
    module = importlib.import_module(f"hasten.{folder}.{stem}")
    slug = stem.replace("_", "-")
    card = module.card
    assert isinstance(card, MethodCard)
    assert (card.slug, card.plugs_into) == (slug, folder)
    assert all((card.title, card.date, card.claim, card.no_help)), "a card says what is claimed and when it does not help"
    assert dataclasses.is_dataclass(module.Config)
    assert module.Config.__dataclass_params__.frozen
    assert {field.name for field in dataclasses.fields(module.Config)} == set(card.knobs), "each knob is explained"
    module.Config()  # the defaults are inside their own ranges
    assert callable(module.method)


@pytest.mark.parametrize(("folder", "stem"), METHODS)
def test_the_method_has_its_test_file(folder, stem):
    path = ROOT / "tests" / folder / f"test_{stem}.py"
    assert path.is_file(), f"write {path.relative_to(ROOT)}"
    assert "def test_" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("folder", "stem"), METHODS)
def test_the_method_has_its_docs_page(folder, stem):
    path = ROOT / "docs" / "methods" / f"{stem.replace('_', '-')}.md"
    assert path.is_file(), f"write {path.relative_to(ROOT)}; `make docs` fills in the card"


def test_no_docs_page_outlives_its_method():
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {stem.replace("_", "-") for _, stem in METHODS}


def test_a_landed_work_says_what_its_card_says():
    landed = {work.slug: work for work in registry.works() if work.state == "works"}
    for slug, work in landed.items():
        card = registry.card(slug)
        assert (work.paper, work.date, work.exactness) == (card.paper, card.date, card.exactness)


def test_a_landed_work_has_its_reproduction():
    from hasten.bench.reproduce import find, slugs

    landed = {work.slug for work in registry.works() if work.state == "works"}
    assert landed <= set(slugs()), "write bench/reproduce/<slug>.py"
    known = {work.slug for work in registry.works()}
    assert set(slugs()) <= known, "a reproduction is named after its work"
    for slug in slugs():
        module = find(slug)
        assert len(module.claim_checked) > 60
        assert module.claim_checked.endswith(".")
        assert list(inspect.signature(module.reproduce).parameters) == ["quick", "progress"]
