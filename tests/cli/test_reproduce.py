"""`hasten reproduce`: what it prints and writes, and what it refuses before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hasten.bench.reproduce as reproductions
from hasten.bench import report
from hasten.bench.report import Reproduction, Spread

MACHINE = {"cpu": "x", "cpu_features": "avx2", "threads": 1, "memory_gb": 1.0, "python": "3", "torch": "2", "hasten": "0"}


class Stub:
    """A reproduction that takes no time."""

    claim_checked = "What is tried here."

    def __init__(self, slug: str, holds: bool = True) -> None:
        self.slug, self.holds = slug, holds

    def reproduce(self, quick, progress):
        progress("trying", 1, 1)
        bars = [
            {"label": "plain", "median": 1.0, "min": 1.0, "max": 1.0},
            {"label": self.slug, "median": 1.5, "min": 1.2, "max": 1.6},
        ]
        extra = {"quick": quick, "bars": bars, "bars_of": "speedup", "quality_is": "share of equal texts"}
        return Reproduction(
            self.slug, "The claim.", self.holds, Spread(1.5, 1.2, 1.6), {"baseline": 1.0, "method": 0.9}, extra, "On chat.",
            MACHINE, (0, 1, 2), 2.5,
        )  # fmt: skip


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    made = {"aded": Stub("aded"), "rsd": Stub("rsd", holds=False)}
    monkeypatch.setattr(reproductions, "slugs", lambda: tuple(made))
    monkeypatch.setattr(reproductions, "find", lambda slug: made[slug])
    monkeypatch.chdir(tmp_path)
    return made


def test_it_prints_claim_measurement_quality_and_limits(hasten, stubs):
    result = hasten("reproduce", "aded", "--quick")
    assert result.code == 0, result.err
    for said in (
        "aded: came out as claimed (a quick run)", "claim: The claim.", "tried here: What is tried here.",
        "speed: 1.50 (1.20-1.60)x", "share of equal texts: baseline 1.0, method 0.9", "does not help: On chat.",
    ):  # fmt: skip
        assert said in result.out
    assert "wrote" not in result.out
    assert list(Path.cwd().iterdir()) == []
    short = hasten("reproduce", "rsd")
    assert short.code == 0
    assert "rsd: FELL SHORT of the claim\n" in short.out


def test_json_is_one_object_with_the_records_fields(hasten, stubs):
    result = hasten("reproduce", "aded", "--json")
    values = json.loads(result.out)
    assert list(values) == [
        "slug", "claim", "direction_holds", "speedup", "quality", "extra", "no_help", "machine", "seeds", "seconds",
    ]  # fmt: skip
    assert values["speedup"] == {"median": 1.5, "min": 1.2, "max": 1.6}
    assert Reproduction.from_dict(values).slug == "aded"
    lines = hasten("reproduce", "all", "--json").out.splitlines()
    assert [json.loads(line)["slug"] for line in lines] == ["aded", "rsd"]


def test_a_whole_run_in_a_checkout_leaves_result_and_plot(hasten, stubs, monkeypatch):
    here = Path.cwd()
    (here / "docs").mkdir()
    (here / "docs" / "generate.py").write_text("")
    (here / "src" / "hasten").mkdir(parents=True)
    monkeypatch.chdir(here / "src")
    result = hasten("reproduce", "all")
    assert result.code == 0, result.err
    folder = here / "docs" / "results"
    assert sorted(path.name for path in folder.iterdir()) == ["aded.html", "aded.json", "rsd.html", "rsd.json"]
    assert report.read(folder / "rsd.json").direction_holds is False
    assert result.out.count("wrote ") == 4
    for path in folder.iterdir():
        path.unlink()
    assert hasten("reproduce", "all", "--quick").code == 0
    assert list(folder.iterdir()) == [], "a quick run does not replace a whole one"
    assert hasten("reproduce", "aded", "--quick", "--out", str(here / "x")).code == 0
    assert report.read(here / "x" / "aded.json").extra["quick"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("token-recyclin",), 2, "did you mean 'token-recycling'"),
        (("adablok",), 2, "did you mean 'adablock'"),
        (("diffucoder",), 1, "'diffucoder' (DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation) is planned"),
        (("prompt-lookup",), 1, "'prompt-lookup' is a baseline"),
        (("aded", "--threads", "0"), 2, "threads = 0"),
        ((), 2, ""),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_before_anything_runs(hasten, arguments, code, says):
    result = hasten("reproduce", *arguments)
    assert result.code == code
    assert says in result.err
    assert result.out == "" or not arguments
