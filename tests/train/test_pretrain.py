"""Pretraining: the objective against enumeration, states that are learnt from, batches, exact continuation, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
import torch
import torch.nn.functional as F

from hasten.errors import ConfigError, HastenError
from hasten.train import alphabet, assess
from hasten.train.mixture import GROUP, Mixture, batch, canvas_of, collate, draw, row
from hasten.train.network import Network, Shape
from hasten.train.objectives import (
    FLOOR,
    PLAIN,
    Masking,
    block_loss,
    causal_loss,
    loss,
    mask_blocks,
    mask_linear,
    mask_samples,
    nelbo,
    opened,
)
from hasten.train.pretrain import Config, Run, objective
from hasten.worlds import WORLDS, Sample, split_of

TINY = Shape(hidden=32, layers=2, heads=2, ffn=48)
SMALL = Mixture(tokens=1100)
SAMPLES = [Sample("sort: b a\n", "a b", {}), Sample("copy: cat\n", "cat", {}), Sample("close: ([{\n", "}])", {})]


def given(canvas: int = 8, samples=SAMPLES):
    return collate([row(sample, canvas) for sample in samples])


def loud(shape: Shape = TINY, seed: int = 0) -> Network:
    net = Network(shape, seed)
    with torch.no_grad():
        net.embed.weight.mul_(30)
    return net


# --- the objective ---


def toy():
    """A window of four tokens and the cross-entropy of every masked subset of it, enumerated."""
    net, one = loud(), given(4, SAMPLES[:1])
    window = one.answer[0].nonzero().flatten().tolist()
    each = {}
    with torch.no_grad():
        for k in range(1, 5):
            for chosen in combinations(window, k):
                masked = torch.zeros_like(one.answer)
                masked[0, list(chosen)] = True
                logits = net.logits(net(one.ids.masked_fill(masked, alphabet.MASK)))[masked]
                each[chosen] = float(F.cross_entropy(logits, one.ids[masked], reduction="sum"))
    return net, each


def test_count_form_linear_form_and_enumeration_agree():
    net, each = toy()
    size = 4
    count = sum(ce / len(s) / math.comb(size, len(s)) / size for s, ce in each.items())
    # the integral over t of t^(k-1) (1-t)^(A-k), which the linear form takes for a subset of k, is a beta function
    beta = {k: math.factorial(k - 1) * math.factorial(size - k) / math.factorial(size) for k in range(1, size + 1)}
    assert sum(ce * beta[len(s)] for s, ce in each.items()) / size == pytest.approx(count, rel=1e-6)
    many = collate([row(SAMPLES[0], 4)] * 2048)
    generator = torch.Generator().manual_seed(0)
    flat = replace_weights(many)
    with torch.no_grad():
        masked, weights = mask_samples(flat.answer, generator)
        drawn = float(loss(net, flat, masked, weights))
        masked, weights = mask_linear(flat.answer, generator)
        linear = float(loss(net, flat, masked, weights, "linear"))
        estimate = nelbo(net, many, 1, generator)
    spread = float(estimate.std()) / len(estimate) ** 0.5
    assert abs(float(estimate.mean()) - count) < 3 * spread
    assert abs(drawn - count) < 3 * spread
    # the linear form's own spread, from the enumeration: each subset's value ce / t / A; its floor on t is 1e-3
    square = sum(ce**2 * _moment(len(s), size) for s, ce in each.items()) / size**2
    assert abs(linear - count) < 3 * ((square - count**2) / 2048) ** 0.5 + FLOOR * size * 10


def _moment(k: int, size: int, steps: int = 20_000) -> float:
    """The integral over t of t^(k-2) (1-t)^(A-k), from the floor on."""
    t = torch.linspace(FLOOR, 1, steps, dtype=torch.float64)
    return float(torch.trapezoid(t ** (k - 2) * (1 - t) ** (size - k), t))


def replace_weights(one):
    """The same batch with all tokens of the windows counting alike."""
    return replace(one, weights=one.answer.float())


def test_the_first_loss_is_that_of_a_guess():
    net = Network(Shape(hidden=64, layers=2, heads=2, ffn=96))
    one = collate([row(*draw(Random(i), SMALL)) for i in range(6)])
    masked, weights = mask_samples(one.answer, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float(loss(net, one, masked, weights)) == pytest.approx(math.log(alphabet.SIZE - 1), abs=0.1)
        causal = Network(Shape(kind="causal", hidden=64, layers=2, heads=2, ffn=96))
        assert float(causal_loss(causal, one)) == pytest.approx(
            math.log(alphabet.SIZE), abs=0.4
        )  # a tied head starts by repeating


def test_late_end_tokens_count_less_and_forms_differ_only_in_weights():
    one = given(8)
    assert one.weights[0][one.answer[0]].tolist() == pytest.approx([1, 1, 1, 1, 0.2, 0.2, 0.2, 0.2])
    net, masked = loud(), one.answer
    with torch.no_grad():
        ones = torch.ones_like(one.weights)
        values = {form: float(loss(net, one, masked, ones, form)) for form in ("count", "uniform", "linear")}
    assert values["count"] == pytest.approx(values["uniform"], rel=1e-5)  # all rows alike: one mean
    assert values["linear"] == pytest.approx(values["count"] * 4.8 / 8, rel=1e-5)
    with pytest.raises(ConfigError, match="form"):
        loss(net, one, masked, ones, "other")


# --- states ---


def test_counts_are_spread_over_all_noise_levels():
    answer = torch.zeros(40, 30, dtype=torch.bool)
    answer[:, 5:25] = True
    masked, weights = mask_samples(answer, torch.Generator().manual_seed(3))
    counts = sorted(masked.sum(1).tolist())
    assert not masked[~answer].any()
    assert counts == sorted([*range(1, 21), *range(1, 21)])
    assert (weights == 1).all()
    places = (
        torch.stack([mask_samples(answer, torch.Generator().manual_seed(s))[0] for s in range(60)]).float().mean((0, 1))
    )
    assert (places[5:25] - 0.525).abs().max() < 0.05


def test_shaped_states_look_like_a_block_in_progress():
    answer = torch.zeros(64, 50, dtype=torch.bool)
    answer[:, 7:47] = True
    for width in (8, 16):
        masked, weights = mask_samples(answer, torch.Generator().manual_seed(1), Masking(1.0, 0.0, (width,)))
        seen = set()
        for hidden, weight in zip(masked[:, 7:47], weights[:, 7:47], strict=True):
            begin = int(hidden.float().argmax()) // width * width
            seen.add(begin)
            assert not hidden[:begin].any()
            assert hidden[begin : begin + width].any()
            assert hidden[begin + width :].all()
            assert (weight[:begin] == 1).all()
            assert (weight[begin + width :] == 0.25).all()
        assert seen == set(range(0, 40, width))
    masked, _ = mask_samples(answer, torch.Generator().manual_seed(1), Masking(0.0, 1.0))
    starts = masked[:, 7:].float().argmax(1)
    assert len(set(starts.tolist())) > 15


@pytest.mark.parametrize("block", [4, 8])
def test_every_block_of_an_answer_is_noisy(block):
    one = collate([row(*draw(Random(i), SMALL)) for i in range(5)])
    masked = mask_blocks(one, block, torch.Generator().manual_seed(0))
    assert not masked[~one.answer].any()
    for hidden, answer in zip(masked, one.answer, strict=True):
        for begin in range(0, len(answer), block):
            assert bool(hidden[begin : begin + block].any()) == bool(answer[begin : begin + block].any())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_the_doubled_row_is_the_block_causal_state_of_every_block(shift, whole):
    """Losses over both halves at once against one pass per block, as it is written: finished blocks before, nothing after.

    With `whole` blocks masked, and a shift, every first token of a block has to come from the finished block before.
    """
    net = loud(replace(TINY, kind="block", block=4, shift=shift))
    one = replace_weights(given(8, SAMPLES[:1]))
    masked = one.answer if whole else mask_blocks(one, 4, torch.Generator().manual_seed(0))
    assert not whole or masked[0, ::4].sum() >= 2
    length, means = one.ids.shape[1], []
    with torch.no_grad():
        for begin in range(0, length, 4):
            here = torch.zeros_like(masked)
            here[:, begin : begin + 4] = masked[:, begin : begin + 4]
            if here.any():
                state = one.ids.masked_fill(here, alphabet.MASK)[:, : begin + 4]
                logits = net.logits(net(state))[here[:, : begin + 4]]
                means.append(float(F.cross_entropy(logits, one.ids[here])))
        assert float(block_loss(net, one, masked)) == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_left_to_right_loss_is_the_mean_over_the_answer():
    net, one = loud(replace(TINY, kind="causal")), given(8, SAMPLES[:1])
    with torch.no_grad():
        logits = net.logits(net(one.ids))[0, :-1]
        each = F.cross_entropy(logits, one.ids[0, 1:], reduction="none")
        weight = one.weights[0, 1:]
        assert float(causal_loss(net, one)) == pytest.approx(float((each * weight).sum() / weight.sum()), rel=1e-5)


@pytest.mark.parametrize("bad", [{"shaped": 1.1}, {"shaped": 0.6, "prefix": 0.6}, {"blocks": ()}, {"blocks": (0,)}])
def test_a_bad_masking_is_refused(bad):
    with pytest.raises(ConfigError):
        Masking(**bad)


def test_bad_windows_are_refused():
    with pytest.raises(ConfigError, match="answer"):
        row(Sample("copy: a\n", "", {}), 8)
    with pytest.raises(ConfigError, match="canvas has 8"):
        row(Sample("copy: a\n", "x" * 8, {}), 8)
    with pytest.raises(ConfigError, match="answer"):
        mask_samples(torch.zeros(2, 5, dtype=torch.bool), torch.Generator())
    with pytest.raises(ConfigError, match="tokens"):
        Mixture(tokens=100)


# --- data ---


def test_batches_depend_on_seed_and_step_alone():
    first = [batch(SMALL, step, 100) for step in (3, 17)]
    again = [batch(SMALL, step, 100) for step in (17, 3)][::-1]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].ids[:1, :20], batch(replace(SMALL, seed=1), 3, 100).ids[:1, :20])


def test_long_canvases_have_their_share_and_come_late():
    rng, tokens = Random(0), {False: 0, True: 0}
    for _ in range(1500):
        sample, canvas = draw(rng, SMALL)
        assert len(sample.answer) < canvas <= 512
        assert split_of(sample.prompt) == "train"
        tokens[canvas > 64] += len(row(sample, canvas)[0])
    assert 0.12 < tokens[True] / sum(tokens.values()) < 0.35
    assert max(draw(rng, SMALL, 0.0)[1] for _ in range(300)) <= 128
    assert {draw(rng, SMALL, split="test")[0].prompt for _ in range(20)}.isdisjoint(
        draw(rng, SMALL)[0].prompt for _ in range(20)
    )


def test_the_last_part_of_a_run_has_canvases_of_its_own_and_the_rest_is_as_without():
    late = replace(SMALL, late=(0.1, 0.1, 0.0, 0.0, 0.8))
    for step in (0, 40, 69 // GROUP * GROUP - 1):
        assert torch.equal(batch(late, step, 100).ids, batch(SMALL, step, 100).ids)

    def longest(mixture: Mixture, progress: float) -> int:
        rng = Random(3)
        return sum(len(draw(rng, mixture, progress)[0].answer) >= 256 for _ in range(400))

    assert longest(late, 0.69) == longest(SMALL, 0.69) < 20
    assert longest(late, 0.7) > 60 < longest(replace(late, turn=0.2), 0.3)
    for wrong in ({"late": (0.0, 0.0, 1.0, 0.0, 0.0)}, {"late": (1.0,)}, {"turn": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(SMALL, **wrong)


def test_canvases_are_the_least_one_or_a_bit_more():
    rng = Random(0)
    tight, plain, roomy = (replace(SMALL, tight=t, roomy=r) for t, r in ((1.0, 0.0), (0.0, 0.0), (0.0, 1.0)))
    assert {canvas_of(20, rng, plain) for _ in range(9)} == {32}
    assert {canvas_of(20, rng, roomy) for _ in range(9)} == {64}
    assert {canvas_of(20, rng, tight) for _ in range(40)} == {24, 32}
    assert all(n < canvas_of(n, rng, one) <= 512 for n in range(1, 512) for one in (tight, plain, roomy))


# --- runs ---


def test_a_cut_run_goes_on_as_if_it_had_not_been(tmp_path):
    config = Config(steps=6, lr=3e-3, warmup=2, every=2)
    values: dict[str, list[float]] = {"whole": [], "cut": []}
    whole = Run(TINY, config, SMALL)
    whole.fit(report=lambda step, value: values["whole"].append(value))
    path = tmp_path / "run.checkpoint"
    for until in (2, 4, 6):
        run = Run(TINY, config, SMALL)
        run.fit(path, lambda step, value: values["cut"].append(value), until)
    assert values["cut"] == pytest.approx(values["whole"], abs=1e-6)
    for name, weight in whole.averaged.state_dict().items():
        assert torch.allclose(weight, run.averaged.state_dict()[name], atol=1e-6)
    assert (run.step, run.seen, run.answered) == (whole.step, whole.seen, whole.answered)
    done = Run(TINY, config, SMALL)
    done.fit(path, lambda step, value: pytest.fail("a finished run has nothing to do"))
    with pytest.raises(ConfigError, match="remove it"):
        Run(TINY, replace(config, lr=1e-3), SMALL).fit(path)


def test_a_warm_start_keeps_the_sizes_of_queries_and_keys():
    """One head, so that the norm takes nothing but each vector's own size: scores stay close to those without norms."""
    shape = replace(TINY, heads=1)
    full, run = loud(shape), Run(replace(shape, kind="block"), Config(steps=5), SMALL)
    with torch.no_grad():
        full.layers[0].q.weight.mul_(20)
        full.layers[1].k.weight.mul_(30)
    run.start_from(full.state_dict())
    for network in (run.network, run.averaged):
        state = network.state_dict()
        assert torch.equal(state["layers.1.gate.weight"], full.layers[1].gate.weight)
        sizes = {name[7:-12]: weight[0].item() for name, weight in state.items() if "q_norm" in name or "k_norm" in name}
        assert sizes["0.q"] > 10 * sizes["0.k"]
        assert sizes["1.k"] > 10 * sizes["1.q"]
    again = Run(replace(shape, kind="block"), Config(steps=5), SMALL)
    again.start_from({**run.network.state_dict(), "layers.0.q_norm.weight": torch.full((32,), 7.0)})
    assert again.network.state_dict()["layers.0.q_norm.weight"][0] == 7


