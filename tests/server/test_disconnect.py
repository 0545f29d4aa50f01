"""A client that goes away frees its rows within one pass: closed, reset, killed; streaming or not; before or during."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
from live import chat, rows, until

MANY = 3500


def post(path: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


BODIES = {
    "chat stream": post("/v1/chat/completions", chat(max_tokens=MANY, stream=True)),
    "chat": post("/v1/chat/completions", chat(max_tokens=MANY)),
    "chat n": post("/v1/chat/completions", chat(max_tokens=MANY, n=4, stream=True)),
    "completions": post("/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "max_tokens": MANY}),
    "completions stream": post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": MANY, "stream": True}),
    "canvas": post("/v1/chat/completions", {**chat(max_tokens=200, stream=True), "model": "mini-dlm", "hasten": {"method": "plain"}}),
}  # fmt: skip


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("name", BODIES)
def test_a_client_that_goes_frees_its_rows(long_server, name, how):
    assert until(lambda: rows(long_server) == 0)
    link = long_server.connect()
    link.sendall(BODIES[name])
    assert until(lambda: rows(long_server) > 0), "the request never ran"

    def leave() -> None:
        if how == "reset":
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.close()

    start = time.monotonic()
    leave()
    assert until(lambda: rows(long_server) == 0, 5), "the rows are still there"
    assert time.monotonic() - start < 2
    settled = len(long_server.steps)
    time.sleep(0.1)
    assert len(long_server.steps) == settled, "the engine goes on for nobody"


def test_a_killed_client_frees_its_row_within_one_pass(long_server):
    """kill -9 in the middle of a stream. Passes are counted from the moment at which the server knows of it."""
    program = (
        "import socket, sys, os\nlink = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "link.sendall(bytes.fromhex(sys.argv[2]))\nlink.recv(10)\nprint('streaming', flush=True)\n"
        "while link.recv(4096): pass\n"
    )
    worker = long_server.worker
    aborted: list[int] = []
    original = worker.abort

    def abort(model, answer):
        aborted.append(len(long_server.steps))
        original(model, answer)

    worker.abort = abort
    try:
        command = [sys.executable, "-c", program, str(long_server.port), BODIES["chat stream"].hex()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "streaming\n"
        assert rows(long_server) == 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert until(lambda: rows(long_server) == 0, 5)
        time.sleep(0.05)
    finally:
        worker.abort = original
    assert len(aborted) == 1
    assert len(long_server.steps) - aborted[0] <= 2  # the pass that was under way, and the one that finds the row gone
    assert worker._seats["tiny"].answers == {}


def test_a_client_that_goes_while_it_waits_leaves_nothing(long_server):
    """Requests that are still queued behind full rows are dropped like those that run."""
    links = [long_server.connect() for _ in range(40)]
    for link in links:
        link.sendall(BODIES["chat stream"])
    assert until(lambda: rows(long_server) > 32, 10)
    for link in links:
        link.close()
    assert until(lambda: rows(long_server) == 0, 10)
    with long_server.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_a_client_that_goes_in_the_middle_of_its_request_is_forgotten(long_server):
    body = BODIES["chat"]
    for cut in (1, 20, body.index(b"\r\n\r\n") + 2, body.index(b"\r\n\r\n") + 10, len(body) - 1):
        with long_server.connect() as link:
            link.sendall(body[:cut])
    time.sleep(0.1)
    assert rows(long_server) == 0
    with long_server.client() as client:
        assert client.get("/ready").status_code == 200


def test_a_client_that_does_not_read_keeps_nobody_waiting(long_server):
    idle = long_server.connect()
    idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    idle.sendall(post("/v1/chat/completions", chat(max_tokens=MANY, stream=True, hasten={"trace": True})))
    assert until(lambda: rows(long_server) == 1)
    with long_server.client() as client:
        for _ in range(5):
            assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    idle.close()
    assert until(lambda: rows(long_server) == 0, 5)


def test_the_key_of_a_connection_that_ended_by_itself_is_not_aborted(long_server):
    aborted = []
    original = long_server.worker.abort
    long_server.worker.abort = lambda *given: aborted.append(given)
    try:
        with long_server.client() as client:
            assert client.post("/v1/chat/completions", json=chat()).status_code == 200
            assert client.post("/v1/chat/completions", json=chat(stream=True)).text.endswith("data: [DONE]\n\n")
        time.sleep(0.05)
    finally:
        long_server.worker.abort = original
    assert aborted == []
