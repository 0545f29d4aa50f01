"""Certainty-forcing: masks, the loss against numbers worked out by hand, decoding by entropy, and a whole tiny run."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import hasten
from hasten.errors import ConfigError, HastenError, IncompatibleError, UnknownNameError
from hasten.models.tokenizer import read_json
from hasten.train import alphabet, assess, certainty, loop
from hasten.train.certainty import Config, calibrate, decode, halves
from hasten.train.mixture import collate, row
from hasten.train.network import Network, Shape
from hasten.train.released import export, read
from hasten.unmask.dparallel import calibrated
from hasten.worlds import WORLDS, Sample

TINY = Shape(hidden=32, layers=2, heads=2, ffn=48)
COPY = {"copy": WORLDS["copy"]}


def rows(canvas: int, count: int = 4):
    return [row(Sample(f"copy: {'ab' * i}\n", "ab" * i, {}), canvas) for i in range(1, count + 1)]


@drawn(seed=st.integers(0, 2**20), block=st.integers(1, 40), canvas=st.integers(9, 40))
@settings(max_examples=60, deadline=None)
def test_the_halves_are_a_partition_of_one_block_of_every_row(seed, block, canvas):
    batch = collate(rows(canvas))
    one, other, behind = halves(batch.answer, block, torch.Generator().manual_seed(seed))
    for i, (_, prompt) in enumerate(rows(canvas)):
        a, b, c = (set(part[i].nonzero()[:, 0].tolist()) for part in (one, other, behind))
        active = sorted(a | b)
        assert not a & b
        assert active
        low = (active[0] - prompt) // block * block + prompt
        high = min(low + block, prompt + canvas)
        assert active == list(range(low, high))  # whole, a short last block too
        assert sorted(c) == list(range(high, prompt + canvas))  # all after it, nothing before it or in the prompt


def test_every_block_is_as_likely_and_half_of_it_is_masked():
    answer = torch.ones(4000, 20, dtype=torch.bool)
    one, other, _ = halves(answer, 8, torch.Generator().manual_seed(0))
    starts = Counter((one | other).float().argmax(1).tolist())
    assert set(starts) == {0, 8, 16}
    assert all(abs(count - 4000 / 3) < 120 for count in starts.values())
    assert float(one.sum() / (one | other).sum()) == pytest.approx(0.5005, abs=0.01)
    with pytest.raises(ConfigError, match="at least one token"):
        halves(torch.zeros(2, 4, dtype=torch.bool), 8, torch.Generator())


def test_the_loss_is_what_one_works_out_by_hand():
    """Three positions over two tokens: sure and right, unsure and right, wrong."""
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    labels = torch.tensor([0, 0, 1])
    cross = -(math.log(0.8) + math.log(0.6) + math.log(0.3)) / 3

    def nats(p: float) -> float:  # temperature a half squares the odds
        q = p * p / (p * p + (1 - p) * (1 - p))
        return -q * math.log(q) - (1 - q) * math.log(1 - q)

    gated = certainty.certainty(probs.log(), labels, 2.0, 0.5)
    assert float(gated) == pytest.approx(cross + 2 * (nats(0.8) + nats(0.6)) / 2, abs=1e-5)
    free = certainty.certainty(probs.log(), labels, 2.0, 0.5, gate=False)
    assert float(free) == pytest.approx(cross + 2 * (nats(0.8) + nats(0.6) + nats(0.7)) / 3, abs=1e-5)
    assert float(certainty.certainty(probs.log(), labels, 0.0, 0.5)) == pytest.approx(cross, abs=1e-6)


def test_where_all_is_wrong_the_loss_is_cross_entropy_alone():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wrong = logits.detach().argmin(-1)
    loss = certainty.certainty(logits, wrong, 2.0, 0.5)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits, wrong, reduction="sum") / 5)
    assert float(certainty.certainty(logits[:0], wrong[:0], 2.0, 0.5).detach()) == 0  # a half may be empty


def test_positions_outside_the_block_give_no_gradient():
    batch, network = collate(rows(12)), Network(TINY)
    seen: list[torch.Tensor] = []
    of, hidden = network.logits, []

    def logits(states):
        states.retain_grad()
        seen.append(states)
        return of(states)

    network.logits = logits
    forward = network.forward
    network.forward = lambda ids, known: hidden.append(ids == alphabet.MASK) or forward(ids, known)
    generator = torch.Generator().manual_seed(3)
    one, other, behind = halves(batch.answer, 8, torch.Generator().manual_seed(3))
    certainty.loss(network, batch, Config(block=8), generator).backward()
    assert [len(states) for states in seen] == [int(one.sum()), int(other.sum())]
    assert torch.equal(hidden[0], one | behind)
    assert torch.equal(hidden[1], other | behind)
    assert all(bool((states.grad != 0).any(1).all()) for states in seen)
    masks = network.embed.weight.grad[alphabet.PAD]  # padding neither reads nor writes
    assert float(masks.abs().max()) < float(network.embed.weight.grad.abs().max())


def test_training_lowers_the_loss_and_goes_on_where_it_was_cut(tmp_path):
    texts, config = rows(16, 6), Config(steps=16, tokens=100, lr=1e-2, block=16, gate=False)
    start = Network(TINY, 1)
    whole, cut = Network(TINY, 1), Network(TINY, 1)
    losses: list[float] = []
    certainty.fit(whole, texts, config, loop.Keep(), lambda step, value: losses.append(value))
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    keep = loop.Keep(tmp_path / "run.checkpoint", 4, "same")

    def stop(step: int, value: float) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certainty.fit(cut, texts, config, keep, stop)
    again = Network(TINY, 2)
    certainty.fit(again, texts, config, keep)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    assert not torch.equal(start.embed.weight, whole.embed.weight)


def test_batches_depend_on_the_step_alone():
    texts = rows(20, 8)
    one, two, other = (certainty.batch(texts, 90, 0, step) for step in (4, 4, 5))
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, other.ids)
    assert int(one.known.sum()) <= 90
    assert len(certainty.batch(texts, 1, 0, 0).ids) == 1


def plain_decode(network: Network, prompt: list[int], canvas: int, tau: float, block: int) -> tuple[list[int], int]:
    """One prompt by the published rule, stopped at the first final end: (ids, forwards)."""
    x, n, forwards = [*prompt, *[alphabet.MASK] * canvas], len(prompt), 0
    for low in range(n, n + canvas, block):
        high = min(low + block, n + canvas)
        while alphabet.MASK in x[low:high]:
            probs = network.logits(network(torch.tensor([x]))[0]).double().softmax(-1)
            forwards += 1
            nats = -(probs * (probs + 1e-12).log()).sum(-1)
            open_ = [i for i in range(low, high) if x[i] == alphabet.MASK]
            first = min(open_, key=lambda i: float(nats[i]))
            for i in open_:
                if i == first or float(nats[i]) <= tau:
                    x[i] = int(probs[i].argmax())
            text = x[n:]
            if alphabet.EOS in text and alphabet.MASK not in text[: text.index(alphabet.EOS)]:
                return text[: text.index(alphabet.EOS)], forwards
    return x[n:], forwards


@torch.no_grad()
def test_decoding_in_a_batch_is_the_published_loop():
    network = Network(TINY, 5)
    network.embed.weight.mul_(12)  # so that entropies differ
    prompts = [[alphabet.BOS, *alphabet.encode(text)] for text in ("copy: ab\n", "sort: c b a\n", "x\n")]
    for tau in (-1.0, 2.0, 4.0, math.inf):
        expected = [plain_decode(network, prompt, 10, tau, 4) for prompt in prompts]
        assert decode(network, prompts, 10, tau, 4) == expected
    assert all(forwards <= 3 for _, forwards in decode(network, prompts, 10, math.inf, 4))


def test_the_threshold_is_the_largest_within_a_point():
    table = {tau: {"accuracy": value, "nfe": 1.0} for tau, value in ((0.1, 91.0), (0.2, 90.2), (0.5, 89.0), (0.8, 89.3))}
    assert calibrate(table, 90.0) == 0.8
    assert calibrate(table, 91.0) == 0.2
    assert calibrate(table, 95.0) == 0.1  # the most accurate where none is near


def small(monkeypatch) -> None:
    """Less of everything, and a world whose verifier accepts any text: what is tested is the recipe."""
    from dataclasses import replace

    monkeypatch.setattr(certainty, "TAUS", (0.1, 3.0))
    monkeypatch.setattr(certainty, "WORLDS", {"copy": replace(WORLDS["copy"], verify=lambda meta, text: 1)})
    monkeypatch.setattr(certainty.cells, "__defaults__", (0, certainty.WORLDS))
    monkeypatch.setattr(certainty, "write", lambda network, prompts, canvas: [[7, 8, 9]] * len(prompts))


def test_the_recipe_writes_a_model_with_its_threshold(tmp_path, monkeypatch):
    small(monkeypatch)
    export(Network(TINY, 1), tmp_path / "base", {"name": "base", "license": "MIT"})
    said: list[str] = []
    config = Config(texts=3, steps=2, tokens=128, held=2, canvases=(32,))
    facts = certainty.distil(
        str(tmp_path / "base"),
        config,
        out=tmp_path / "out",
        work=tmp_path / "work",
        progress=lambda what, done, total: said.append(what),
    )
    assert set(said) == {"writing answers", "measuring", "training"}
    assert facts["name"] == "base-dparallel"
    assert facts["answers"] == {"asked": 3, "right": 3}
    assert calibrated(str(tmp_path / "out")) == facts["dparallel"]["tau"] in (0.1, 3.0)
    assert facts["dparallel"]["one_token_per_step"]["accuracy"] == 100
    llm = hasten.load(tmp_path / "out")  # an ordinary model; its own threshold is used
    assert llm.parts(("dparallel",)).canvas.selectors[0].tau == facts["dparallel"]["tau"]
    out = llm.generate("copy: ab\n", method="dparallel", max_tokens=8, ignore_eos=True)
    assert len(out.tokens) == 8
    card = read_json(tmp_path / "out" / "card.json")
    assert {"summary", "license", "parameters", "started_from"} <= set(card)
    assert read(tmp_path / "out").shape == TINY
    moved = read(tmp_path / "out").embed.weight - read(tmp_path / "base").embed.weight
    assert bool((moved != 0).any())
    stored = json.loads(next((tmp_path / "work").glob("answers-*.json")).read_text())
    assert list(stored) == ["copy 32"]
    monkeypatch.setattr(certainty, "write", None)  # answers are not written twice
    certainty.distil(str(tmp_path / "base"), config, out=tmp_path / "out", work=tmp_path / "work")


def test_only_right_answers_are_learnt_from(monkeypatch):
    given = {("copy", 32): assess.samples(WORLDS["copy"], 32, 3, "train")}
    answers = [alphabet.encode(one.answer) for one in given["copy", 32]]
    answers[1] = alphabet.encode("no")
    monkeypatch.setattr(certainty, "write", lambda network, prompts, canvas: answers)
    kept = certainty.own_answers(Network(TINY), given)
    assert kept == [row(given["copy", 32][i], 32) for i in (0, 2)]


def test_models_that_cannot_be_distilled_are_refused(tmp_path, monkeypatch):
    small(monkeypatch)
    with pytest.raises(UnknownNameError, match="no-such"):
        certainty.distil("no-such", Config())
    export(Network(Shape(kind="causal", hidden=32, layers=1, heads=2, ffn=48)), tmp_path / "ar", {"name": "ar"})
    with pytest.raises(IncompatibleError, match="masked-diffusion"):
        certainty.distil(str(tmp_path / "ar"), Config(), work=tmp_path / "work")
    export(Network(TINY), tmp_path / "dull", {"name": "dull"})
    monkeypatch.setattr(certainty, "write", lambda network, prompts, canvas: [[]] * len(prompts))
    with pytest.raises(HastenError, match="none of its prompts"):
        certainty.distil(str(tmp_path / "dull"), Config(canvases=(32,)), work=tmp_path / "work")


@pytest.mark.parametrize("field", ["texts", "steps", "tokens", "lr", "block", "temperature", "held", "weight"])
def test_bad_settings_are_refused_by_name(field):
    with pytest.raises(ConfigError) as caught:
        Config(**{field: -1})
    assert caught.value.field == f"train.{field}"