def test_a_loss_that_is_not_finite_ends_the_run_at_the_third_time():
    run = Run(TINY, Config(steps=9), SMALL)
    with torch.no_grad():
        run.network.norm.weight.fill_(float("nan"))
    seen: list[int] = []
    with pytest.raises(HastenError, match="not finite at steps 1 to 3"):
        run.fit(report=lambda step, value: seen.append(step))
    assert seen == [1, 2]
    assert torch.isfinite(run.averaged.norm.weight).all()


@pytest.mark.parametrize(("kind", "shift"), [("full", False), ("causal", False), ("block", False), ("block", True)])
def test_every_kind_learns(kind, shift):
    net, one = Network(replace(TINY, kind=kind, shift=shift)), given(8)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    values = []
    for step in range(70):
        value = objective(net, one, torch.Generator().manual_seed(step), Masking())
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert sum(values[-5:]) / 5 < 0.25 * values[0]


@pytest.mark.slow
def test_a_small_network_learns_64_samples_by_heart():
    one = collate([row(*draw(Random(i), replace(SMALL, tight=0.0, roomy=0.0), 0.0)) for i in range(64)])
    run = Run(Shape(hidden=128, layers=4, heads=4, ffn=352), Config(steps=400, lr=8e-3, warmup=20, bfloat16=False), SMALL)
    from hasten.train import pretrain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "batch", lambda *_: one)
        run.fit()
    masked, weights = mask_samples(one.answer, torch.Generator().manual_seed(9), PLAIN)
    with torch.no_grad():
        assert float(loss(run.network, one, masked, weights)) < 0.02


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 1, "lr": 0.0}])
def test_a_bad_config_is_refused(bad):
    with pytest.raises(ConfigError):
        Config(**bad)


