"""The promise on real models: every finished answer to a random schema is valid under jsonschema, with drafts or without."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

import hasten
from hasten.types import Grammar

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    """bench/structure.py, which counts."""
    spec = importlib.util.spec_from_file_location("structure", ROOT / "bench" / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(structure: ModuleType, name: str, count: int, max_tokens: int, most_cut: float) -> None:
    r = random.Random(2026)
    schemas = [structure.random_schema(r) for _ in range(count)]
    found = structure.model(name, schemas, ["plain", "auto"], max_tokens, rows=16, timed=0)
    for method in ("plain", "auto"):
        row = found["methods"][method]
        assert row["invalid"] == []
        assert row["valid"] == row["finished"] > (1 - most_cut) * count
        assert row["same_as_plain"] == count
    assert found["tokens_changed_among_these"] == 0


def test_some_schemas_on_the_small_model(structure: ModuleType) -> None:
    check(structure, "mini-ar", 20, 160, 0.3)


def test_the_judge_finds_what_is_invalid(structure: ModuleType) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert structure.judge(schema, '{"a": 1}')
    for text in ('{"a": "1"}', "{}", '{"a": 1', "", "a"):
        assert not structure.judge(schema, text)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "max_tokens"), [("mini-ar", 160), ("smollm2-135m", 96)])
def test_three_hundred_schemas(structure: ModuleType, name: str, max_tokens: int) -> None:
    check(structure, name, 300, max_tokens, 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_real_model_s_drafts_change_no_token(smollm2_gguf: Path, structure: ModuleType, temperature: float) -> None:
    llm, r = hasten.load("smollm2-135m"), random.Random(3)
    for seed in range(6):
        form = Grammar.json_schema(structure.random_schema(r))
        how = {"grammar": form, "max_tokens": 48, "temperature": temperature, "seed": seed}
        prompt = "Here is one JSON object after the other: "
        plain = llm.generate(prompt, method="plain", **how).tokens
        for method in ("auto", "prompt-lookup", "token-recycling", "aded"):
            assert llm.generate(prompt, method=method, **how).tokens == plain, method
        batch = llm.generate([prompt, "Another text, longer than the first: ", prompt], method="auto", **how)
        assert batch[0].tokens == batch[2].tokens == plain
