"""The record of a reproduction: checked when made and when read, the same after a round through its file."""

from __future__ import annotations

import json
import subprocess

import pytest

from hasten.bench import report
from hasten.bench.report import Reproduction, Spread
from hasten.errors import ConfigError, FormatError

MACHINE = {"cpu": "x", "cpu_features": "avx2", "threads": 1, "memory_gb": 1.0, "python": "3", "torch": "2", "hasten": "0"}
GOOD = {
    "slug": "prompt-lookup", "claim": "A claim.", "direction_holds": True, "speedup": Spread(1.5, 1.2, 1.9),
    "quality": {"baseline": 1.0, "method": 1.0}, "extra": {"rows": [1, 2]}, "no_help": "Elsewhere.",
    "machine": MACHINE, "seeds": (0, 1, 2), "seconds": 3.25,
}  # fmt: skip


def test_a_spread_is_median_least_and_greatest():
    assert Spread.of([3.0, 1.0, 2.00049]) == Spread(2.0, 1.0, 3.0)
    assert str(Spread(1.5, 1.25, 2.0)) == "1.50 (1.25-2.00)"
    for values in ((1.0, 1.5, 2.0), (float("nan"), 1.0, 2.0), (1.0, True, 2.0)):
        with pytest.raises(ConfigError, match="spread"):
            Spread(*values)
    with pytest.raises(ConfigError, match="values"):
        Spread.of([])


def test_a_record_comes_back_from_its_file(tmp_path):
    result = Reproduction(**GOOD)
    path = report.write(result, tmp_path / "made")
    assert path.name == "prompt-lookup.json"
    assert report.read(path) == result
    assert list(json.loads(path.read_text())) == list(GOOD)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slug", "Prompt Lookup"), ("claim", " "), ("no_help", ""), ("direction_holds", 1), ("speedup", 1.5),
        ("quality", {"baseline": 1}), ("quality", {"baseline": 1, "method": 1, "x": 1}), ("machine", {"cpu": "x"}),
        ("seeds", ()), ("seeds", (0, -1)), ("seeds", (0, True)), ("seconds", -1.0), ("seconds", float("nan")),
        ("extra", {"x": float("nan")}), ("extra", {"x": object()}), ("quality", {"baseline": 1, "method": float("inf")}),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(name, value):
    with pytest.raises(ConfigError) as error:
        Reproduction(**{**GOOD, name: value})
    assert error.value.field == name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extra": None}, "extra"), ({"speedup": {"median": 1}}, "speedup"), ({"seeds": "012"}, "seeds"),
        ({"more": 1}, "more"), ({"slug": "rsd"}, "rsd"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name(tmp_path, change, says):
    path = report.write(Reproduction(**GOOD), tmp_path)
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(FormatError, match=f"prompt-lookup.json.*{says}"):
        report.read(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "\x00"])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    path = tmp_path / "rsd.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"rsd\.json"):
        report.read(path)
    with pytest.raises(FormatError, match=r"gone\.json"):
        report.read(tmp_path / "gone.json")


def test_the_machine_is_what_this_is():
    found = report.machine("safetensors")
    assert {*MACHINE, "commit", "date", "safetensors"} == set(found)
    assert found["memory_gb"] > 0
    json.dumps(found)


def test_the_commit_is_that_of_the_tree_that_holds_the_folder(tmp_path):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert report.commit(package) == ""
    git("init", "-q")
    assert report.commit(package) == "", "inside a tree, not of it"
    git("add", ".")
    git("commit", "-qm", "x")
    head = git("rev-parse", "--short", "HEAD")
    assert report.commit(package) == head
    (package / "__init__.py").write_text("changed = 1\n")
    (tmp_path / "elsewhere").write_text("x")
    assert report.commit(package) == head + "+"