# --- measuring ---


class Oracle(Network):
    """Knows the answers of its samples, surest of the last place of a block: writing must bring all of them out."""

    def __init__(self, kind: str, samples: list[Sample], canvas: int) -> None:
        super().__init__(replace(TINY, kind=kind))
        self.answers = {}
        for sample in samples:
            ids, prompt = row(sample, canvas)
            self.answers[tuple(ids[:prompt])] = ids

    def forward(self, ids, known=None, mask=None, positions=None):
        out = torch.zeros(*ids.shape, alphabet.SIZE)
        for i, line in enumerate(ids.tolist()):
            right = next(full for prompt, full in self.answers.items() if tuple(line[: len(prompt)]) == prompt)
            for place in range(len(line)):
                target = place + (self.shape.kind == "causal")
                out[i, place, right[min(target, len(right) - 1)]] = 5 + 0.01 * place
        return out

    def logits(self, states):
        return states


@pytest.mark.parametrize("kind", ["full", "causal", "block"])
def test_writing_brings_out_what_the_network_knows(kind):
    net = Oracle(kind, SAMPLES, 40)
    prompts = [[alphabet.BOS, *alphabet.encode(sample.prompt)] for sample in SAMPLES]
    written = assess.write(net, prompts, 40, block=8)
    assert [alphabet.decode(ids) for ids in written] == [sample.answer for sample in SAMPLES]


