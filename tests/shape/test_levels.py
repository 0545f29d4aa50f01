"""Imports point downwards: design.md section 3, checked on every import of every file."""

from __future__ import annotations

import pytest
from source_tree import METHOD_FOLDERS, PACKAGE, level_findings, package, source

FILES = package()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.path)
def test_a_file_imports_only_lower_levels(file):
    assert level_findings(file) == []


def test_the_walk_sees_the_package():
    paths = {file.path for file in FILES}
    assert {"__init__.py", "engine/engine.py", "models/load.py", "draft/prompt_lookup.py", "cli/run.py"} <= paths


@pytest.mark.parametrize(
    ("path", "text", "names"),
    [
        ("errors.py", "from hasten.engine.engine import Engine", "engine"),
        ("types.py", "import hasten.models.load", "models"),
        ("engine/ar.py", "from hasten.draft import prompt_lookup", "draft"),
        ("engine/ar.py", "from ..models.load import load", "models"),
        ("engine/ar.py", "def f():\n    from hasten import models", "models"),
        ("engine/ar.py", "from hasten import LLM", "llm"),
        ("engine/ar.py", "import transformers", "transformers"),
        ("engine/limits.py", "from hasten.engine.trace import Trace", "engine"),
        ("kernels/stack.py", "from hasten.models.config import ModelConfig", "models"),
        ("models/load.py", "from transformers.models import llama", "transformers"),
        ("draft/rsd.py", "from hasten.logits.uscd import Uscd", "logits"),
        ("draft/rsd.py", "from hasten.llm import LLM", "llm"),
        ("draft/rsd.py", "import hasten", "llm"),
        ("llm.py", "from hasten.draft.prompt_lookup import PromptLookup", "draft"),
        ("bench/report.py", "from hasten.train.loop import fit", "train"),
        ("serve/app.py", "from rich.table import Table", "rich"),
        ("llm.py", "from hasten.cli import app", "cli"),
        ("extra.py", "x = 1", "no level"),
    ],
)
def test_a_wrong_import_is_found(path, text, names):
    found = level_findings(source(path, text))
    assert len(found) == 1
    assert names in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("engine/ar.py", "from hasten.engine.limits import LIMITS\nfrom . import trace\nfrom hasten import errors"),
        ("models/hf.py", "import transformers\nfrom hasten.engine.contracts import RowInput"),
        ("draft/rsd.py", "from hasten.models.config import ModelConfig\nfrom hasten.draft import _tree\nimport torch"),
        ("llm.py", "from hasten import registry\nfrom hasten.models.load import load"),
        ("bench/report.py", "import hasten\nfrom hasten.draft.prompt_lookup import Config"),
        ("cli/run.py", "from hasten import __version__\nimport typer"),
    ],
)
def test_a_right_import_passes(path, text):
    assert level_findings(source(path, text)) == []


def test_every_method_folder_on_disk_is_known_to_the_registry():
    from hasten.registry import FOLDERS

    assert FOLDERS == METHOD_FOLDERS
    folders = {entry.name for entry in PACKAGE.iterdir() if (entry / "__init__.py").is_file()}
    assert folders <= {*METHOD_FOLDERS, "engine", "models", "kernels", "train", "bench", "serve", "cli", "worlds"}
