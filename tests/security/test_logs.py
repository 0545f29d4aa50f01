"""Logs: one line per entry whatever a request writes, and never a prompt, an answer or a key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
from chat_model import write_model
from live import KEY, chat

from hasten.serve.logs import Lines, escaped

EVIL = "x\n2026-01-01T00:00:00Z info    forged\r\x1b[31m\x00\u2028\u202e\x85"
SECRET = "a-very-secret-prompt"


@pytest.mark.parametrize("as_json", [False, True])
def test_log_injection_is_escaped(as_json):
    """As llama.cpp's test_log_injection.py: no control character of a request reaches the log."""
    import logging

    record = logging.LogRecord("hasten.serve", logging.INFO, "f", 1, "model %s", (EVIL,), None)
    record.model, record.other = EVIL, {"k": EVIL}
    try:
        raise ValueError(EVIL)
    except ValueError:
        record.exc_info = sys.exc_info()
    line = Lines(as_json).format(record)
    assert not [c for c in line if not c.isprintable()]
    assert "\\n2026" in line
    if as_json:
        assert set(json.loads(line)) >= {"time", "level", "message", "model"}
    assert len(escaped("x" * 10_000)) < 2010


def test_log_injection_and_prompts_in_the_log_of_a_real_server(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "keys").write_text(f"# of the test\n{KEY}\n")
    os.chmod(tmp_path / "keys", 0o600)
    write_model(tmp_path / "tiny")
    command = [
        sys.executable,
        "-m",
        "hasten",
        "serve",
        str(tmp_path / "tiny"),
        "--port",
        "0",
        "--log-level",
        "debug",
        "--key-file",
        str(tmp_path / "keys"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert process.stderr is not None
        lines = []
        while "serves tiny on" not in (line := process.stderr.readline()):
            assert line, "the server ended"
            lines.append(line)
        lines.append(line)
        url = line.strip().rpartition(" ")[2]
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=20) as client:
            end = time.monotonic() + 30
            while client.get("/ready").status_code != 200:
                assert time.monotonic() < end
                time.sleep(0.05)
            answer = client.post("/v1/chat/completions", json=chat(SECRET, temperature=0, max_tokens=24)).json()["choices"][
                0
            ]["message"]["content"]
            assert client.post("/v1/chat/completions", json={**chat(SECRET), "model": EVIL}).status_code == 404
            assert client.post("/v1/chat/completions", json=chat(SECRET, **{EVIL: SECRET})).status_code == 400
            assert (
                client.post("/v1/completions", json={"model": "tiny", "prompt": EVIL + SECRET, "user": EVIL}).status_code
                == 200
            )
            assert client.get("/v1/models/%0aforged", headers={"X-Request-Id": "a\tb"}).status_code == 404
            assert (
                httpx.post(
                    f"{url}/v1/completions", json={}, headers={"Authorization": "Bearer wrong-key-of-mine"}
                ).status_code
                == 401
            )
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    log = "".join(lines) + rest + out
    assert process.returncode in (0, -signal.SIGTERM), log  # uvicorn raises the signal again when it has drained
    for hidden in (SECRET, KEY, "wrong-key-of-mine", "2026-01-01T00:00:00Z info    forged", "\x1b", "\x00", answer):
        assert hidden not in log, hidden
    assert all(line[:4].isdigit() for line in log.splitlines()), log