def test_what_is_measured_is_what_the_engine_writes(tmp_path):
    """Surest first in blocks: the exported network in the canvas loop, over cached blocks, against `assess.write`."""
    from canvases import run

    from hasten.models.load import load
    from hasten.train.released import export

    net = loud(replace(TINY, kind="block", shift=True))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(weight.mul(1 if weight.ndim == 1 else 2).half().float())
    export(net, tmp_path, {})
    ours = [[alphabet.BOS, *alphabet.encode(text)] for text in ("sort: b a\n", "abcdefg", "abc", "copy: cat sun w\n")]
    outs = run(load(tmp_path, backbone="torch").model, ours, "reference", max_tokens=20)
    for written, out in zip(assess.write(net, ours, 20), outs, strict=True):
        assert written == list(out.tokens)[: [*out.tokens, alphabet.EOS].index(alphabet.EOS)]
    assert len({out.tokens for out in outs}) > 1


def test_samples_of_a_split_and_tables():
    found = assess.samples(WORLDS["records"], 64, 5, "dev")
    assert len(found) == 5
    assert {split_of(one.prompt) for one in found} == {"dev"}
    assert assess.samples(WORLDS["records"], 32, 5) == []
    net = Network(TINY)
    table = assess.table(net, {32: 1})
    assert table.keys() == WORLDS.keys() - {"records"}
    assert all(row["32"] == {"exact": 0.0, "samples": 1} for row in table.values())
    errors = assess.calibration(net, 8)
    assert list(errors) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert all(0 <= one["ece"] <= 1 and 0 <= one["right"] <= 1 for one in errors.values())


