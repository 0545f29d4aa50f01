"""What the source may not contain: code from data, catch-alls, hosts, giant files, public names without a docstring."""

from __future__ import annotations

import re

import pytest
from source_tree import BROAD_EXCEPTS, PACKAGE, ROOT, broad_excepts, danger_findings, package, source, undocumented

FILES = package()
FILE_LINES, ENGINE_LINES = 500, 3_000
URL = re.compile(r"\b[a-z][a-z0-9+.-]*://|\bwww\.", re.IGNORECASE)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.path)
def test_nothing_runs_code_found_in_data(file):
    assert danger_findings(file) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import _pickle as p",
        "from joblib import load",
        "import dill, marshal",
        "import shelve",
        "import zmq.asyncio",
        "from multiprocessing import Queue",
        "import torch.multiprocessing",
        "from torch import multiprocessing",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load",
        "import torch\nread = torch.load",
        "import torch\ntorch.jit.load('x')",
        "import yaml\nyaml.load(text)",
        "from yaml import unsafe_load",
        "eval('1')",
        "exec(text)",
        "run = eval",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "f(trust_remote_code=True)",
        "def f(trust_remote_code=False): ...",
        "f(**{'trust_remote_code': True})",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_code_from_data_is_found(text):
    assert danger_findings(source("models/load.py", text))


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "import safetensors.torch as st\nst.load(b'')",
        "import json\njson.load(f)",
    ],
)
def test_harmless_namesakes_pass(text):
    assert danger_findings(source("models/load.py", text)) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.path)
def test_public_names_have_a_docstring(file):
    assert undocumented(file) == []


def test_a_missing_docstring_is_found():
    text = '"""Module."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\ndef _i(): ...'
    found = undocumented(source("engine/ar.py", text))
    assert found == ["engine/ar.py:4 A.f", "engine/ar.py:6 h"]


def test_broad_excepts_are_the_listed_ones():
    found = {place for file in FILES for place in broad_excepts(file)}
    assert found == BROAD_EXCEPTS, "list a new one with its reason in source_tree.py, and drop those that are gone"


@pytest.mark.parametrize(
    ("handler", "broad"),
    [
        ("except Exception:\n    pass", True),
        ("except:\n    pass", True),
        ("except (OSError, BaseException) as e:\n    raise X from e", True),
        ("except BaseException:\n    clean()\n    raise", False),
        ("except OSError:\n    pass", False),
    ],
)
def test_a_broad_except_is_found(handler, broad):
    file = source("engine/ar.py", "def f():\n    " + ("try:\n    work()\n" + handler).replace("\n", "\n    "))
    assert broad_excepts(file) == ([("engine/ar.py", "f")] if broad else [])


def test_no_host_is_named_in_the_source():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix in (".py", ".json", ".html", ".js", ".css")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if URL.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["https://host/x", "HTTP://host", "s3://bucket", "www.host.org"])
def test_a_host_is_found(text):
    assert URL.search(f'x = "{text}"')


def test_no_python_file_is_over_500_lines():
    folders = ("src", "tests", "docs", "examples", "bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    counts = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(counts) > 50
    assert {path: lines for path, lines in counts.items() if lines > FILE_LINES} == {}


def test_the_engine_stays_small():
    lines = sum(len(file.text.splitlines()) for file in FILES if file.path.startswith("engine/"))
    assert 1_000 < lines <= ENGINE_LINES


def test_examples_stay_short():
    counts = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "examples").glob("*.py")}
    assert counts
    assert {name: lines for name, lines in counts.items() if lines > 40} == {}
