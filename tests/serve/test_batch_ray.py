"""`hasten run --batch --ray`: a local cluster of real worker processes, one of which is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from chat_model import write_model
from ray_runs import LOOPBACK, below, command, open_addresses, processes, wait_for

import hasten
from hasten.serve.batch import run_batch

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
LINES = 320


def meaning(out: Path) -> dict[str, object]:
    """What each id was answered; each is there once."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    kept = {}
    for row in rows:
        body = (row["response"] or {}).get("body", {})
        kept[row["custom_id"]] = (row["error"], [body.get(key) for key in ("choices", "data", "usage", "error")])
    return kept


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory):
    """(model, input, answers of one engine in this process)."""
    folder = tmp_path_factory.mktemp("job")
    model = str(write_model(tmp_path_factory.mktemp("tiny"), window=2048))
    rows = [
        {"custom_id": f"a{i}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"messages": [{"role": "user", "content": f"hello {i}"}], "max_tokens": 40 + i % 50}}
        for i in range(LINES)
    ]  # fmt: skip
    rows += [{"id": "short", "prompt": "The quick", "max_tokens": 5, "top_k": 3}, {"id": "bad", "prompt": "x", "nope": 1}]
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n" + json.dumps({"id": "e", "input": ["a"]}))
    name = Path(model).name
    run_batch(model, source, folder / "here.jsonl", name=name, open_model=lambda: hasten.load(model), load={})
    return model, source, meaning(folder / "here.jsonl")


def arguments(model: str, source: Path, out: Path) -> tuple[str, ...]:
    return ("run", model, "--batch", str(source), "--out", str(out), "--ray", "--workers", "2")


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_nothing(job, tmp_path):
    model, source, expected = job
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    with command(*arguments(model, source, out), log=log) as child:

        def workers():
            return [pid for pid, line in below(child.pid).items() if "MapWorker" in line]

        wait_for(lambda: child.poll() is not None or (out.exists() and out.read_bytes().count(b"\n") >= 20), 150, "answers")
        first = workers()
        assert len(first) == 2, log.read_text()[-2000:]
        assert open_addresses(set(below(child.pid))) <= LOOPBACK, "Ray listens beyond this machine"
        before = out.read_bytes().count(b"\n")
        os.kill(first[0], signal.SIGKILL)
        assert before < len(expected) // 2, "answers come as they are ready, and there was work left"
        assert child.wait(180) == 0, log.read_text()[-2000:]
    assert f"{len(expected)} answered now, {len(expected)} in all, 2 of them errors" in log.read_text()
    assert meaning(out) == expected


@needs_ray
@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_goes_on_where_it_was(job, tmp_path):
    model, source, expected = job
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    before = set(Path(tempfile.gettempdir()).glob("hasten-ray-*"))
    with command(*arguments(model, source, out), log=log) as child:
        wait_for(lambda: child.poll() is not None or (out.exists() and out.read_bytes().count(b"\n") >= 20), 150, "answers")
        started = set(below(child.pid))
        child.send_signal(signal.SIGKILL)
        wait_for(lambda: not started & set(processes()), 120, "Ray's processes outlive the run")  # its agents take a minute
    for folder in set(Path(tempfile.gettempdir()).glob("hasten-ray-*")) - before:
        shutil.rmtree(folder)  # nobody was left to do it
    kept = out.read_bytes()
    assert 20 <= kept.count(b"\n") < len(expected)
    with command(*arguments(model, source, out), log=log) as child:
        assert child.wait(240) == 0, log.read_text()[-2000:]
    assert out.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert meaning(out) == expected


@needs_ray
@pytest.mark.slow
def test_workers_that_cannot_load_the_model_end_the_run_with_the_reason(job, tmp_path):
    _, source, _ = job
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    log, started = tmp_path / "log", time.monotonic()
    with command(*arguments(str(broken), source, tmp_path / "out.jsonl"), log=log) as child:
        assert child.wait(150) == 1
    assert "error: the workers failed: " in log.read_text()
    assert "config.json" in log.read_text().partition("error: the workers failed: ")[2].splitlines()[0]
    assert time.monotonic() - started < 150


def test_without_ray_the_way_to_install_it_is_said(job, tmp_path, monkeypatch):
    from hasten.errors import MissingExtraError

    model, source, _ = job
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN",
                 "RAY_enable_metrics_collection"):  # fmt: skip
        monkeypatch.setenv(name, "")
    with pytest.raises(MissingExtraError, match=r"pip install 'hasten\[ray\]'"):
        run_batch(model, source, tmp_path / "out.jsonl", name="m", open_model=lambda: None, load={}, ray=True)
