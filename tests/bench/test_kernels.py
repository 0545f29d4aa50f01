"""`hasten bench --suite kernels`: the whole suite on a tiny model, its figures against what they must add up to."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from chat_model import write_model

from hasten.bench import kernels
from hasten.errors import IncompatibleError
from hasten.kernels import library

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("tiny-chat")))


def test_every_part_is_measured(folder, monkeypatch):
    monkeypatch.setattr(kernels, "SIZES", (1, 2, 8))
    monkeypatch.setattr(kernels, "PREFILL", 64)
    monkeypatch.setattr(kernels, "CONTEXT", 8)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: 10e9)
    monkeypatch.setattr(kernels.curve, "__defaults__", (16, 2))
    seen = []
    result = kernels.measure(
        folder, rounds=2, tokens=6, peers=(), progress=lambda *a: seen.append(a), cache_bytes=50_000_000
    )
    json.dumps(result, allow_nan=False)
    assert seen[-1][1:] == (2, 2)
    for mode in ("hasten exact", "hasten int8"):
        one = result[mode]
        assert one["ratio_to_one"]["1"] == 1.0
        assert sum(one["share_of_time"]["1"].values()) == pytest.approx(1.0, abs=0.01)
        assert one["share_of_bandwidth"] == pytest.approx(one["gb_per_s"] / 10, abs=0.01)
        race = result[f"race, {mode}"][mode]
        assert race["first_over_this"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert race["same_tokens_as_first"] == 6


def test_a_race_takes_turns_and_compares_within_a_round():
    order = []

    def decoder(name, seconds):
        def run(prompt, tokens):
            order.append(name)
            return 0.0, seconds, [1, 2, 3] if name == "a" else [1, 2, 4]

        return run

    result = kernels.race({"a": decoder("a", 1.0), "b": decoder("b", 2.0), "c": decoder("c", 0.5)}, [1], 5, 3)
    assert order[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]  # the first three are not timed
    assert result["b"]["first_over_this"]["median"] == 2.0
    assert result["c"]["first_over_this"]["median"] == 0.5
    assert result["b"]["tokens_per_s"]["median"] == 2.0
    assert result["b"]["same_tokens_as_first"] == 2


def test_models_on_torch_are_refused(folder):
    with pytest.raises(IncompatibleError, match="native stack"):
        kernels.measure(folder, backbone="torch")


def test_weight_bytes_are_those_that_a_token_reads():
    native = tiny.native(tiny.model())
    c = native.config
    rows = sum(-(-r // 16) * 16 * cols for name, (r, cols) in _shapes(c).items() if name != "embed")
    assert kernels.weight_bytes(native) == 4 * rows
    assert torch.is_tensor(native.embed_rows(torch.tensor([1])))


def _shapes(config):
    from hasten.models.packing import matrix_shapes

    return matrix_shapes(config)
