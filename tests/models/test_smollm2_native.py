"""The native stack on the real model: the torch stack's text, the price of 8-bit activations, bits that never move."""

from __future__ import annotations

import inspect
import math
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import hasten
from hasten.bench.suites import spec
from hasten.engine.contracts import RowInput
from hasten.engine.masks import CAUSAL
from hasten.errors import ConfigError
from hasten.kernels import library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not library.available(), reason="the native library was not built"),
]


@pytest.fixture(scope="module")
def stacks(smollm2_gguf):
    """activations or "torch" -> the loaded model."""
    load = hasten.load
    return {
        "exact": load(smollm2_gguf, cache_bytes=2_000_000_000),
        "int8": load(smollm2_gguf, activations="int8", cache_bytes=400_000_000),
        "bfloat16": load(smollm2_gguf, dtype="bfloat16", cache_bytes=400_000_000),
        "torch": load(smollm2_gguf, backbone="torch", dtype="float32", cache_bytes=2_000_000_000),
    }


@pytest.fixture(scope="module")
def prompts(stacks):
    return [stacks["exact"].chat_ids([{"role": "user", "content": text}]) for many in spec(10).values() for text in many]


def test_exact_logits_are_those_of_the_dequantised_model(stacks, prompts):
    for ids in prompts[::6]:
        row = RowInput(torch.tensor(ids[:200]), torch.arange(len(ids[:200])), logits="all")
        want, got = (stacks[name].model.run([row]).logits for name in ("torch", "exact"))
        assert (got - want).norm() <= 1e-3 * want.norm()
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()


def test_greedy_texts_are_those_of_the_torch_stack(stacks, prompts):
    """60 prompts x 128 tokens; the torch side runs batched, which changes nothing there either."""
    assert len(prompts) == 60
    sampling = {"max_tokens": 128, "ignore_eos": True, "method": "plain"}
    got = [out.tokens for out in stacks["exact"].generate(prompts, **sampling)]
    want = [out.tokens for out in stacks["torch"].generate(prompts, **sampling)]
    assert got == want


def test_every_instruction_set_writes_the_same_text(stacks, prompts):
    sampling = {"max_tokens": 48, "ignore_eos": True, "method": "plain"}
    texts = {}
    for level in library.LEVELS[1:]:
        try:
            library.set_level(level)
        except ConfigError:  # not on this processor
            continue
        texts[level] = [out.tokens for out in stacks["exact"].generate(prompts[::10], **sampling)]
    library.set_level("auto")
    assert len(texts) > 1
    assert all(text == texts["portable"] for text in texts.values())


@pytest.mark.parametrize("name", ["exact", "int8", "bfloat16"])
def test_a_pass_gives_the_bits_of_single_tokens_and_a_batch_those_of_rows_alone(stacks, prompts, name):
    model = stacks[name].model
    ids = torch.tensor(prompts[20][:160])
    pool = model.pool(400_000_000)

    def after(count: int):
        row = pool.open(256)
        model.run([RowInput(ids[:count], torch.arange(count), row)])
        row.advance(count)
        return row

    row = after(96)
    single = []
    for i in range(96, 128):
        single.append(model.run([RowInput(ids[i : i + 1], torch.tensor([i]), row)]).logits)
        row.advance(1)
    single = torch.cat(single)
    for count in (2, 3, 5, 8, 16, 32):
        many = model.run([RowInput(ids[96 : 96 + count], torch.arange(96, 96 + count), after(96), CAUSAL, "all")])
        assert torch.equal(many.logits, single[:count])
    lengths = (96, 17, 1)
    rows = [RowInput(ids[n : n + 1], torch.tensor([n]), after(n)) for n in lengths]
    together = model.run(rows).logits
    for i, n in enumerate(lengths):
        assert torch.equal(model.run([RowInput(ids[n : n + 1], torch.tensor([n]), after(n))]).logits[0], together[i])


def test_the_price_of_8_bit_activations_is_a_small_part_of_a_percent(stacks):
    """Perplexity on the standard library's documentation, prose and code alike; the bound is half a percent."""
    names = [
        "argparse",
        "json",
        "collections",
        "random",
        "statistics",
        "csv",
        "datetime",
        "logging",
        "threading",
        "subprocess",
        "pathlib",
        "tarfile",
    ]
    texts = [
        (inspect.getdoc(import_module(name)) or "") + "\n" + inspect.getsource(import_module(name))[:2500] for name in names
    ]
    loss = {name: [] for name in ("exact", "int8")}
    for name, values in loss.items():
        for text in texts:
            ids = stacks[name].encode(text)[:700]
            values.append(-stacks[name].score(ids[:1], ids[1:]).total / (len(ids) - 1))
    perplexity = {name: math.exp(statistics.mean(values)) for name, values in loss.items()}
    print(perplexity)
    assert perplexity["int8"] <= 1.005 * perplexity["exact"]


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_smaller_caches_cost_little(stacks, smollm2_gguf, cache):
    small = hasten.load(smollm2_gguf, cache=cache, cache_bytes=400_000_000)
    text = inspect.getsource(import_module("textwrap"))
    ids = stacks["exact"].encode(text)[:900]
    exact, own = (-one.score(ids[:1], ids[1:]).total / (len(ids) - 1) for one in (stacks["exact"], small))
    assert math.exp(own) <= (1.005 if cache == "bfloat16" else 1.02) * math.exp(exact)


GROWTH = """
import sys, torch, hasten, hasten.llm, hasten.models.native

def megabytes(what):
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith(what))

torch.set_num_threads(2)
before = megabytes("VmRSS")
llm = hasten.load(sys.argv[1], cache_bytes=30_000_000)
llm.generate("Write a story about the sea.", max_tokens=200, ignore_eos=True)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what a process holds")
def test_a_model_takes_its_file_its_cache_and_little_more(smollm2_gguf):
    """Packed before, and measured: weights are mapped once, and 60 MB are for the vocabulary and a pass."""
    command = [sys.executable, "-c", GROWTH, str(smollm2_gguf)]
    for _ in range(2):  # the first one may pack the weights and measure passes
        grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    keys_and_values = 256 * 30 * 2 * 3 * 64 * 4 / 1e6  # slots, layers, k and v, heads, numbers, bytes
    print(grown)
    assert grown <= Path(smollm2_gguf).stat().st_size / 1e6 + keys_and_values + 60
