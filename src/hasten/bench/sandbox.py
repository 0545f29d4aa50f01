"""Code that a model wrote, run in a process of its own with as little as can be had without privileges.

Guarded: CPU time, memory, file sizes, open files (resource limits); no file outside its folder is changed (Landlock, Linux
5.13 or later); no process, program, socket or signal (seccomp, Linux on x86_64 and aarch64); wall time, after which the
process group is killed. Its output goes nowhere. Not guarded: reading files that this user may read, the number of small
files in its folder (deleted afterwards) within its time, and bugs of the kernel. `run` says which guards a machine could
set.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import HastenError, UnsupportedError, out_of_range

GUARDS = (
    "cpu time", "memory", "size of files", "open files", "processes", "files outside its folder", "network", "signals",
)  # fmt: skip
SECONDS, MEMORY_BYTES, FILE_BYTES = 5, 1_000_000_000, 1_000_000
_REPORT_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a program. `kind`: passed, wrong (an assertion failed), error (anything else was raised), memory, time
    (its CPU or wall time ended) or killed; `note` says more. `guards` were set, `unguarded` could not be on this
    machine."""

    kind: str
    note: str
    guards: tuple[str, ...]

    @property
    def unguarded(self) -> tuple[str, ...]:
        """What this machine could not guard."""
        return tuple(name for name in GUARDS if name not in self.guards)


def run(
    program: str,
    *,
    seconds: int = SECONDS,
    wall_s: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    file_bytes: int = FILE_BYTES,
) -> Outcome:
    """Run a Python program in a folder of its own that is deleted afterwards.

    It gets `seconds` of CPU time and `wall_s` of wall time (default: 3 * `seconds` + 2, for machines that are busy). Raises
    ConfigError for limits out of range, UnsupportedError on systems without resource limits, HastenError where no process
    can be started.
    """
    wall_s = 3 * seconds + 2 if wall_s is None else wall_s
    if os.name != "posix":
        raise UnsupportedError("generated code is run on Linux and macOS only: this system has no resource limits")
    for name, value, least in (
        ("seconds", seconds, 1),
        ("wall_s", wall_s, 1),
        ("memory_bytes", memory_bytes, 50_000_000),
        ("file_bytes", file_bytes, 1),
    ):
        if type(value) is not int or value < least:
            raise out_of_range(name, value, f"an integer of at least {least}")
    token = secrets.token_hex(16)
    asked = {"seconds": seconds, "memory_bytes": memory_bytes, "file_bytes": file_bytes, "token": token}
    given = json.dumps({**asked, "program": program}).encode()
    with tempfile.TemporaryDirectory(prefix="hasten-code-", ignore_cleanup_errors=True) as folder:
        reader, writer = os.pipe()
        try:
            code, late = _run(given, folder, writer, wall_s)
        finally:
            with suppress(OSError):
                os.close(writer)
            os.set_blocking(reader, False)
            report = b""
            with suppress(BlockingIOError):
                report = os.read(reader, _REPORT_BYTES)
            os.close(reader)
    return _outcome(report, token, code, late)


def _run(given: bytes, folder: str, writer: int, wall_s: float) -> tuple[int, bool]:
    """(exit status, whether the wall time ended) of the child; nothing of its process group is left."""
    child = Path(__file__).with_name("confined.py")
    command = [sys.executable, "-I", "-S", "-B", str(child), str(writer)]
    try:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "", "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            pass_fds=(writer,),
            start_new_session=True,
        )
    except OSError as error:
        raise HastenError(f"no process can be started to run code ({error})") from None
    late = False
    try:
        end = time.monotonic() + wall_s
        try:
            process.communicate(given, timeout=wall_s)
        except subprocess.TimeoutExpired:
            late = time.monotonic() >= end
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, late


def _outcome(report: bytes, token: str, code: int, late: bool) -> Outcome:
    guards: tuple[str, ...] = ()
    for raw in report.split(b"\n"):
        try:
            line: Any = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and not guards and isinstance(line.get("guards"), list):
            guards = tuple(name for name in GUARDS if name in line["guards"])
        elif isinstance(line, dict) and line.get("token") == token:
            return Outcome(str(line["kind"]), str(line["note"]), guards)
    if late or code == -signal.SIGXCPU:
        return Outcome("time", "its wall time ended" if late else "its CPU time ended", guards)
    if code < 0:
        return Outcome("killed", f"it ended by {signal.Signals(-code).name}", guards)
    return Outcome("error", "it left before its tests were done", guards)
