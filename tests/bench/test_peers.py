"""Peers of the benchmark: greedy answers of the asked length, counted passes, and a message where one is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hasten.bench.compare import Prompt

SCRIPTS = Path(__file__).parents[2] / "bench"


@pytest.fixture
def peers(monkeypatch) -> ModuleType:
    """The peers as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from hasten.bench import peers

    return peers


def test_a_missing_peer_is_named_and_left_out(peers, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert peers.peers(tmp_path / "model.gguf", torch.float32, ("llama.cpp",)) == {}
    said = capsys.readouterr().err
    assert "llama.cpp is left out" in said
    assert "pip install llama-cpp-python" in said


@pytest.mark.slow
def test_transformers_answers_as_hasten_does(peers, smollm2_gguf):
    import hasten

    llm = hasten.load(smollm2_gguf, dtype="float32", cache_bytes=100_000_000)
    ids = tuple(llm.chat_ids([{"role": "user", "content": "Name three colours of the sky."}]))
    plain = llm.generate(list(ids), method="plain", max_tokens=16, ignore_eos=True).tokens
    for name, run in peers.peers(smollm2_gguf, torch.float32, ("transformers",)).items():
        answer = run(Prompt(0, "x", ids), 16)
        assert answer.tokens == plain, name
        assert 0 < answer.decode_s < answer.seconds


@pytest.mark.slow
def test_llama_cpp_repeats_a_sentence_in_fewer_passes_with_prompt_lookup(peers, smollm2_gguf):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed", exc_type=ImportError)
    import hasten

    llm = hasten.load(smollm2_gguf, dtype="float32", cache_bytes=100_000_000)
    text = "Repeat twice: the ship left the harbour at dawn with seven men."
    prompt = Prompt(0, "x", tuple(llm.chat_ids([{"role": "user", "content": text}])))
    found = peers.llama_peers(smollm2_gguf, 2)
    assert list(found) == ["llama.cpp", "llama.cpp flash attention", "llama.cpp prompt lookup"]
    wanted = llm.generate(list(prompt.ids), method="plain", max_tokens=12, ignore_eos=True).tokens
    for name, run in found.items():
        first, again = run(prompt, 12), run(prompt, 12)
        assert first.tokens == again.tokens == wanted, name  # up to near-ties 4-bit and float32 arithmetic agree
        assert first.passes == (11 if "lookup" not in name else again.passes)
    assert again.passes < 11


def test_the_benchmark_script_compares_methods_and_writes_its_figures(peers, monkeypatch, tmp_path, tiny_chat):
    import importlib.util
    import json

    import hasten

    spec = importlib.util.spec_from_file_location("spec_script", SCRIPTS / "spec.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    load = hasten.load
    monkeypatch.setattr(hasten, "load", lambda name, **options: load(tiny_chat, **options))
    monkeypatch.setattr(script.catalog, "pull", lambda name: Path(tiny_chat))
    monkeypatch.setattr(script, "spec", lambda per_group: {"chat": ["Hello there."], "edit": ["Again and again."]})
    out = tmp_path / "spec.json"
    words = ["spec.py", "--peers", "--methods", "prompt-lookup", "prompt-lookup+token-recycling", "--setups", "exact"]
    monkeypatch.setattr(sys, "argv", [*words, "--tokens", "12", "--per-group", "1", "--out", str(out)])
    script.main()
    result = json.loads(out.read_text())["exact"]
    assert list(result) == ["chat", "edit", "all", "pass_ms"]
    assert list(result["all"]) == ["plain", "prompt-lookup", "prompt-lookup+token-recycling"]
    assert result["all"]["prompt-lookup+token-recycling"]["same_text"] == "2 of 2"
    assert result["all"]["plain"]["tokens_per_pass"] == 1.0
    assert result["all"]["plain"]["decode_ratio"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory) -> str:
    """A tiny chat model."""
    from chat_model import write_model

    return str(write_model(tmp_path_factory.mktemp("tiny-chat")))
