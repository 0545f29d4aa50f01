"""Losses of alignment: gradients against those written out, sampling without bias, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import ConfigError, HastenError
from hasten.train.losses import LOSSES, Objective, acceptance


def pair(rows: int = 5, vocab: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(p float64 [rows, vocab], draft logits float64 of the same shape, asking for gradients)."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 1.5).softmax(-1)
    return p, (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 1.5).requires_grad_()


def gradient(objective: Objective, p, logits, generator=None) -> torch.Tensor:
    return torch.autograd.grad(objective(p, logits, None, generator), logits)[0]


def written_out(p, logits) -> torch.Tensor:
    """d(1 - mean sum_x min(p, q)) / d logits: with r = 1[p > q] it is -q_j (r_j - sum_x q_x r_x), by the softmax's rule."""
    q = logits.detach().softmax(-1)
    reward = (p > q).double()
    return -q * (reward - (q * reward).sum(-1, keepdim=True)) / len(p)


def test_the_gradient_of_tvd_is_the_analytic_one():
    p, logits = pair()
    assert torch.allclose(gradient(Objective("tvd"), p, logits), written_out(p, logits), atol=1e-12)
    numeric = torch.zeros_like(logits)
    with torch.no_grad():
        value = float(Objective("tvd")(p, logits))
        assert value == pytest.approx(1 - float(acceptance(p, logits)))
        assert value == pytest.approx(float((p - logits.softmax(-1)).abs().sum(-1).mean()) / 2)
        for i in range(logits.numel()):
            step = torch.zeros(logits.numel(), dtype=torch.float64)
            step[i] = 1e-6
            up, down = (acceptance(p, logits + sign * step.view_as(logits)) for sign in (1, -1))
            numeric.view(-1)[i] = -(up - down) / 2e-6
    assert torch.allclose(written_out(p, logits), numeric, atol=1e-6)


def test_over_the_whole_vocabulary_tvdpp_is_tvd_over_the_deviation_of_the_reward():
    p, logits = pair()
    reward = (p > logits.detach().softmax(-1)).double()
    expected = written_out(p, logits) / reward.std(correction=0)
    assert torch.allclose(gradient(Objective(), p, logits), expected, atol=1e-6)
    assert torch.allclose(gradient(Objective(baseline=False), p, logits), expected, atol=1e-6)
    by_row = written_out(p, logits) / reward.std(-1, correction=0, keepdim=True)
    assert torch.allclose(gradient(Objective(stats="position"), p, logits), by_row, atol=1e-6)
    assert not torch.allclose(by_row, expected, atol=1e-3)


def test_sampled_gradients_have_the_mean_of_the_full_ones_and_the_baseline_steadies_them():
    p, logits = pair(rows=3, vocab=6, seed=4)
    full = gradient(Objective(), p, logits)
    spread = {}
    for baseline in (True, False):
        objective = Objective(expectation="sampled", samples=4, baseline=baseline)
        generator = torch.Generator().manual_seed(1)
        drawn = torch.stack([gradient(objective, p, logits, generator) for _ in range(1000)])
        error = drawn.std(0) / len(drawn) ** 0.5
        assert bool(((drawn.mean(0) - full).abs() < 4 * error + 1e-9).all())
        spread[baseline] = float(drawn.var(0).sum())
    assert spread[True] < 0.8 * spread[False]


@pytest.mark.parametrize("expectation", ["full", "sampled"])
@pytest.mark.parametrize("stats", ["batch", "position"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_a_perfect_drafter_leaves_everything_finite(name, stats, expectation):
    _, logits = pair()
    p = logits.detach().log_softmax(-1).exp()  # bit for bit what the loss makes of the logits
    objective = Objective(name, expectation, stats)
    assert bool(torch.isfinite(objective(p, logits)))
    assert float(gradient(objective, p, logits).abs().max()) < 1e-12
    assert float(acceptance(p, logits.detach())) == pytest.approx(1.0)
    rounded = logits.detach().softmax(-1)  # p > q by rounding in places: a reward of noise, but nothing that overflows
    assert bool(torch.isfinite(gradient(objective, rounded, logits)).all())


def test_kld_and_mixtures_written_out():
    p, logits = pair()
    q = logits.detach().softmax(-1)
    assert float(Objective("kld")(p, logits.detach())) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    mixed = gradient(Objective(kld=0.3), p, logits)
    parts = 0.3 * gradient(Objective("kld"), p, logits) + 0.7 * gradient(Objective(), p, logits)
    assert torch.allclose(mixed, parts, atol=1e-12)
    sparse = torch.nn.functional.one_hot(torch.arange(5), 11).double()
    assert bool(torch.isfinite(gradient(Objective("kld"), sparse, logits)).all())


def test_a_reduced_vocabulary_gives_the_value_and_gradient_of_the_whole():
    p, logits = pair()
    kept = torch.tensor([0, 2, 3, 7])
    near = logits.detach()[:, kept].requires_grad_()
    whole = torch.full_like(logits, -torch.inf).index_copy(1, kept, near)
    q = whole.softmax(-1)
    distance = (p - q).abs().sum(-1).mean() / 2
    reduced = Objective("tvd")(p[:, kept], near)
    assert float(reduced.detach()) == pytest.approx(float(distance.detach()))
    got, want = torch.autograd.grad(reduced, near)[0], torch.autograd.grad(distance, near)[0]
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("name", list(LOSSES))
def test_masked_positions_enter_neither_loss_nor_statistics(name):
    p, logits = pair(rows=6)
    mask = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    spoilt = p.clone()
    spoilt[~mask] = torch.nan
    assert torch.equal(Objective(name)(spoilt, logits, mask), Objective(name)(p[mask], logits[mask]))
    assert torch.equal(acceptance(spoilt, logits, mask), acceptance(p[mask], logits[mask]))


def test_wrong_input_is_refused():
    p, logits = pair()
    with pytest.raises(ConfigError, match=r"shape \(5, 10\)"):
        Objective()(p[:, :10], logits)
    with pytest.raises(ConfigError, match="mask"):
        Objective()(p, logits, torch.zeros(5))
    spoilt = p.clone()
    spoilt[1, 1] = torch.nan
    with pytest.raises(HastenError, match="not finite"):
        Objective()(spoilt, logits)
    for knobs in ({"name": "lk"}, {"expectation": "none"}, {"stats": "row"}, {"samples": 0}, {"kld": 1.5}):
        with pytest.raises(ConfigError, match=f"loss.{next(iter(knobs))}"):
            Objective(**knobs)
