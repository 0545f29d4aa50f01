"""The security page: every test it names exists, and every test named after an advisory stands on it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from source_tree import ROOT

PAGE = (ROOT / "docs" / "guide" / "security.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`")
ID = re.compile(r"CVE-\d{4}-\d{4,}|GHSA(?:-[a-z0-9]{4}){3}")


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def table() -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in PAGE.split("## Advisories")[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def missing(page: str) -> list[str]:
    """Tests that a page names and that do not exist."""
    return [
        f"{file}::{name}" for file, name in TEST.findall(page)
        if not (ROOT / file).is_file() or (name and name not in functions_of(ROOT / file))
    ]  # fmt: skip


def test_every_test_that_the_page_names_exists():
    assert missing(PAGE) == []
    assert missing("`tests/security/test_access.py::test_nothing_of_the_sort`") != []


def test_every_row_has_a_defence_and_a_test():
    assert len(table()) > 40
    for row in table():
        assert len(row) == 3, row
        assert all(row), row
        assert TEST.fullmatch(row[2]), row


def test_every_test_named_after_an_advisory_is_on_the_page():
    ids = {match.lower().replace("-", "_") for match in ID.findall(PAGE)}
    for file in sorted((ROOT / "tests" / "security").glob("test_*.py")):
        for name in functions_of(file):
            for found in re.findall(r"cve_\d{4}_\d+|ghsa(?:_[a-z0-9]{4}){3}", name):
                assert found in ids, f"{file.name}::{name}"


def test_a_row_s_test_is_named_after_an_advisory_of_the_row_or_covers_more():
    general = ("test_source.py", "test_files.py")
    for advisory, _, test in table():
        file, name = TEST.findall(test)[0]
        if file.endswith(general):
            continue
        ids = [match.lower().replace("-", "_") for match in ID.findall(advisory)]
        if ids:
            assert any(one in name for one in ids), (advisory, name)
