"""`hasten run` on a model that fills canvases: the text, slots, the canvas view, presets and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

import hasten as package
from hasten.cli._canvas import CanvasView
from hasten.models.catalog import MINI
from hasten.types import Event


@pytest.fixture(scope="module")
def mini() -> package.LLM:
    return package.load("mini-dlm")


def test_run_prints_what_the_api_gives(hasten, mini):
    result = hasten("run", "mini-dlm", "sort: k a d", "--max-tokens", "32", "--method", "threshold")
    expected = mini.chat([{"role": "user", "content": "sort: k a d"}], method="threshold", max_tokens=32).text
    assert (result.code, result.out, result.err) == (0, expected + "\n", "")


@pytest.mark.parametrize("method", ["auto", "plain", "exact", "fast", "few-step"])
def test_every_preset_decodes(hasten, method):
    result = hasten("run", "mini-dlm", "sort: k a d", "--max-tokens", "32", "--method", method, "--json")
    assert result.code == 0
    usage = json.loads(result.out)["usage"]
    assert 1 <= usage["forwards"] <= 33


@pytest.mark.parametrize("method", ["auto", "fast"])
def test_a_short_task_whose_length_nobody_gave_is_answered_right(hasten, mini, method):
    """The model says how long its answers are; in a canvas of 256 the same task comes out wrong or empty."""
    for task, answer in (("reverse: k d b a", "a b d k"), ("sort: k a d b", "a b d k")):
        result = hasten("run", "mini-dlm", task, "--method", method)
        assert (result.code, result.out) == (0, answer + "\n")
        assert mini.chat([{"role": "user", "content": task}], method=method).text == answer
    result = hasten("chat", "mini-dlm", "--method", method, "--json", stdin=b"sort: k a d b\n")
    assert json.loads(result.out)["text"] == "a b d k"
    assert mini.model.capabilities.canvas == 64


@pytest.mark.parametrize("value", [0, -3, "many", 2.5])
def test_a_wrong_length_in_a_models_files_is_refused_by_name(hasten, tmp_path, value):
    shutil.copytree(MINI / "mini-dlm", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"max_new_tokens": value}))
    result = hasten("run", str(tmp_path / "model"), "copy: a")
    assert result.code != 0
    assert "max_new_tokens" in result.err


def test_slots_and_a_length_at_once_are_refused(hasten):
    result = hasten("run", "mini-dlm", "--raw", "--fill", "copy: a\n<mask:3>", "--max-tokens", "8")
    assert result.code != 0
    assert "max_tokens is given" in result.err


def test_the_exact_preset_gives_the_plain_text(mini):
    prompts = ["sort: k a d\n", "records: 21 bob 31;22 eve 25\n", "add: 47+85\n"]
    plain, exact = (mini.generate(prompts, method=method, max_tokens=80) for method in ("plain", "exact"))
    assert [one.tokens for one in plain] == [one.tokens for one in exact]


def test_fill_keeps_what_stands_around_the_slot(hasten, mini):
    result = hasten("run", "mini-dlm", "--raw", "--fill", "copy: cat sun pen\ncat <mask:3> pen")
    assert result.code == 0
    assert result.out == mini.fill("copy: cat sun pen\ncat <mask:3> pen").text + "\n"
    assert result.out.startswith("copy: cat sun pen\ncat ")
    assert result.out.endswith(" pen\n")
    assert len(result.out) == len("copy: cat sun pen\ncat sun pen\n")


@pytest.mark.parametrize(
    ("text", "sampling", "field"),
    [
        ("no slot", {}, "text"),
        ("a<mask:0>b", {}, "text"),
        ("a<mask:9999999>b", {}, "text"),
        ("a<mask:3>b", {"max_tokens": 4}, "max_tokens"),
    ],
)
def test_slots_that_cannot_be_filled_are_refused(mini, text, sampling, field):
    with pytest.raises(package.HastenError) as caught:
        mini.fill(text, **sampling)
    assert caught.value.field == field


def test_a_mask_that_a_user_types_is_text(mini):
    assert mini.model.capabilities.mask_id not in mini.encode("<mask> <mask>")
    assert mini.decode(mini.encode("<mask>")) == "<mask>"


def test_watching_shows_the_canvas_and_the_text(hasten, mini):
    result = hasten("run", "mini-dlm", "sort: k a d", "--max-tokens", "32", "--method", "threshold", "--watch")
    text = mini.chat([{"role": "user", "content": "sort: k a d"}], method="threshold", max_tokens=32).text
    assert result.code == 0
    assert text in result.out
    assert "forwards" in result.out
    assert not mini.engine.canvas_loop.provisional


def test_watching_and_json_do_not_go_together(hasten):
    result = hasten("run", "mini-dlm", "x", "--watch", "--json")
    assert result.code != 0
    assert "--watch" in result.err


def test_the_view_tells_final_from_guessed_from_masked(mini):
    view = CanvasView(mini)
    a, b = mini.encode("ab")[1:]
    for event in (
        Event("block", 1, position=5, total=9),
        Event("forward", 1),
        Event("commit", 1, position=5, token=a),
        Event("propose", 1, position=6, token=b),
        Event("commit", 1, position=7, token=3),
    ):
        view.update(event)
    drawn = view.text()
    assert drawn.plain.splitlines() == ["ab⏹░", "2 tokens in 1 forwards"]
    styles = {drawn.plain[span.start]: str(span.style) for span in drawn.spans}
    assert (styles["b"], styles["░"]) == ("dim italic", "dim")
    assert styles["a"] not in ("dim", "dim italic")
    view.update(Event("commit", 1, position=5, token=-1))
    assert view.text().plain.startswith("░b")


def test_drafters_and_canvas_methods_stay_with_their_kind(mini, hasten, tiny):
    with pytest.raises(package.HastenError, match="causal"):
        mini.generate("x\n", method="prompt-lookup")
    result = hasten("run", tiny, "x", "--method", "threshold")
    assert result.code != 0
    assert "masked" in result.err


def test_a_model_without_masks_runs_its_own_sampler(hasten, tmp_path):
    from gemma import write

    folder = str(write(tmp_path))
    how = ("--max-tokens", "12", "--seed", "4", "--method", "diffusion-gemma:steps=4")
    expected = package.load(folder).chat([{"role": "user", "content": "a b"}], max_tokens=12, seed=4, method=how[-1])
    result = hasten("run", folder, "a b", *how)
    assert (result.code, result.out) == (0, expected.text + "\n")
    watched = hasten("run", folder, "a b", *how, "--watch")
    assert watched.code == 0
    assert watched.out.rstrip().endswith(expected.text.rstrip())
    refused = hasten("run", folder, "a b", "--method", "threshold")
    assert refused.code == 2
    assert "no mask token" in refused.err
