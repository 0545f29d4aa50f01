"""docs/guide/serving.md is run: its first command is started once, and every other block is run against it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from test_readme import ROOT, RUN, blocks

from hasten.serve.metrics import SPECS

PAGE = ROOT / "docs" / "guide" / "serving.md"
TEXT = PAGE.read_text(encoding="utf-8")
START, *BLOCKS = (block for block in blocks(PAGE.name, TEXT) if block.kind in RUN and not block.excuse)
BASE = "http://127.0.0.1:8000"


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def url(smollm2_gguf, tmp_path_factory):
    """The server that the page starts, on a free port."""
    command = shlex.split(START.text)
    assert command[:2] == ["hasten", "serve"]
    log = tmp_path_factory.mktemp("guide") / "log"
    with log.open("wb") as out:
        popen = subprocess.Popen([sys.executable, "-m", *command, "--port", "0"], stdout=out, stderr=out, env=environment())
    try:
        end, found = time.monotonic() + 120, None
        while time.monotonic() < end and popen.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8"))
            if found and httpx.get(found[0] + "/health").status_code == 200:
                break
            time.sleep(0.1)
        assert found is not None, log.read_text(encoding="utf-8")
        assert popen.poll() is None, log.read_text(encoding="utf-8")
        yield found[0]
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(30) == 0, log.read_text(encoding="utf-8")
    finally:
        popen.kill()
        popen.wait()


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_the_block_works(url, block, tmp_path):
    text = block.text.replace(BASE, url)
    shell = ("bash", "-euo", "pipefail", "-c") if block.kind == "bash" else (sys.executable, "-W", "error", "-c")
    done = subprocess.run([*shell, text], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout
    if "with_raw_response" in text:
        assert done.stdout.startswith("True\n")
        assert "x-hasten-tokens-per-forward" in done.stdout
    if '"choice"' in text:
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] in ("yes", "no")


def test_blocks_are_run_or_excused():
    kinds = [block.kind for block in blocks(PAGE.name, TEXT)]
    assert set(kinds) <= {*RUN, "yaml"}
    assert len(BLOCKS) >= 7
    excuses = [block.excuse for block in blocks(PAGE.name, TEXT) if block.excuse]
    assert excuses == [
        "listens on every address of this machine",
        "fetches a data set",
        "needs a container engine",
        "changes the system",
    ]


def test_metrics_codes_fields_and_options_that_the_page_names_exist():
    known = {spec.name for spec in SPECS} | {
        f"{s.name}_{part}" for s in SPECS if s.buckets for part in ("sum", "count", "bucket")
    }
    named = set(re.findall(r"\bhasten_[a-z_]+", TEXT))
    assert len(named) > 10
    assert named <= known
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "hasten" / "serve").glob("*.py"))
    codes = re.findall(r"`([a-z_]+)`", TEXT[TEXT.index("| status | code |") : TEXT.index("All bounds are on")])
    assert {code for code in codes if f'"{code}"' not in source} == set()
    from hasten.serve.protocol import REFUSED, Extension

    table = TEXT[TEXT.index("| field of `hasten` |") : TEXT.index("Every answer tells")]
    fields = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:] if "|" in line)))
    assert fields == set(Extension.model_fields)
    refused = TEXT[TEXT.index("Refused: ") : TEXT.index("Errors have")]
    for field in ("prompt_embeds", "functions", "prediction", "audio", "web_search_options", "metadata"):
        assert field in REFUSED
        assert f"`{field}`" in refused


def test_the_numbers_of_the_page_are_those_of_the_limits():
    from hasten.engine.limits import LIMITS

    for text in (
        f"Up to {LIMITS.rows} rows run together; {LIMITS.served_queue} requests wait",
        f"A comment every {LIMITS.ping_s:g} s",
        f"for {LIMITS.drain_s:g} s at most",
        f"longer than {LIMITS.deadline_s:g} s",
        f"at least {LIMITS.key_chars} characters",
        f"{LIMITS.canvas_steps:,} at most",
    ):
        assert " ".join(text.split()) in " ".join(TEXT.split()), text
    assert 2 * 30 * 3 * 64 * 4 == 46_080
