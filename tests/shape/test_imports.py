"""What importing costs: `import hasten` is quick and light, and every module imports with the core dependencies only."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from source_tree import package

BLOCKED = ("transformers", "pytest", "hypothesis", "ruff", "mypy", "_pytest")
LIGHT = ("torch", "numpy", "transformers", "tokenizers", "gguf", "safetensors", "huggingface_hub", "typer", "rich")
IMPORT_S = 0.3

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COVERAGE_PROCESS_START")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_imports_with_the_core_dependencies_only():
    names = [f"hasten.{f.name}".rstrip(".") for f in package() if f.name not in ("models.hf", "__main__")]
    code = f"{BLOCK}\nimport importlib, json\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    code += f"print(json.dumps([n for n in {BLOCKED!r} if n in sys.modules]))"
    assert json.loads(python(code)) == []


@pytest.mark.parametrize("name", ["transformers", "hypothesis.strategies"])
def test_the_block_blocks(name):
    code = f"{BLOCK}\ntry:\n    import {name}\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert python(code).strip() == f"blocked: {name.partition('.')[0]}"


@pytest.mark.parametrize("name", ["hasten", "hasten.registry", "hasten.types", "hasten.errors", "hasten.engine.limits"])
def test_level_0_is_standard_library_only(name):
    code = f"import sys, {name}\nprint([n for n in {LIGHT!r} if n in sys.modules])"
    assert python(code).strip() == "[]"


def test_the_command_line_imports_no_model_code():
    code = f"import sys, hasten.cli\nprint([n for n in {LIGHT[:-2]!r} if n in sys.modules])"
    assert python(code).strip() == "[]"


@pytest.mark.parametrize("name", ["hasten", "hasten.cli"])
def test_import_is_quick(name):
    code = f"import time\nstart = time.perf_counter()\nimport {name}\nprint(time.perf_counter() - start)"
    python(code)  # byte code is written once
    times = sorted(float(python(code)) for _ in range(5))
    assert times[2] < IMPORT_S, f"median of {times}"


def test_the_methods_can_be_listed_without_torch():
    code = "import sys\nfrom hasten.registry import modules, works\nmodules(), works()\nprint('torch' in sys.modules)"
    assert python(code).strip() == "False"
