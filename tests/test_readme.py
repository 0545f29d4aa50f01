"""The README and the pages of the methods are run: every shell, console and Python block, and every example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "diffusion.md",
    ROOT / "docs" / "mini.md",
    ROOT / "docs" / "native.md",
    ROOT / "docs" / "speculative.md",
    ROOT / "docs" / "guide" / "batch.md",
    *sorted((ROOT / "docs" / "methods").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- no-run: ((?:(?!-->).)+?) -->\s*\Z", re.DOTALL)
RUN = ("bash", "console", "python")


@dataclass(frozen=True)
class Block:
    """One fenced block: `kind` as written after the fence, its text, page:line, and why it is not run ("" if it is)."""

    kind: str
    text: str
    place: str
    excuse: str


def blocks(page: str, markdown: str) -> list[Block]:
    """Every fenced block of a page."""
    found = []
    for match in FENCE.finditer(markdown):
        mark = MARK.search(markdown[: match.start()])
        line = markdown.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], match[2], f"{page}:{line}", mark[1] if mark else ""))
    return found


def steps(text: str) -> list[tuple[str, str]]:
    """(command, expected output) of a console block; output is what stands before the next `$ `."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not parts[0].strip(), "a console block starts with a command"
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts[1:]]


def matches(expected: str, printed: str) -> bool:
    """Whether `printed` is `expected`, where `...` stands for anything."""
    pattern = ".*".join(re.escape(piece) for piece in expected.rstrip("\n").split("..."))
    return re.fullmatch(pattern, printed.rstrip("\n"), re.DOTALL) is not None


def run(*command: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that finds this environment's `hasten` first and has no stdin."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return result.returncode, result.stdout, result.stderr


ALL = [block for page in PAGES for block in blocks(page.name, page.read_text(encoding="utf-8"))]
RUNNABLE = [block for block in ALL if block.kind in RUN and not block.excuse]


def test_every_block_is_run_or_excused():
    assert {block.kind for block in ALL if block.place.startswith("README")} == {*RUN, "text"}
    assert {block.kind for block in ALL} <= {*RUN, "text"}
    excused = [block for block in ALL if block.excuse]
    assert [block.excuse for block in excused if block.place.startswith("README")] == [excused[0].excuse]
    reasons = (
        "takes about 45 minutes",
        "takes over an hour",
        "trains",
        "writing the answers takes about 15",
        "needs the trained layer",
        "needs a second model",
    )
    assert all(block.excuse.startswith(reasons) for block in excused[1:]), [block.excuse for block in excused]
    lines = [line.partition("#")[0].strip() for line in excused[0].text.splitlines()]
    assert lines == ["make demo", "make test"]


def test_make_demo_does_what_the_readme_runs():
    """make demo is not run here, so its one command must stand in a block that is."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = re.search(r"^demo:.*\n\t\$\(BIN\)/(.+)$", makefile, re.MULTILINE)
    assert demo is not None
    words = re.match(r'hasten run smollm2-135m "[^"]+"', demo[1])
    assert words is not None
    assert any(words[0] in block.text for block in RUNNABLE if block.place.startswith("README"))


def test_blocks_and_marks_are_found():
    page = "a\n```bash\nx\n```\n<!-- no-run: why\nnot -->\n```python\ny\n```\n```console\n$ z\nout\n```\n"
    assert blocks("p", page) == [
        Block("bash", "x\n", "p:2", ""),
        Block("python", "y\n", "p:7", "why\nnot"),
        Block("console", "$ z\nout\n", "p:10", ""),
    ]


def test_console_blocks_are_commands_and_their_output():
    assert steps("$ a b\n1\n2\n$ c\n") == [("a b", "1\n2\n"), ("c", "")]
    assert matches("x ... y\n", "x 1\n2 y\n")
    assert matches("", "\n")
    assert not matches("x", "xy")
    assert not matches("x ...y", "x")
    assert not matches("a.c", "abc")


@pytest.mark.slow
@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: f"{block.kind}-{block.place}")
def test_the_block_works(block: Block, tmp_path: Path):
    if block.kind == "console":
        for command, expected in steps(block.text):
            code, out, err = run("bash", "-c", command, folder=tmp_path)
            assert matches(expected, out + err), f"$ {command}\n{out}{err}"
            assert (code != 0) == expected.startswith("error: "), f"$ {command}\n{out}{err}"
        return
    shell = ("bash", "-euo", "pipefail", "-c") if block.kind == "bash" else (sys.executable, "-W", "error", "-c")
    code, out, err = run(*shell, block.text, folder=tmp_path)
    assert code == 0, out + err
    assert out.strip()
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_the_example_works(example: Path, tmp_path: Path):
    code, out, err = run(sys.executable, str(example), folder=tmp_path)
    assert code == 0, out + err
    assert out.strip()
