"""Profiles of tuned methods: kept and read back for this model on this machine, refused for any other, never half written."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hasten
from hasten.errors import ConfigError, FormatError, HastenError, IncompatibleError
from hasten.kernels import library
from hasten.llm import LLM
from hasten.models import tuned
from hasten.models.tuned import Profile, fingerprint, machine, place, prepare, read, write

native_only = pytest.mark.skipif(not library.available(), reason="the native library was not built")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def profile(model, name="tiny", *methods: str, **more) -> Profile:
    values = {
        "model": fingerprint(model, name), "machine": machine(model), "name": name, "method": methods or ("prompt-lookup",),
        "baseline": "plain", "exact": True, "max_quality_loss": 0.0, "why": "It was faster.", "hasten": "0",
        "speedup": {"median": 1.5, "min": 1.2, "max": 1.9}, "measured": {"seed": 3},
    }  # fmt: skip
    return Profile(**{**values, **more})


def llm(model=None, name="tiny") -> LLM:
    class Loaded:
        source, tokenizer, dtype, bytes = "", None, None, 0

    Loaded.model = model or tiny.model()
    return LLM(Loaded(), name, cache_bytes=32_000_000)  # type: ignore[arg-type]


def test_what_is_written_is_read_and_a_second_replaces_it(home):
    model = tiny.model()
    first = profile(model)
    path = write(first, model, "tiny")
    assert path == place(model, "tiny")
    assert read(model, "tiny") == first
    second = profile(model, "tiny", "token-recycling:nodes=8", "prompt-lookup")
    write(second, tiny.model(), "tiny")  # loaded anew it is the same model
    assert read(model, "tiny") == second
    assert [one.name for one in (home / "tuned").iterdir()] == [path.name]


def test_tuned_decodes_with_the_methods_of_the_profile(home):
    one = llm()
    write(profile(one.model, "tiny", "token-recycling:nodes=8", "prompt-lookup"), one.model, "tiny")
    out = one.generate([5, 9, 13], method="tuned", max_tokens=20)
    assert out.method == ("token-recycling", "prompt-lookup")
    assert out.tokens == one.generate([5, 9, 13], method="plain", max_tokens=20).tokens
    write(profile(one.model, "tiny", "plain"), one.model, "tiny")
    one.forget()
    assert one.generate([5, 9, 13], method=["tuned"], max_tokens=4).method == ("plain",)


def test_without_a_profile_the_command_is_named():
    with pytest.raises(ConfigError, match="hasten tune tiny") as caught:
        llm().generate([5], method="tuned", max_tokens=4)
    assert caught.value.field == "method"


@pytest.mark.parametrize("names", [["tuned", "prompt-lookup"], ["plain", "tuned"], ["tuned", "tuned"]])
def test_tuned_goes_with_nothing_else(names):
    with pytest.raises(IncompatibleError, match="'tuned' cannot be combined"):
        llm().generate([5], method=names, max_tokens=4)
    with pytest.raises(ConfigError, match="settings"):
        llm().generate([5], method="tuned:nodes=4", max_tokens=4)


def test_the_profile_of_another_model_is_not_used():
    model = tiny.model()
    write(profile(model), model, "tiny")
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.layers[1].down.weight[0, 0] += 0.5  # an adapter merged into one matrix: embeddings are the same
    for other in (tiny.model(seed=1), tiny.model(tiny.NORMED), near):
        with pytest.raises(ConfigError, match="hasten tune tiny"):
            read(other, "tiny")
    assert read(model, "another name").method == ("prompt-lookup",), "a name is no part of the model"


def test_the_profile_of_another_machine_is_not_used(monkeypatch):
    model = tiny.model()
    write(profile(model), model, "tiny")
    monkeypatch.setattr(tuned, "processor", lambda: "another processor")
    with pytest.raises(ConfigError, match="another processor"):
        read(model, "tiny")
    monkeypatch.undo()


def test_other_threads_are_another_machine(monkeypatch):
    model = tiny.model()
    write(profile(model), model, "tiny")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 + 64)
    with pytest.raises(ConfigError, match="65 threads"):
        read(model, "tiny")


@native_only
def test_on_the_native_stack_weights_and_loading_options_count():
    stack = tiny.model()
    native = tiny.native(stack)
    write(profile(native), native, "tiny")
    assert read(tiny.native(tiny.model()), "tiny").method == ("prompt-lookup",)
    others = [
        tiny.native(stack, activations="int8"),
        tiny.native(stack, cache="int8"),
        stack,
        tiny.native(tiny.model(seed=1)),
    ]
    near = copy.deepcopy(stack)
    with torch.no_grad():
        near.layers[0].down.weight[0, 0] += 0.5
    for other in (*others, tiny.native(near)):
        with pytest.raises(ConfigError, match="hasten tune"):
            read(other, "tiny")


def test_a_file_copied_from_elsewhere_is_refused_by_what_it_says():
    mine, other = tiny.model(), tiny.model(seed=1)
    copied = write(profile(other), other, "tiny")
    shutil.copy(copied, place(mine, "tiny"))
    with pytest.raises(FormatError, match="model = ") as caught:
        read(mine, "tiny")
    assert "hasten tune tiny" in str(caught.value)
    write(dataclasses.replace(profile(mine), machine="a laptop"), mine, "tiny")
    with pytest.raises(FormatError, match="machine = 'a laptop'"):
        llm(mine).generate([5], method="tuned", max_tokens=4)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": None}, {"method": []}, {"method": "prompt-lookup"}, {"method": ["tuned"]}, {"method": [""]},
        {"method": ["a"] * 17}, {"method": ["x:y"]}, {"exact": 1}, {"exact": False}, {"max_quality_loss": 1.0},
        {"max_quality_loss": True}, {"speedup": {"median": 1.0}}, {"speedup": {"median": float("nan"), "min": 1.0, "max": 1.0}},
        {"why": ""}, {"why": 3}, {"measured": []}, {"more": 1}, {"date": None},
    ],
)  # fmt: skip
def test_a_changed_profile_is_refused(change):
    model = tiny.model()
    path = write(profile(model), model, "tiny")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match="hasten tune tiny") as caught:
        read(model, "tiny")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 9000, b" " * (1 << 20) + b"{}"])
def test_a_damaged_file_is_refused(data):
    model = tiny.model()
    path = write(profile(model), model, "tiny")
    path.write_bytes(data)
    with pytest.raises(FormatError, match="hasten tune tiny"):
        read(model, "tiny")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=6))
def test_whatever_bytes_are_changed_it_is_read_or_refused(at, piece):
    model = tiny.model()
    path = write(profile(model), model, "tiny")
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + piece + data[at + len(piece) :])
    try:
        found = read(model, "tiny")
    except HastenError:
        return
    assert (found.model, found.machine) == (fingerprint(model, "tiny"), machine(model))


def test_a_write_that_fails_leaves_the_profile_before(monkeypatch):
    model = tiny.model()
    write(profile(model), model, "tiny")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            write(profile(model, "tiny", "token-recycling"), model, "tiny")
    assert read(model, "tiny").method == ("prompt-lookup",)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="HASTEN_HOME"):
        prepare(tiny.model(), "tiny")


def test_on_a_canvas_a_preset_or_a_combination_is_used():
    one = hasten.load("mini-dlm", cache_bytes=50_000_000)
    names = ("factor:f=0.5", "canvas-cache")
    write(profile(one.model, one.name, *names, exact=False, max_quality_loss=0.05), one.model, one.name)
    prompt = "reverse: a d k\n"
    out = one.generate(prompt, method="tuned", max_tokens=32)
    assert out.method == ("factor", "canvas-cache")
    assert out.tokens == one.generate(prompt, method=list(names), max_tokens=32).tokens
