"""`hasten tune`: what it prints, stores and refuses, and that `--method tuned` then uses it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from planted import Trusting, plant
from test_readme import blocks

from hasten.bench.bounds import upper
from hasten.cli.tune import share
from hasten.errors import ConfigError

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "tuning.md"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def file(tmp_path: Path, count: int = 12) -> str:
    path = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"copy: {' '.join(['cat', 'sun', 'pen'][i % 3 :] + ['hat'] * i)}"} for i in range(count)]
    path.write_text("\n".join(json.dumps({**one, "answer": one["prompt"][6:]}) for one in lines))
    return str(path)


def test_it_prints_what_was_tried_and_stores_what_run_then_uses(hasten, tmp_path, home):
    options = ("--minutes", "0.02", "--max-tokens", "24", "--candidates", "5")
    result = hasten("tune", "mini-ar", "--prompts", file(tmp_path), *options)
    assert result.code == 0, result.err
    assert "asked: 12 prompts of mine.jsonl, up to 24 tokens an answer; quality: the baseline's own tokens" in result.out
    assert "could not be tried (--json says why): draft-model, eagle" in result.out
    (stored,) = (home / "tuned").iterdir()
    assert f"stored: {stored}" in result.out.replace("\n", "")
    profile = json.loads(stored.read_text())
    assert f"chosen: {' '.join('--method ' + name for name in profile['method'])}\nwhy: {profile['why']}\n" in result.out
    assert profile["measured"]["max_tokens"] == 24
    run = json.loads(hasten("run", "mini-ar", "copy: cat", "--method", "tuned", "--max-tokens", "12", "--json").out)
    by_name = [word for name in profile["method"] for word in ("--method", name)]
    same = json.loads(hasten("run", "mini-ar", "copy: cat", *by_name, "--max-tokens", "12", "--json").out)
    assert (run["text"], run["method"]) == (same["text"], same["method"])


def test_json_is_one_object_and_no_save_stores_nothing(hasten, home):
    result = hasten("tune", "mini-dlm", "--suite", "reverse", "--minutes", "0.02", "--max-tokens", "32", "--max-quality-loss",
                    "90%", "--json", "--no-save", "--candidates", "3")  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert list(found) == [
        "model", "machine", "method", "exact", "baseline", "speedup", "max_quality_loss", "why", "prompts", "quality_is",
        "seconds", "tried", "left_out", "profile",
    ]  # fmt: skip
    assert found["baseline"] == ["reference"]
    assert found["max_quality_loss"] == 0.9
    assert found["profile"] is None
    assert [one["method"] for one in found["tried"]] == [["auto"], ["threshold", "canvas-cache"], ["eoser-ass"]]
    assert not (home / "tuned").exists()


def test_without_the_flag_nothing_lossy_is_run(hasten, monkeypatch, tmp_path):
    ran = []

    class Watched(Trusting):
        def propose(self, rows, budgets):
            ran.append("sly")
            return super().propose(rows, budgets)

    plant(monkeypatch, sly=(Watched, "lossy"))
    options = ("tune", "mini-ar", "--prompts", file(tmp_path), "--minutes", "0.01", "--max-tokens", "24", "--json")
    found = json.loads(hasten(*options).out)
    assert not ran
    assert all(one["exact"] for one in found["tried"])
    allowed = json.loads(hasten(*options, "--max-quality-loss", "50%").out)
    assert ["sly"] in [one["method"] for one in allowed["tried"]]
    assert allowed["method"] != ["sly"]


def test_serve_answers_with_the_profile_or_names_the_command(hasten, tmp_path):
    import asyncio

    import hasten as package
    from hasten.serve.batch.answering import Answering

    llm = package.load("mini-ar", cache_bytes=50_000_000)

    async def ask() -> dict:
        async with Answering(llm, "mini-ar", ("tuned",)) as answering:
            line = {"id": "a", "messages": [{"role": "user", "content": "copy: cat"}], "max_tokens": 8, "temperature": 0}
            return (await answering.answer(1, json.dumps(line).encode()))["response"]["body"]

    assert "hasten tune mini-ar" in asyncio.run(ask())["error"]["message"]
    options = ("--minutes", "0.01", "--max-tokens", "16", "--candidates", "3")
    assert hasten("tune", "mini-ar", "--prompts", file(tmp_path), *options).code == 0
    assert asyncio.run(ask())["choices"][0]["message"]["content"].startswith("cat")


def test_a_server_whose_default_is_tuned_does_not_start_without_a_profile(hasten):
    result = hasten("serve", "mini-ar", "--method", "tuned", "--port", "0")
    assert result.code == 2
    assert "hasten tune mini-ar" in result.err


def test_what_was_found_is_printed_where_it_cannot_be_stored(hasten, tmp_path, monkeypatch):
    from hasten.models import tuned

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned, "write", full)
    result = hasten("tune", "mini-ar", "--prompts", file(tmp_path), "--minutes", "0.005", "--candidates", "2")
    assert result.code == 1
    assert "chosen: --method" in result.out
    assert "could not be stored (No space left on device)" in result.err


def test_every_option_has_a_help_text_and_stands_on_the_command_page():
    from typer.main import get_command

    from hasten.cli import app

    command = get_command(app).commands["tune"]
    section = (GUIDE.parents[1] / "cli.md").read_text(encoding="utf-8").split("## hasten tune")[1].split("\n## ")[0]
    for one in command.params:
        assert one.help
        assert one.name.upper() in section or f"`{one.opts[0]}" in section


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("mini-ar", "--max-quality-loss", "1"), "max_quality_loss = '1'"),
        (("mini-ar", "--max-quality-loss", "few"), "max_quality_loss = 'few'"),
        (("mini-ar", "--minutes", "0"), "minutes = 0.0"),
        (("mini-ar", "--minutes", "nan"), "minutes = nan"),
        (("mini-ar", "--candidates", "0"), "candidates = 0"),
        (("mini-ar", "--max-tokens", "0"), "max_tokens = 0"),
        (("mini-ar", "--suite", "sorting"), "did you mean 'sort'"),
        (("mini-ar", "--suite", "sort", "--suite", "chat"), "take one kind"),
        (("mini-ar", "--suite", "sort", "--prompts", "x"), "were both given"),
        (("mini-ar", "--prompts", "absent.jsonl"), "absent.jsonl"),
        (("mini-arr",), "did you mean 'mini-ar'"),
    ],
)
def test_a_wrong_request_is_refused(hasten, arguments, says):
    result = hasten("tune", *arguments)
    assert result.code in (1, 2)
    assert says in result.err
    assert result.out == ""


def test_tuned_without_a_profile_names_the_command(hasten):
    result = hasten("run", "mini-ar", "copy: cat", "--method", "tuned")
    assert result.code == 2
    assert "hasten tune mini-ar" in result.err
    both = hasten("run", "mini-ar", "copy: cat", "--method", "tuned", "--method", "aded")
    assert "'tuned' cannot be combined with 'aded'" in both.err


@pytest.mark.parametrize(
    ("text", "value"), [("1%", 0.01), (" 2.5 % ", 0.025), ("0.01", 0.01), ("0", 0.0), ("0%", 0.0), (None, 0.0)]
)
def test_a_loss_is_a_share(text, value):
    assert share("x", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["1", "100%", "-1%", "nan", "1%%", "% 1", "", "1e9%"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ConfigError):
        share("x", text)


@pytest.mark.slow
def test_a_real_model_is_tuned_and_answers_as_before(smollm2_gguf, hasten, monkeypatch):
    (Path(os.environ["HASTEN_HOME"])).mkdir()
    (Path(os.environ["HASTEN_HOME"]) / "models").symlink_to(smollm2_gguf.parents[1])
    found = json.loads(
        hasten(
            "tune", "smollm2-135m", "--suite", "chat", "--minutes", "1", "--candidates", "4", "--max-tokens", "24", "--json"
        ).out
    )
    assert found["exact"]
    assert all(one["exact"] for one in found["tried"])
    same = [one["held_out"]["quality"] for one in found["tried"] if one["held_out"]]
    assert same
    assert set(same) == {1.0}, "on the native stack exact methods give plain decoding's tokens"
    prompt = "Write this again: the ship left the harbour, the ship left the harbour."
    asked = ("run", "smollm2-135m", prompt, "--max-tokens", "24", "--json")
    tuned = json.loads(hasten(*asked, "--method", "tuned").out)
    assert tuned["tokens"] == json.loads(hasten(*asked, "--method", "plain").out)["tokens"]


RUNNABLE = [block for block in blocks(GUIDE.name, GUIDE.read_text(encoding="utf-8")) if block.kind in ("bash", "python")]


def test_the_guide_names_what_there_is():
    from typer.main import get_command

    from hasten.cli import app

    options = {option for one in get_command(app).commands["tune"].params for option in one.opts}
    text = GUIDE.read_text(encoding="utf-8")
    lines = [line for block in RUNNABLE for line in block.text.splitlines() if line.startswith("hasten tune")]
    assert len(lines) == 3
    used = {word for line in lines for word in re.findall(r"--[a-z-]+", line)}
    assert used <= options
    assert {option for option in options if option.startswith("--")} - {"--help"} >= set(
        re.findall(r"`(--[a-z-]+)", text)
    ) - {"--method"}
    for needed in (71, 360):  # held-out prompts for one lossy finalist, for a budget of 5 and of 1 percent
        assert f"about {needed}" in text or f"and {needed}" in text
    assert [upper([0.0] * count, 0.05) <= loss for count, loss in ((71, 0.05), (70, 0.05), (360, 0.01), (359, 0.01))] == [
        True, False, True, False,
    ]  # fmt: skip
    assert [upper([0.0] * count, 0.05 / 3) <= loss for count, loss in ((93, 0.05), (473, 0.01))] == [True, True]


@pytest.mark.slow
def test_the_guide_works(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
    for block in RUNNABLE:
        if block.excuse:
            continue
        shell = ("bash", "-euo", "pipefail", "-c") if block.kind == "bash" else (sys.executable, "-W", "error", "-c")
        done = subprocess.run(
            [*shell, block.text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, block.place + done.stdout + done.stderr
        assert done.stdout.strip(), block.place
