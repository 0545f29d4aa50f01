"""Perplexity of a text: against sums of the model's own log-probabilities, the same for the same seeds, and what is refused."""

from __future__ import annotations

import json
import math

import pytest

import hasten
from hasten.bench import perplexity
from hasten.bench.page import page
from hasten.bench.suites import documentation
from hasten.errors import ConfigError, FormatError, IncompatibleError

TEXT = "sort: k a d b\na b d k\ncopy: cat sun pen\ncat sun pen\nreverse: a d k s\ns k d a\n" * 4


@pytest.fixture(scope="module")
def ar():
    return hasten.load("mini-ar", cache_bytes=50_000_000)


def test_it_is_the_mean_log_probability_of_the_second_halves(ar, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    found = perplexity.measure(ar, options={"text": str(tmp_path / "t.txt"), "window": 32, "per_group": 2}, seeds=(0, 1, 2))
    ids = ar.tokenizer.encode(TEXT, bos=False)
    bos = ar.model.capabilities.bos_id
    windows = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    each = [-ar.score([bos, *w[:16]], w[16:]).total / 16 for w in windows]
    low, high = math.exp(min(each)), math.exp(max(each))
    assert low - 1e-3 <= found["perplexity"]["min"] <= found["perplexity"]["max"] <= high + 1e-3
    bits = found["bits_per_byte"]["median"]
    assert bits == pytest.approx(math.log2(found["perplexity"]["median"]), rel=1e-3), "one character is one token here"
    assert (found["likelihood"], found["cases"]) == ("exact", 6)
    json.dumps(found, allow_nan=False)
    assert "bits per byte" in page(found)


def test_all_windows_together_are_the_whole_text(ar, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    ids = ar.tokenizer.encode(TEXT, bos=False)
    count = len(ids) // 32
    options = {"text": str(tmp_path / "t.txt"), "window": 32, "per_group": count}
    found = perplexity.measure(ar, options=options, seeds=(0,))["perplexity"]["median"]
    bos = ar.model.capabilities.bos_id
    windows = [ids[i * 32 : (i + 1) * 32] for i in range(count)]
    total = sum(ar.score([bos, *w[:16]], w[16:]).total for w in windows)
    assert found == pytest.approx(math.exp(-total / (16 * count)), rel=1e-3)


def test_a_masked_model_has_a_bound_that_repeats_itself():
    llm = hasten.load("mini-dlm", cache_bytes=50_000_000)
    options = {"window": 24, "per_group": 1, "samples": 8}
    one, again = (perplexity.measure(llm, options=options, seeds=(0, 1)) for _ in range(2))
    assert one["likelihood"] == "a bound, 8 samples"
    assert one["perplexity"] == again["perplexity"]
    assert one["bits_per_byte"]["median"] > 0


@pytest.mark.parametrize(
    ("options", "seeds", "kind"),
    [
        ({"window": 4}, (0,), ConfigError), ({"window": 5000}, (0,), ConfigError), ({"samples": 4}, (0,), IncompatibleError),
        ({"per_group": 10_000}, (0,), ConfigError), ({"per_group": 1}, (), ConfigError), ({"text": "/none"}, (0,), FormatError),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(ar, options, seeds, kind):
    with pytest.raises(kind):
        perplexity.measure(ar, options=options, seeds=seeds)


def test_texts_are_read_as_they_are(tmp_path):
    assert perplexity.read("") == documentation()
    assert len(documentation()) > 20_000
    (tmp_path / "bad").write_bytes(b"\xff")
    (tmp_path / "empty").write_text(" \n")
    for name in ("bad", "empty"):
        with pytest.raises(FormatError, match=name):
            perplexity.read(str(tmp_path / name))
