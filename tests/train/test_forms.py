"""The forms of the masked-diffusion loss to train with: each against its formula, and a run with each."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hasten.errors import ConfigError, IncompatibleError, UnknownNameError
from hasten.train import alphabet, minis, pretrain
from hasten.train.mixture import Mixture, collate, row
from hasten.train.network import Network, Shape
from hasten.train.objectives import FORMS, PLAIN, Masking, draw, focal, loss, mask_levels, nelbo, paired
from hasten.train.pretrain import Config, Run
from hasten.worlds import Sample

TINY = Shape(hidden=32, layers=2, heads=2, ffn=48)
SMALL = Mixture(tokens=1100)
GIVEN = collate([row(Sample("copy: cat\n", "cat", {}), 8), row(Sample("sort: b a\n", "a b", {}), 8)])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loud() -> Network:
    net = Network(TINY)
    with torch.no_grad():
        net.embed.weight.mul_(30)
    return net


def token_losses(net: Network, hidden: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of every token [B, T], as the network sees the rows with `hidden` masked."""
    with torch.no_grad():
        logits = net.logits(net(GIVEN.ids.masked_fill(hidden, alphabet.MASK), GIVEN.known))
    return F.cross_entropy(logits.transpose(1, 2), GIVEN.ids, reduction="none")


def test_a_complementary_pair_counts_every_token_once_from_the_row_that_hides_it():
    net = loud()
    half = GIVEN.answer & (torch.arange(GIVEN.ids.shape[1]) % 2 == 0)
    rest = GIVEN.answer & ~half
    twice, masked = paired(GIVEN, half)
    assert torch.equal(masked, torch.cat((half, rest)))
    assert torch.equal(twice.ids, torch.cat((GIVEN.ids, GIVEN.ids)))
    each = torch.where(half, token_losses(net, half), token_losses(net, rest))
    expected = (each * GIVEN.weights).sum() / GIVEN.weights.sum()
    with torch.no_grad():
        found = loss(net, twice, masked, torch.ones(masked.shape), "complementary")
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for seed in range(5):
        _, masked, weights = draw(GIVEN, "complementary", seeded(seed))
        assert torch.equal(masked[:2].int() + masked[2:].int(), GIVEN.answer.int())
        assert (weights == 1).all()
    with pytest.raises(ConfigError, match="masked"):
        paired(GIVEN, GIVEN.known)


def test_mgdm_counts_hard_tokens_and_low_levels_more():
    net, hidden = loud(), GIVEN.answer
    weights = torch.tensor([[14.0], [3.0]]).expand(hidden.shape)
    each = token_losses(net, hidden)
    expected = (0.25 * (1 - (-each).exp()) * each * weights * GIVEN.weights).sum() / GIVEN.weights.sum()
    with torch.no_grad():
        assert float(loss(net, GIVEN, hidden, weights, "mgdm")) == pytest.approx(float(expected), rel=1e-5)
    assert focal(torch.tensor([0.0, 1.0]), 1.0, 0.0).tolist() == [0.0, 1.0]
    assert focal(torch.tensor(2.0), 0.5, 2.0).item() == pytest.approx((1 - math.exp(-2)) ** 2)


def test_levels_of_mgdm_are_twentieths():
    answer = torch.ones(20_000, 40, dtype=torch.bool)
    answer[:, :5] = False
    masked, weights = mask_levels(answer, seeded())
    assert not masked[:, :5].any()
    assert weights[:, 0].unique().tolist() == list(range(1, 21))
    for weight in (1, 8, 20):
        rows = weights[:, 0] == weight
        assert float(masked[rows][:, 5:].float().mean()) == pytest.approx((21 - weight) / 20, abs=0.01)
        assert float(rows.float().mean()) == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "count"])
def test_a_run_learns_with_every_form(form, monkeypatch):
    """Judged by the bound, which is what only the linear form is too."""
    monkeypatch.setattr(pretrain, "batch", lambda *_: GIVEN)
    run = Run(TINY, Config(steps=40, lr=1e-2, warmup=5, bfloat16=False, form=form), SMALL)
    before, values = nelbo(run.network, GIVEN, 8, seeded(1)).mean(), []
    given, masked, weights = draw(GIVEN, form, seeded())
    with torch.no_grad():
        first = float(loss(run.network, given, masked, weights, form))
    run.fit(report=lambda step, value: values.append(value))
    assert values[0] == pytest.approx(first, rel=1e-5)
    assert sum(values[-8:]) < 0.6 * sum(values[:8])
    assert nelbo(run.network, GIVEN, 8, seeded(1)).mean() < 0.6 * before


def test_a_form_is_refused_where_it_does_not_go(tmp_path):
    with pytest.raises(UnknownNameError, match=r"form 'mgm'.*mgdm"):
        Config(steps=1, form="mgm")
    for call in (lambda: draw(GIVEN, "mgm", seeded()), lambda: loss(loud(), GIVEN, GIVEN.answer, GIVEN.weights, "mgm")):
        with pytest.raises(UnknownNameError, match="form 'mgm'"):
            call()
    for kind in ("causal", "block"):
        with pytest.raises(IncompatibleError, match=f"mgdm.*{kind}"):
            Run(replace(TINY, kind=kind), Config(steps=1, form="mgdm"), SMALL)
    with pytest.raises(IncompatibleError, match="masking"):
        Run(TINY, Config(steps=1, form="complementary"), SMALL, Masking())
    assert Run(TINY, Config(steps=1, form="linear"), SMALL).masking == PLAIN
    how = {"tokens": 1100, "counts": {}, "work": tmp_path / "work", "out": tmp_path / "out"}
    with pytest.raises(IncompatibleError, match=r"mgdm.*causal"):
        minis.pretrain("mini-ar", steps=1, form="mgdm", **how)


def test_the_card_of_a_model_names_its_form(monkeypatch, tmp_path):
    monkeypatch.setattr(minis, "MINIS", {"mini-dlm": replace(minis.MINIS["mini-dlm"], shape=TINY, start="")})
    monkeypatch.setattr(pretrain, "batch", lambda *_: GIVEN)
    facts = minis.pretrain(
        "mini-dlm", steps=1, tokens=1100, form="mgdm", counts={}, work=tmp_path / "w", out=tmp_path / "o"
    )
    assert facts["training"]["form"] == "mgdm"
