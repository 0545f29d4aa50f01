"""The pages made from the code are current, and commands and links in the docs lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
from source_tree import METHOD_FOLDERS, ROOT

from hasten.registry import modules

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\((?![a-z]+:|#)([^)#]+)(?:#[^)]*)?\)")


def generator() -> ModuleType:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_regenerated_pages_equal_the_committed_ones():
    made = generator().pages()
    assert {"cli.md", "limits.md", "prompt-lookup.md"} <= {path.name for path in made}
    stale = [path.name for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    assert stale == [], "run `make docs`"


def test_a_changed_card_makes_a_page_stale(monkeypatch):
    import dataclasses

    from hasten import registry

    original = registry.card
    module, changed = generator(), dataclasses.replace(original("prompt-lookup"), claim="Another | claim.")
    before = module.pages()
    monkeypatch.setattr(registry, "card", lambda slug: changed if slug == changed.slug else original(slug))
    after = module.pages()
    assert [path.name for path in before if before[path] != after[path]] == ["prompt-lookup.md"]
    assert "## How it works" in after[module.DOCS / "methods" / "prompt-lookup.md"]


def test_the_command_page_names_every_option_that_help_prints():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in ("run", "chat", "methods", "pull", "train", "reproduce", "doctor"):
        section = text.split(f"## hasten {name}")[1].split("\n## ")[0]
        command = [sys.executable, "-m", "hasten", name, "--help"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "150"})
        options = set(re.findall(r"--[a-z][a-z-]+", printed.stdout)) - {"--help"}
        assert options
        assert {option for option in options if f"`{option}" not in section} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("slug", [slug for slug, name in modules().items() if name.split(".")[1] in METHOD_FOLDERS])
def test_the_page_of_a_method_says_how_it_works_and_when_it_does_not_help(slug):
    text = (ROOT / "docs" / "methods" / f"{slug}.md").read_text(encoding="utf-8")
    for heading in ("How it works", "Where it does not help"):
        assert text.count(f"\n## {heading}\n") == 1
        section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        assert len(section.split()) > 15, f"{slug}: {heading}"


def test_what_choosing_says_about_its_tables_holds():
    """The tables follow the result files; the sentences beside them do not, and are to be rewritten when this fails."""
    folder = ROOT / "bench" / "results"
    spec, canvas, serve = (json.loads((folder / f"{name}.json").read_text()) for name in ("spec", "canvas", "serve"))

    def speeds(setup: str, group: str) -> dict[str, float]:
        ours = ("prompt-lookup", "token-recycling", "auto")
        return {name: spec[setup][group][name]["decode_ratio"]["mean"] for name in ours}

    for setup in ("exact", "int8"):
        for group in ("edit", "code", "summary"):
            found = speeds(setup, group)
            assert max(found, key=found.__getitem__) in ("prompt-lookup", "auto")
        chat = speeds(setup, "chat")
        assert max(abs(chat[name] - 1) for name in ("prompt-lookup", "auto")) < 0.05
        assert 0.85 < chat["token-recycling"] < 0.95
    for name in ("prompt-lookup", "auto"):
        assert speeds("int8", "all")[name] > speeds("exact", "all")[name]
    groups = [group for group in spec["bfloat16"] if group != "pass_ms"]
    assert min(speeds("bfloat16", group)["auto"] for group in groups) > 1.05
    for group in ("arithmetic", "context", "summary"):
        assert speeds("bfloat16", group)["auto"] > speeds("bfloat16", group)["prompt-lookup"] + 0.05
    assert 1.05 < speeds("exact", "all")["auto"] < 1.15
    for arms in canvas["canvases"].values():
        speed = {name: one["speedup"]["median"] for name, one in arms.items()}
        assert speed["dual cache + threshold"] > max(speed["dual cache"], speed["threshold"]) > 1.5
        assert speed["exact"] < 1.05
        right = {name: one["accuracy"]["median"] for name, one in arms.items()}
        assert right["reference"] > 30
        lost = {
            name: right["reference"] - right[name]
            for name in ("threshold", "dual cache + threshold", "dual cache + factor")
        }
        assert max(lost["threshold"], lost["dual cache + threshold"]) <= 100 / 24 + 0.1
        assert lost["dual cache + factor"] <= 100 / 6 + 0.1
        assert speed["dual cache + threshold"] > 0.95 * speed["dual cache + factor"], "or `fast` should be the other"
    eight = [serve["against"][name]["8"]["tokens_per_s"]["median"] for name in ("hasten", "hasten plain")]
    assert eight[0] < eight[1]
