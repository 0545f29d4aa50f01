"""What tests of Ray share: a `hasten` command as a process of its own, whose cluster must be gone when it is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def processes() -> dict[int, tuple[int, str]]:
    """Process id -> (parent, command line) of what runs here; zombies left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if state != "Z":
                    found[int(entry.name)] = (int(parent), command)
    return found


def below(root: int) -> dict[int, str]:
    """Process id -> command line of everything that `root` has started, directly or not."""
    table, chosen, new = processes(), {}, [root]
    while new:
        parent = new.pop()
        for pid, (above, command) in table.items():
            if above == parent and pid not in chosen:
                chosen[pid] = command
                new.append(pid)
    return chosen


def open_addresses(pids: set[int]) -> set[str]:
    """The addresses (hexadecimal, as the kernel writes them) on which these processes listen for TCP connections."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def wait_for(what: Callable[[], object], seconds: float, said: str) -> object:
    """The first true value of `what()`; fails after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = what()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"after {seconds} s: {said}")


@contextlib.contextmanager
def command(*arguments: str, log: Path) -> Iterator[subprocess.Popen]:
    """`hasten ...` while the block runs; then told to stop, and everything it had started must be gone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("wb") as out:
        child = subprocess.Popen([sys.executable, "-m", "hasten", *arguments], stdout=out, stderr=out, env=environment)
    started: dict[int, str] = {}
    try:
        yield child
    finally:
        started = below(child.pid)
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(60)
        child.kill()
        child.wait()
        end = time.monotonic() + 20
        while (left := set(started) & set(processes())) and time.monotonic() < end:
            time.sleep(0.2)
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    assert not left, [started[pid][:120] for pid in left]


def get(port: int, path: str, *, key: str = "", host: str = "") -> tuple[int, object]:
    """(status, JSON body) of a GET."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if host:
        headers["Host"] = host
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")
    except OSError as error:
        return 0, str(error)
