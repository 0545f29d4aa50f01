"""`hasten` itself and its small commands: methods, pull, doctor, help, version, errors, progress."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hasten as package
from hasten import registry
from hasten.cli import _shared
from hasten.engine.limits import LIMITS
from hasten.kernels import library


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a fresh process."""
    command = [str(Path(sys.executable).with_name("hasten")), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, stdin=subprocess.DEVNULL
    )


def test_help_is_one_quick_page_that_lists_every_command():
    run("--help")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        result = run("--help")
        times.append(time.perf_counter() - start)
    assert result.returncode == 0
    assert all(f" {name} " in result.stdout for name in ("run", "chat", "methods", "pull", "train", "doctor"))
    assert result.stdout.count("\n") <= 40
    assert sorted(times)[2] < 0.6, times  # the start of Python itself included


@pytest.mark.parametrize("name", ["run", "chat", "methods", "pull", "train", "doctor"])
def test_every_option_has_a_help_text(hasten, name):
    import typer

    from hasten.cli import app

    command = typer.main.get_command(app).commands[name]
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", "help")] == []
    assert hasten(name, "--help").code == 0


def test_version(hasten):
    assert hasten("--version").out == f"hasten {package.__version__}\n"
    assert run("--version").stdout == f"hasten {package.__version__}\n"


def test_without_a_command_the_help_is_shown(hasten):
    result = hasten()
    assert "doctor" in result.out + result.err
    assert result.code in (0, 2)


