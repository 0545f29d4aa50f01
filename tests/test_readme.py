"""The README and the documentation are run: every shell, console and Python block of every page, and every example.

Each block runs in a folder of its own; those of a page in IN_ORDER build on one another and run in turn in one. A block with a
title (```python title="name.py") is a file of that name. What cannot run here has a mark before it that says why.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {  # page -> the test that runs its blocks
    "guide/serving.md": "tests/server/test_serving_guide.py",
    "guide/tuning.md": "tests/cli/test_tune.py",
}
IN_ORDER = ("guide/adding-a-method.md",)
EVERY = [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- no-run: ((?:(?!-->).)+?) -->\s*\Z", re.DOTALL)
RUN = ("bash", "console", "python")
SHOWN = ("text", "yaml", "toml", "ini", "json")  # blocks that are no commands
REASONS = (
    *("takes about", "takes over", "trains", "writing the answers takes", "needs ", "downloads ", "fetches "),
    *("installs ", "changes the system", "listens on every address", ".ci/run calls"),
)
COMMAND = re.compile(r"(?<![-\w./])hasten ([a-z]+)(?![-\w])((?:[^`\n;|&<]|<(?=mask))*)")


@dataclass(frozen=True)
class Block:
    """One fenced block: `kind` as written after the fence, its text, page:line, why it is not run ("" if it is), its file."""

    kind: str
    text: str
    place: str
    excuse: str
    title: str = ""


def name_of(page: Path) -> str:
    """README.md, or the path below docs/."""
    return page.relative_to(DOCS if DOCS in page.parents else ROOT).as_posix()


def blocks(page: str, markdown: str) -> list[Block]:
    """Every fenced block of a page."""
    found = []
    for match in FENCE.finditer(markdown):
        mark = MARK.search(markdown[: match.start()])
        line = markdown.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], match[3], f"{page}:{line}", mark[1] if mark else "", match[2] or ""))
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


TEXTS = {name_of(page): page.read_text(encoding="utf-8") for page in EVERY}
ALL = {name: blocks(name, text) for name, text in TEXTS.items()}
RUNNABLE = [
    block
    for name, found in ALL.items()
    if name not in (*ELSEWHERE, *IN_ORDER)
    for block in found
    if block.kind in RUN and not block.excuse and not block.title
]
MAKE = next(block for block in ALL["README.md"] if block.excuse)


@cache
def options() -> dict[str, set[str]]:
    """Command -> the options it has."""
    from hasten.cli import app

    group = typer.main.get_command(app)
    return {name: {o for p in one.params for o in (*p.opts, *p.secondary_opts)} for name, one in group.commands.items()}


def unknown(text: str, known: dict[str, set[str]]) -> list[str]:
    """Commands and options of `hasten` that a page names and that there are none of."""
    found = []
    for command, rest in COMMAND.findall(text.replace("\\\n", " ")):
        if command not in known:
            found.append(command)
        else:
            named = re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)
            found += [f"{command} {name}" for name in named if name not in known[command] | {"--help"}]
    return found


def spans(text: str) -> list[str]:
    """What a page writes as code: its fenced blocks, and `...` in lines."""
    return [block.text for block in blocks("", text)] + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def test_every_block_of_every_page_is_run_or_says_why_not():
    assert {block.kind for block in ALL["README.md"]} == {*RUN, "text"}
    for name, found in ALL.items():
        for block in found:
            assert block.kind in (*RUN, *SHOWN), f"{block.place}: write what kind of block it is after the fence"
            if block.excuse:
                assert block.excuse.startswith(REASONS), f"{block.place}: {block.excuse!r} is no reason not to run it"
                assert len(block.excuse.split()) >= 2 or block.excuse == "trains", block.place
            if block.kind in SHOWN and not block.title:
                assert not re.search(r"^(\$ |hasten |python |pip |curl )", block.text, re.MULTILINE), (
                    f"{block.place}: a command"
                )
            assert name in IN_ORDER or not block.title, f"{block.place}: files are written on pages of IN_ORDER"
    assert set(ELSEWHERE) | set(IN_ORDER) <= set(ALL)
    for name, test in ELSEWHERE.items():
        assert Path(name).name in (ROOT / test).read_text(encoding="utf-8")
    assert [block.excuse for block in ALL["README.md"] if block.excuse] == [MAKE.excuse]
    lines = [line.partition("#")[0].strip() for line in MAKE.text.splitlines()]
    assert lines == ["make demo", "make test"]


def test_a_block_needs_a_reason_or_a_kind():
    page = "<!-- no-run: -->\n```bash\nx\n```\n```\ny\n```\n"
    assert [(block.kind, block.excuse) for block in blocks("p", page)] == [("bash", ""), ("", "")]


@pytest.mark.parametrize("name", TEXTS)
def test_commands_and_options_that_a_page_names_exist(name):
    assert [one for text in spans(TEXTS[name]) for one in unknown(text, options())] == []


def test_a_command_that_does_not_exist_is_found():
    known = options()
    assert unknown("hasten run x --max-tokens 3 --method y", known) == []
    assert unknown("hasten rum x; hasten run x --max-token 3", known) == ["rum", "run --max-token"]
    assert unknown("hasten run x \\\n  --max-token 3", known) == ["run --max-token"]


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
    assert blocks("p", '```toml title="a/b.toml"\nc\n```\n') == [Block("toml", "c\n", "p:1", "", "a/b.toml")]


def test_console_blocks_are_commands_and_their_output():
    assert steps("$ a b\n1\n2\n$ c\n") == [("a b", "1\n2\n"), ("c", "")]
    assert matches("x ... y\n", "x 1\n2 y\n")
    assert matches("", "\n")
    assert not matches("x", "xy")
    assert not matches("x ...y", "x")
    assert not matches("a.c", "abc")


def work(block: Block, folder: Path) -> None:
    """Run one block in `folder`, or write its file there; asserts that it did what it says."""
    if block.title:
        path = folder / block.title
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        return
    if block.kind == "console":
        for command, expected in steps(block.text):
            code, out, err = run("bash", "-c", command, folder=folder)
            assert matches(expected, out + err), f"{block.place} $ {command}\n{out}{err}"
            assert (code != 0) == expected.startswith("error: "), f"{block.place} $ {command}\n{out}{err}"
        return
    shell = ("bash", "-euo", "pipefail", "-c") if block.kind == "bash" else (sys.executable, "-W", "error", "-c")
    code, out, err = run(*shell, block.text, folder=folder)
    assert code == 0, block.place + "\n" + out + err
    assert out.strip(), block.place
    assert "Traceback" not in err, block.place + "\n" + err


@pytest.mark.slow
@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: f"{block.kind}-{block.place}")
def test_the_block_works(block: Block, tmp_path: Path):
    work(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ORDER)
def test_the_blocks_of_the_page_work_in_order(name: str, tmp_path: Path):
    for block in ALL[name]:
        if (block.kind in RUN or block.title) and not block.excuse:
            work(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_the_example_works(example: Path, tmp_path: Path):
    code, out, err = run(sys.executable, str(example), folder=tmp_path)
    assert code == 0, out + err
    assert out.strip()
