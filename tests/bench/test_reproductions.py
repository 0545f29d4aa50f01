"""Reproductions run through on a tiny model: the same code as on the real one, its records whole and worked out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import toys
from chat_model import write_model

from hasten.bench import drafters, plot, report
from hasten.bench.report import Reproduction
from hasten.bench.reproduce import find, rsd, slugs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny chat model whose window holds the suite's prompts, with statistics and layers made for it."""
    import hasten
    from hasten.train.recipes import Recipe, train

    folder = write_model(tmp_path_factory.mktemp("small"), window=4096)
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_HOME", str(home))
        llm = hasten.load(folder, dtype="float32", cache_bytes=64_000_000)
        sizes = Recipe(texts=10, answer=12, steps=3, tokens=256, vocab=200, held_out=1)
        for recipe in ("aded", "fspad", "eagle"):
            train(recipe, llm, sizes)
    return str(folder), str(home)


@pytest.mark.parametrize("slug", ["token-recycling", "aded", "rsd", "fspad"])
def test_a_reproduction_runs_through(small, monkeypatch, tmp_path, slug):
    model, home = small
    monkeypatch.setenv("HASTEN_HOME", home)
    monkeypatch.setattr(drafters, "MODEL", model)
    groups = ("chat", "edit") if slug == "aded" else ("chat",)
    monkeypatch.setattr(drafters, "QUICK_GROUPS", groups)
    seen: list[tuple[str, int, int]] = []
    result = find(slug).reproduce(True, lambda *at: seen.append(at))
    assert isinstance(result, Reproduction)
    assert (result.slug, result.seeds) == (slug, (0, 1, 2))
    assert result.speedup is not None
    assert result.speedup.min > 0
    assert result.seconds > 0
    methods = result.extra["methods"]
    assert {"plain", "prompt-lookup"} < set(methods)
    assert [bar["label"] for bar in result.extra["bars"]] == list(methods)
    assert methods["plain"]["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert methods["plain"]["tokens_per_pass"]["median"] == 1.0
    if slug != "rsd":  # greedy, float32: whatever is drafted, the texts are plain decoding's
        assert {tuple(one["same_text"]) for one in methods.values()} == {(3 * len(groups), 3 * len(groups))}
        assert result.quality == {"baseline": 1.0, "method": 1.0}
    loops = {what: total for what, _, total in seen if not what.startswith("loading")}
    assert loops["answering prompts"] == 3 * len(groups)
    assert all((what, total, total) in seen for what, total in loops.items())
    path = report.write(result, tmp_path)
    assert report.read(path) == result
    assert "</svg>" in plot.page(result, find(slug).claim_checked)


def test_fspad_without_an_eagle_layer_leaves_the_claim_open(small, monkeypatch, tmp_path):
    import shutil

    model, home = small
    monkeypatch.setattr(drafters, "MODEL", model)
    shutil.copytree(home, tmp_path / "home")
    [eagle] = (tmp_path / "home").rglob("eagle.safetensors")
    eagle.unlink()
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(drafters, "QUICK_GROUPS", ("chat",))
    result = find("fspad").reproduce(True, lambda *at: None)
    assert result.direction_holds is False
    assert "eagle" in result.extra["note"]
    [fspad] = (tmp_path / "home").rglob("fspad.safetensors")
    fspad.unlink()
    with pytest.raises(ValueError, match="no layer of 'fspad'"):
        find("fspad").reproduce(True, lambda *at: None)


def test_pairs_are_trained_by_the_command_and_kept(small, monkeypatch, tmp_path):
    from hasten.bench import trained
    from hasten.errors import HastenError

    model, home = small
    monkeypatch.setenv("HASTEN_HOME", home)
    sizes = {"texts": 10, "answer": 12, "steps": 2, "tokens": 256, "vocab": 100}
    seen: list = []
    made = trained.pairs(("fspad", "eagle"), model, (0,), sizes, tmp_path, lambda *at: seen.append(at))
    assert seen == [("training drafters", i, 2) for i in range(3)]
    for slug in ("fspad", "eagle"):
        assert Path(made[0][slug]["path"]) == tmp_path / f"{slug}-0.safetensors"
        assert made[0][slug]["steps"] == 2
    stamp = (tmp_path / "eagle-0.safetensors").stat().st_mtime_ns
    assert trained.pairs(("eagle",), model, (0,), sizes, tmp_path, lambda *at: None)[0]["eagle"] == made[0]["eagle"]
    assert (tmp_path / "eagle-0.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(HastenError, match="train nothing"):
        trained.train("nothing", model, 0, sizes, tmp_path / "x.safetensors", tmp_path)


def test_two_children_are_worked_out_as_by_enumeration():
    r = random.Random(3)
    for _ in range(30):
        p, q = toys.random_law(5, r), toys.random_law(5, r)
        q[r.randrange(5)] = 0
        q /= q.sum()
        wanted = [toys.acceptance(p, q, 1, True), toys.acceptance(p, q, 2, True), toys.acceptance(p, q, 2, False)]
        assert rsd.two_children(p, q) == pytest.approx(tuple(wanted), abs=1e-9)
    same = toys.random_law(5, r)
    assert rsd.two_children(same, same.clone()) == (1.0, 1.0, 1.0)


def test_the_counted_draft_is_a_distribution_that_falls_back():
    import numpy as np

    from hasten.draft._trigrams import Trigrams

    table = Trigrams.build([np.array([1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 2, 6])], 8)
    draft = rsd.Counted(table, 8)
    for text in ([1, 2], [7, 2], [7, 7], [2]):
        assert float(draft.law(text).exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert draft.law([1, 2]).exp()[[3, 4]].tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-3)
    followers = set(torch.isfinite(draft.law([7, 2])).nonzero().flatten().tolist())
    assert followers == {3, 4, 6}, "what followed 2 after any token"
    assert set(torch.isfinite(draft.law([7, 7])).nonzero().flatten().tolist()) == {1, 2, 3, 4, 5, 6}
    from hasten.engine.contracts import RowView

    [first] = draft.begin([RowView(4, [1, 2], 9, 1.0, 0)], 2, 4)
    assert torch.equal(first, draft.law([1, 2]))
    [grown] = draft.grow([(4, [3, 4], [-1, -1])])
    [below] = draft.grow([(4, [1], [1])])
    assert torch.equal(grown, torch.stack([draft.law([2, 3]), draft.law([2, 4])]))
    assert torch.equal(below[0], draft.law([4, 1]))


def test_the_plot_is_self_contained_and_escaped():
    from test_report import GOOD

    bars = [{"label": "<b>", "median": 1.5, "min": 1.0, "max": 12.0}]
    page = plot.page(
        Reproduction(**{**GOOD, "extra": {"bars": bars, "bars_of": "speedup"}, "claim": "a < b & c"}), "Tried."
    )
    assert "<b>" not in page
    assert "a &lt; b &amp; c" in page
    assert "src=" not in page
    assert "href=" not in page
    assert page.count("<rect") == 1
    plain = plot.page(Reproduction(**GOOD), "Tried.")
    assert plain.count("<rect") == 2, "without bars of its own, the speed-up is drawn"
    assert json.dumps(slugs()).count("rsd") == 1