@pytest.mark.parametrize("arguments", [("runn",), ("run",), ("run", "a", "b", "--tempratur", "1"), ("doctor", "x")])
def test_a_wrong_usage_is_code_2(hasten, arguments):
    result = hasten(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: hasten" in result.err


def test_an_unknown_model_lists_a_way_out_and_debug_shows_where(hasten):
    result = hasten("run", "smollm2-135n", "Hi")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == "error: unknown model 'smollm2-135n'"
    assert "'smollm2-135m'" in result.err.splitlines()[1]
    debug = hasten("--debug", "run", "smollm2-135n", "Hi")
    assert debug.code == 2
    assert "Traceback" in debug.err
    assert debug.err.endswith(result.err)


@pytest.mark.parametrize(
    ("raised", "message", "hint"),
    [
        (RuntimeError("went wrong"), "error: RuntimeError: went wrong", "a fault of hasten"),
        (PermissionError(13, "Permission denied", "/x"), "error: [Errno 13] Permission denied: '/x'", "--debug"),
        (MemoryError(), "error: out of memory", "smaller model"),
    ],
)
def test_an_unexpected_error_is_one_line_and_code_1(hasten, monkeypatch, raised, message, hint):
    def fail():
        raise raised

    monkeypatch.setattr(registry, "works", fail)
    result = hasten("methods")
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[0] == message
    assert hint in result.err.splitlines()[1]
    assert "Traceback" not in result.err
    assert "Traceback" in hasten("--debug", "methods").err


def test_methods_lists_what_works_first_and_then_the_planned_works(hasten):
    found = json.loads(hasten("methods", "--json").out)
    states = [entry["state"] for entry in found]
    assert states == sorted(states, reverse=True)
    slugs = [entry["slug"] for entry in found]
    assert len(slugs) == len(set(slugs))
    assert {card.slug for card in package.methods()} == {entry["slug"] for entry in found if entry["state"] == "works"}
    assert {work.slug for work in registry.works()} <= set(slugs)
    table = hasten("methods").out
    assert all(slug in table for slug in slugs)


@pytest.mark.parametrize(
    ("query", "slug"),
    [
        (["prompt-lookup"], "prompt-lookup"),
        (["LOOKUP"], "prompt-lookup"),
        (["one", "a100"], "prompt-lookup"),
        (["2509.26432"], "adablock"),
    ],
)
def test_methods_searches_names_titles_claims_and_papers(hasten, query, slug):
    found = json.loads(hasten("methods", *query, "--json").out)
    assert slug in [entry["slug"] for entry in found]
    assert len(found) < len(registry.works())


def test_methods_shows_one_match_in_full_and_says_when_there_is_none(hasten):
    card = registry.card("prompt-lookup")
    page = hasten("methods", "prompt-lookup").out
    assert all(text in page for text in (card.claim, card.no_help, *card.knobs, *card.knobs.values()))
    nothing = hasten("methods", "zzzz")
    assert (nothing.code, "nothing matches 'zzzz'" in nothing.out) == (0, True)
    assert json.loads(hasten("methods", "zzzz", "--json").out) == []
    assert json.loads(hasten("methods", "knobs", "--json").out) == []  # words of the texts count, not field names


def test_doctor_reports_versions_models_and_every_limit(hasten):
    facts = json.loads(hasten("doctor", "--json").out)
    assert facts["hasten"] == package.__version__
    assert {entry["name"]: entry["value"] for entry in facts["limits"]} == {n: v for n, v, _, _ in LIMITS.rows_for_people()}
    assert "smollm2-135m" in [entry["name"] for entry in facts["models"]]
    assert facts["free_memory_gb"] > 0 < facts["threads"]
    if library.available():
        assert facts["native"] == library.level()
    else:
        assert facts["native"] == "missing"
        assert any(note.startswith("native stack: it was not built") for note in facts["notes"])
    text = hasten("doctor").out
    assert all(f"{name}: " in text for name in ("hasten", "python", "torch", "cpu", "cpu_features", "threads"))
    assert all(f"  {name} = {value} {unit}" in text for name, value, unit, _ in LIMITS.rows_for_people())


@pytest.mark.parametrize(
    ("text", "cpu", "features"),
    [
        ("model name\t: AMD X\nflags\t\t: fpu avx2 fma\nmodel name\t: B\nflags : sse\n\n", "AMD X", "avx2 fma"),
        ("processor: 0\nFeatures : fp asimddp i8mm\n", None, "asimddp i8mm"),
        ("model name : Old\nflags : sse2\n", "Old", "none of those that matter"),
    ],
)
def test_doctor_reads_the_cpu(monkeypatch, text, cpu, features):
    import platform

    from hasten.bench.report import processor

    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    assert processor() == (cpu or platform.machine(), features)


def test_pull_says_where_a_fetched_model_lies(hasten, monkeypatch, tmp_path):
    folder = tmp_path / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "x.gguf").write_bytes(b"12345")
    (folder / "hasten.json").write_text(json.dumps({"source": "pip", "path": "x.gguf", "bytes": 5, "sha256": ""}))
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    assert hasten("pull", "smollm2-135m").out == f"smollm2-135m: {folder / 'x.gguf'}\n"
    assert json.loads(hasten("pull", "smollm2-135m", "--json").out) == {
        "name": "smollm2-135m", "path": str(folder / "x.gguf")
    }  # fmt: skip
    assert f"{folder / 'x.gguf'}" in hasten("doctor").out


def test_pull_without_a_network_names_every_source(tmp_path):
    closed = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "HASTEN_HOME": str(tmp_path)}
    result = run("pull", "smollm2-135m", **closed)
    assert (result.returncode, result.stdout) == (1, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("error: model 'smollm2-135m' could not be fetched; hub: ")
    assert "; pip: " in first
    assert str(tmp_path) in second
    assert not list(tmp_path.rglob("*.gguf"))


def test_pull_of_an_unknown_name_suggests(hasten):
    result = hasten("pull", "smollm2")
    assert (result.code, "smollm2-135m" in result.err) == (2, True)


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar_shows_bytes_and_speed_for_downloads_only(monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    for what, size in (("fetching x", True), ("loading x", False)):
        screen = _Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        with _shared.progress_bar() as show:
            show(what, 1_000_000, 4_000_000)
            time.sleep(0.15)
            show(what, 2_000_000, 4_000_000)
        text = screen.getvalue()
        assert what in text
        assert "50%" in text
        assert ("2.0/4.0 MB" in text) is size
        assert ("MB/s" in text) is size


def test_no_progress_bar_without_a_terminal(capsys):
    with _shared.progress_bar() as show:
        show("loading x", 1, 2)
    assert capsys.readouterr().err == ""
