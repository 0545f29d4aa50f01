"""The native stack against the torch stack and transformers, and against itself in other company: bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import tiny
import torch

from hasten.combine import _auto
from hasten.engine.contracts import LayerHooks, MethodContext, Needs, RowInput
from hasten.engine.engine import PLAIN, Engine
from hasten.engine.masks import CAUSAL, FULL, BlockCausal, Explicit, PerLayer, PrefixLM, Tree
from hasten.errors import ConfigError, HastenError, MemoryFitError, UnsupportedError
from hasten.kernels import library
from hasten.models.load import load
from hasten.types import Request, SamplingParams

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")
TOLERANCE = 1e-4


def close(a: torch.Tensor, b: torch.Tensor, bound: float = TOLERANCE) -> bool:
    return bool((a - b).abs().max() <= bound * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", checkpoints.VARIANTS)
def test_logits_of_every_family_are_those_of_transformers(name, tmp_path):
    reference = checkpoints.build(name)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, backbone="native").model
    ids = checkpoints.ids(1, 60)[0]
    with torch.no_grad():
        want = reference(ids[None]).logits[0]
    row = model.pool(50_000_000).open(64)
    positions = torch.arange(60)
    first = model.run([RowInput(ids[:40], positions[:40], row, logits="all")])
    row.advance(40)
    rest = []
    for i in range(40, 60):
        rest.append(model.run([RowInput(ids[i : i + 1], positions[i : i + 1], row)]))
        row.advance(1)
    got = torch.cat([first.logits, *(one.logits for one in rest)])
    assert close(got, want)
    best = first.best + [one.best[0] for one in rest]
    assert best == got.argmax(-1).tolist()
    lse = first.log_sum_exp + [one.log_sum_exp[0] for one in rest]
    assert torch.tensor(lse).allclose(got.logsumexp(-1), atol=1e-4)
    assert first.backbone == "native"


def tree(nodes: int, chain: int, seed: int) -> Tree:
    r = random.Random(seed)
    return Tree(tuple(range(-1, chain - 1)) + tuple(r.randint(-1, chain + i - 1) for i in range(nodes)))


SIGHTS = {
    "causal": lambda t, s: CAUSAL,
    "full": lambda t, s: FULL,
    "block": lambda t, s: BlockCausal(5),
    "prefix": lambda t, s: PrefixLM(9),
    "tree": lambda t, s: tree(t - 2, 2, 3),
    "explicit": lambda t, s: Explicit(torch.rand(t, s, generator=torch.Generator().manual_seed(5)) < 0.6),
    "per-layer": lambda t, s: PerLayer(CAUSAL, {1: FULL}),
}


@pytest.mark.parametrize("name", SIGHTS)
@pytest.mark.parametrize("config", tiny.CONFIGS)
def test_every_rule_of_sight_is_the_torch_stack_s(config, name):
    stack = tiny.model(tiny.CONFIGS[config])
    native = tiny.native(stack)
    ids = checkpoints.ids(1, 40, tiny.VOCAB)[0]
    needs = Needs(hidden=(0, 2, 3), final_hidden=True, topk=4, embeds=True)
    out = []
    for model in (stack, native):
        row = model.pool(32_000_000).open(64)
        model.run([RowInput(ids[:20], torch.arange(20), row)])
        row.advance(20)
        sight = SIGHTS[name](12, 32)
        positions = torch.arange(20, 32)
        if name == "tree":
            depth = []
            for parent in sight.parents:
                depth.append(0 if parent < 0 else depth[parent] + 1)
            positions = 20 + torch.tensor(depth)
        out.append(model.run([RowInput(ids[20:32], positions, row, sight, "all")], needs))
    want, got = out
    assert close(got.logits, want.logits)
    assert close(got.final_hidden, want.final_hidden)
    assert close(got.embeds, want.embeds, 1e-6)
    for layer in needs.hidden:
        assert close(got.hidden[layer], want.hidden[layer])


def test_a_query_that_sees_nothing_gives_numbers_all_the_same():
    native = tiny.native(tiny.model())
    allowed = torch.zeros(3, 3, dtype=torch.bool)
    allowed[2, 0] = True
    done = native.run([RowInput(torch.tensor([5, 6, 7]), torch.arange(3), None, Explicit(allowed), "all")])
    want = tiny.model().run([RowInput(torch.tensor([5, 6, 7]), torch.arange(3), None, Explicit(allowed), "all")])
    assert close(done.logits, want.logits)


@pytest.mark.parametrize("cache", library.KV_TYPES)
@pytest.mark.parametrize("activations", library.ACTIVATIONS)
def test_a_row_s_numbers_do_not_depend_on_its_company(activations, cache):
    """Alone or in a batch, in one pass or token by token, as a branch of a tree or as plain text, with 1 or 3 threads."""
    config = tiny.CONFIGS["windowed"]
    native = tiny.native(tiny.model(config), activations=activations, cache=cache)
    ids = checkpoints.ids(1, 30, tiny.VOCAB)[0]
    pool = native.pool(32_000_000)

    def steps(threads: int) -> torch.Tensor:
        library.set_threads(threads)
        row, out = pool.open(64), []
        for i in range(30):
            out.append(native.run([RowInput(ids[i : i + 1], torch.tensor([i]), row)]).logits)
            row.advance(1)
        row.release()
        return torch.cat(out)

    before = library.native().hasten_threads()
    alone = steps(before)
    assert torch.equal(steps(1), alone)
    assert torch.equal(steps(3), alone)
    library.set_threads(before)
    whole = native.run([RowInput(ids, torch.arange(30), pool.open(64), CAUSAL, "all")])
    assert torch.equal(whole.logits, alone)
    others = [checkpoints.ids(1, n, tiny.VOCAB, seed=n)[0] for n in (1, 9, 17)]
    rows = [RowInput(one, torch.arange(len(one)), pool.open(64)) for one in others]
    mixed = native.run([rows[0], RowInput(ids, torch.arange(30), pool.open(64), CAUSAL, "all"), *rows[1:]])
    assert torch.equal(mixed.row_logits(1), alone)
    # the last ten tokens as one branch among others that fill the slots between them
    row = pool.open(128)
    native.run([RowInput(ids[:20], torch.arange(20), row)])
    row.advance(20)
    tokens, parents, depth, line = [int(ids[20])], [-1], [0], [0]
    r = random.Random(0)
    for i in range(21, 30):
        for _ in range(r.randint(0, 3)):  # wrong guesses
            tokens.append(r.randrange(tiny.VOCAB))
            at = r.randrange(len(parents))
            parents.append(at)
            depth.append(depth[at] + 1)
        tokens.append(int(ids[i]))
        parents.append(line[-1])
        depth.append(depth[line[-1]] + 1)
        line.append(len(tokens) - 1)
    done = native.run([RowInput(torch.tensor(tokens), 20 + torch.tensor(depth), row, Tree(tuple(parents)), "all")])
    assert torch.equal(done.logits[line], alone[20:])
    row.gather(20, line)  # and what was kept serves as the past
    following = native.run([RowInput(torch.tensor([3]), torch.tensor([30]), row)]).logits
    plain = pool.open(64)
    native.run([RowInput(ids, torch.arange(30), plain)])
    plain.advance(30)
    assert torch.equal(following, native.run([RowInput(torch.tensor([3]), torch.tensor([30]), plain)]).logits)


@pytest.mark.parametrize("config", tiny.CONFIGS)
def test_smaller_caches_are_near_the_exact_one(config):
    stack = tiny.model(tiny.CONFIGS[config])
    ids = checkpoints.ids(1, 40, tiny.VOCAB)[0]
    logits = {}
    for cache in library.KV_TYPES:
        native = tiny.native(stack, cache=cache)
        pool = native.pool(32_000_000)
        row = pool.open(64)
        assert row.nbytes() == pool.layout.nbytes(row.capacity)
        native.run([RowInput(ids[:39], torch.arange(39), row)])
        row.advance(39)
        logits[cache] = native.run([RowInput(ids[39:], torch.tensor([39]), row)]).logits
    spread = logits["float32"].std()
    assert (logits["bfloat16"] - logits["float32"]).abs().max() < 0.1 * spread
    assert (logits["int8"] - logits["float32"]).abs().max() < 0.2 * spread


def test_hooks_run_on_the_torch_stack_and_the_pass_says_so():
    stack = tiny.model()
    native = tiny.native(stack)
    row = RowInput(torch.tensor([3, 4]), torch.arange(2), hooks=LayerHooks(ffn=lambda i, x, types: torch.zeros_like(x)))
    done = native.run([row])
    assert done.backbone == "torch"
    assert torch.equal(done.logits, stack.run([row]).logits)
    assert native.run([RowInput(torch.tensor([3, 4]), torch.arange(2))]).backbone == "native"
    small = tiny.native(stack, cache="int8")
    with pytest.raises(UnsupportedError, match="float32 cache"):
        small.run([row])
    assert not small.serves([row], Needs())
    alone = type(native)(stack.config, native.weights)
    with pytest.raises(UnsupportedError, match="torch stack"):
        alone.run([row])


def test_the_trace_says_what_ran_a_pass():
    engine = Engine(tiny.native(tiny.model()), cache_bytes=32_000_000)
    events = list(engine.stream(Request((5, 6), SamplingParams(max_tokens=4, ignore_eos=True))))
    assert {event.backbone for event in events if event.kind == "forward"} == {"native"}


@pytest.mark.parametrize("config", tiny.CONFIGS)
@pytest.mark.parametrize("greedy", [True, False])
def test_texts_are_those_of_the_torch_stack_alone_and_batched(config, greedy):
    r = random.Random(2)
    prompts = [tuple(r.randrange(1, tiny.VOCAB) for _ in range(r.randint(1, 30))) for _ in range(24)]
    sampling = SamplingParams(max_tokens=20, temperature=0.0 if greedy else 0.8, top_p=1.0 if greedy else 0.9, seed=7)
    stack = tiny.model(tiny.CONFIGS[config])
    texts = []
    for model, rows in ((stack, 1), (tiny.native(stack), 1), (tiny.native(stack), 8)):
        engine = Engine(model, cache_bytes=32_000_000, rows=rows)
        done = engine.run([(Request(prompt, sampling), PLAIN) for prompt in prompts])
        texts.append([one[0].tokens for one in done])
    assert texts[1] == texts[2]
    assert texts[0] == texts[1]


def test_the_best_of_every_row_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    for vocab in (1, 5, 16, 97, 300):
        logits = torch.from_numpy(rng.integers(-20, 20, (4, vocab)).astype(np.float32))  # many ties
        for k in (1, 3, 8):
            ids, values = tiny.native(tiny.model()).top(logits, k)
            order = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :k]
            assert ids.tolist() == order.tolist()
            assert torch.equal(values, logits.gather(1, ids))


def test_logits_that_are_not_finite_are_told():
    stack = tiny.model()
    stack.layers[1].down.weight.data[3, 4] = float("nan")
    done = tiny.native(stack).run([RowInput(torch.tensor([3]), torch.tensor([0]))])
    assert done.best == [-1]


def test_positions_beyond_the_first_tables_are_served():
    stack = tiny.model()
    native = tiny.native(stack)
    for at in (10, 255, 256, 5000, 12):
        row = RowInput(torch.tensor([3, 4]), torch.tensor([at, at + 1]), logits="all")
        assert close(native.run([row]).logits, stack.run([row]).logits)


def test_bad_passes_are_refused_and_leave_the_stack_usable():
    native = tiny.native(tiny.model())
    good = RowInput(torch.tensor([3]), torch.tensor([0]))
    want = native.run([good]).logits
    for row, error in (
        (RowInput(torch.tensor([tiny.VOCAB]), torch.tensor([0])), HastenError),
        (RowInput(torch.tensor([-1]), torch.tensor([0])), HastenError),
        (RowInput(torch.tensor([3]), torch.tensor([-5])), HastenError),
        (RowInput(torch.tensor([3]), torch.tensor([0]), logits=(1,)), HastenError),
        (RowInput(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)), ConfigError),
        (
            RowInput(torch.zeros(200, dtype=torch.int64), torch.arange(200), native.pool(10_000_000).open(64)),
            MemoryFitError,
        ),
    ):
        with pytest.raises(error):
            native.run([row])
    assert torch.equal(native.run([good]).logits, want)


def test_options_are_checked_before_loading(tmp_path):
    for name, value in (
        ("activations", "int4"),
        ("cache", "int4"),
        ("weights", "int2"),
        ("backbone", "gpu"),
        ("dtype", "float16"),
    ):
        with pytest.raises(ConfigError, match=name):
            load(tmp_path, **{name: value})
    for name, value in (("activations", "int8"), ("cache", "int8"), ("weights", "int4")):
        with pytest.raises(ConfigError, match="native stack"):
            load(tmp_path, backbone="torch", **{name: value})


@pytest.mark.parametrize("weights", ["int8", "int4", "int4-min"])
def test_weights_rounded_when_loaded_are_smaller_and_near(weights, tmp_path):
    reference = checkpoints.build("llama")
    reference.save_pretrained(tmp_path)
    ids = checkpoints.ids(1, 12)[0]
    row = RowInput(ids, torch.arange(12), logits="all")
    exact, rounded = load(tmp_path), load(tmp_path, weights=weights)
    want, got = exact.model.run([row]).logits, rounded.model.run([row]).logits
    assert rounded.bytes < 0.5 * exact.bytes
    error = (got - want).std() / want.std()
    assert 0 < error < {"int8": 0.03, "int4": 0.4, "int4-min": 0.4}[weights]
    with pytest.raises(UnsupportedError, match="packed only"):
        _ = rounded.model.oracle


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("activations", library.ACTIVATIONS)
@pytest.mark.parametrize("weights", ["int8", "int4", "int4-min"])
def test_many_tokens_at_once_are_those_tokens_one_by_one(weights, activations, name, tmp_path):
    """Bit for bit, however a long pass is shared out among threads, and where AMX multiplies what vectors did."""
    checkpoints.build(name).save_pretrained(tmp_path)
    model = load(tmp_path, weights=weights, activations=activations).model
    ids = checkpoints.ids(1, 300)[0]
    needs = Needs(hidden=(1,), final_hidden=True)
    pool = model.pool(32_000_000)

    def read(sizes: list[int]) -> list[torch.Tensor]:
        row, at, out = pool.open(320), 0, []
        for n in sizes:
            done = model.run([RowInput(ids[at : at + n], torch.arange(at, at + n), row, CAUSAL, "all")], needs)
            out.append((done.logits.clone(), done.final_hidden.clone(), done.hidden[1].clone()))
            row.advance(n)
            at += n
        row.release()
        return [torch.cat(parts) for parts in zip(*out, strict=True)]

    before = library.native().hasten_threads()
    alone = read([1] * 300)
    try:
        for threads in (1, 2, 3):
            library.set_threads(threads)
            for sizes in ([300], [2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 140]):
                for got, want in zip(read(sizes), alone, strict=True):
                    assert torch.equal(got, want)
        if library.level() == "amx":
            library.set_level("avx512")
            for got, want in zip(read([20, 280]), alone, strict=True):
                assert torch.equal(got, want)
    finally:
        library.set_threads(before)
        library.set_level("auto")


def test_auto_drafts_with_prompt_lookup_alone_where_passes_are_short(monkeypatch):
    """Beside passes of a few milliseconds the bookkeeping of a counted table takes longer than it saves."""
    monkeypatch.setattr("hasten.models.feature.weights_path", lambda *_: Path("counted.safetensors"))

    def auto(backbone: str) -> tuple[str, ...]:
        return _auto(MethodContext("mini-ar", load("mini-ar", backbone=backbone).model))

    assert auto("native") == ("prompt-lookup",)
    assert auto("torch") == ("prompt-lookup", "token-recycling", "aded", "fspad")
    monkeypatch.setattr("hasten.combine.LARGE", 1)
    assert auto("native") == ("prompt-lookup", "aded")