def test_places_behind_a_query_come_into_sight_one_by_one():
    run = Run(replace(TINY, shift=True), Config(steps=40, opening=0.5), SMALL)
    shares = []
    for step in (0, 5, 10, 20, 39):
        run.step = step
        shares.append(run.open)
    assert shares == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert Run(TINY, Config(steps=4), SMALL).open == 1.0
    seen = opened(3, 40, 0.25, torch.Generator().manual_seed(0))
    before = torch.ones(40, 40, dtype=torch.bool).tril()
    assert bool(seen[:, before].all())
    assert float(seen[:, ~before].float().mean()) == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(seen[0], seen[1])
    with pytest.raises(ConfigError, match="opening"):
        Config(steps=4, opening=1.5)


def test_a_loss_that_sees_nothing_behind_is_that_of_a_left_to_right_reader():
    """What stands behind a masked place does not change its loss while the share is 0, and does once it is 1."""
    net, one = loud(), given()
    masked = torch.zeros_like(one.answer)
    first = one.answer.float().argmax(1)
    masked[torch.arange(3), first + 1] = True
    other = replace(one, ids=one.ids.clone())
    other.ids[torch.arange(3), first + 3] = alphabet.encode("q")[0]
    values = []
    for share in (0.0, 1.0):
        seen = opened(*one.ids.shape, share, torch.Generator().manual_seed(0))
        with torch.no_grad():
            values.append([float(loss(net, each, masked, torch.ones(masked.shape), seen=seen)) for each in (one, other)])
    assert values[0][0] == values[0][1]
    assert values[1][0] != values[1][1]
