"""Masks on a law that can be enumerated: every form of their bound is a sum over all states, and one number.

Times are integrated by a rule that is exact for polynomials; under the linear schedule four nodes are the integral itself.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from enumerable import (
    ENTROPY,
    HIDDEN,
    LAW,
    LENGTH,
    MASK,
    NLL,
    ROWS,
    STATES,
    Sighted,
    batch,
    close,
    complementary,
    conditionals,
    guesses,
    mdlm,
    nodes,
    process,
    reader,
)

from hasten.errors import ConfigError
from hasten.train import alphabet, bounds, objectives
from hasten.train.mixture import collate, row
from hasten.train.network import Network, Shape
from hasten.train.noise import Process, one_by_one
from hasten.worlds import Sample

TINY = Shape(hidden=32, layers=2, heads=2, ffn=48)
SAMPLES = [Sample("sort: b a\n", "a b", {}), Sample("copy: cat\n", "cat", {}), Sample("close: ([{\n", "}])", {})]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loud(shape: Shape, seed: int = 0) -> Network:
    net = Network(shape, seed)
    with torch.no_grad():
        net.embed.weight.mul_(30)
    return net


def count_form(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The count form over all subsets of places, by `objectives.loss` itself, one row and subset at a time."""
    net, total = Sighted(table), torch.zeros(len(rows), dtype=torch.float64)
    for hidden in HIDDEN[1:]:
        k = int(hidden.sum())
        for i, ids in enumerate(rows):
            one = batch(ids[None])
            value = objectives.loss(net, one, hidden[None], one.weights, "count")
            total[i] += LENGTH * value / (LENGTH * math.comb(LENGTH, k))
    return total


def blocks(table: torch.Tensor, block: int) -> torch.Tensor:
    """BD3-LM's bound over all subsets of every block, by `objectives.block_means`, all subsets of a row side by side."""
    net, total = Sighted(table, block), torch.zeros(len(LAW), dtype=torch.float64)
    for hidden in HIDDEN:
        k = hidden.view(-1, block).sum(1).tolist()
        if min(k) == 0:
            continue
        chance = math.prod(1 / (block * math.comb(block, n)) for n in k)
        mean, _ = objectives.block_means(net, batch(ROWS["absorbing"]), hidden.expand(81, -1))
        total += chance * block * mean.sum(1)
    return total


# --- the forms of the mask bound ---


@pytest.fixture(scope="module")
def wrong():
    """(a random predictor, its exact mask bound)."""
    table = guesses("absorbing", 1)
    return table, mdlm(process("absorbing"), reader(table))


def test_the_count_form_is_the_form_over_t_exactly(wrong):
    table, bound = wrong
    found = count_form(table, ROWS["absorbing"][::4])
    assert close(found, bound[::4], 1e-12)
    short = replace(process("absorbing"), schedule=process("absorbing", "polynomial", power=2.0).schedule)
    assert not close(mdlm(process("absorbing"), reader(table), weigh=short), bound, 0.5), "2 / t is no weight of 1 - t"


def test_the_count_form_is_the_form_over_t_within_sampling_error(wrong):
    """200,000 draws of each: of one row, so that the spread is that of the states."""
    table, bound = wrong
    which, draws, net = 40, 200_000, Sighted(table.float())
    many = batch(ROWS["absorbing"][which].expand(draws // 4, -1))
    count = torch.cat([objectives.nelbo(net, many, 1, seeded(seed)) for seed in range(4)]).double() * LENGTH
    masked, weights = objectives.mask_linear(batch(ROWS["absorbing"][which].expand(draws, -1)).answer, seeded(9))
    x_0 = ROWS["absorbing"][which].expand(draws, -1)
    x_t = x_0.masked_fill(masked, MASK)
    linear = bounds.mdlm(
        process("absorbing"), table[(x_t * 4 ** torch.arange(3, -1, -1)).sum(1)].log(), x_t, x_0, 1 / weights[:, 0]
    )
    for found in (count, linear):
        error = float(found.std()) / draws**0.5
        assert abs(float(found.mean() - bound[which])) < 4 * error + 2 * objectives.FLOOR * LENGTH
        assert error < 0.05
    assert count.std() < linear.std() / 2


@pytest.mark.parametrize(
    ("name", "settings"), [("cosine", {}), ("cos2", {}), ("polynomial", {"power": 2.5}), ("geometric", {})]
)
def test_the_mask_bound_is_the_same_under_every_schedule(wrong, name, settings):
    table, bound = wrong
    one = process("absorbing", name, **settings)
    assert close(mdlm(one, reader(table), nodes(96)), bound, 1e-6)
    linear = process("absorbing")
    assert not close(mdlm(one, reader(table), nodes(96), weigh=linear), bound, 0.1), "weights of another schedule"


def test_complementary_masks_have_the_same_bound_and_cover_every_token_once(wrong):
    table, bound = wrong
    assert close(complementary(process("absorbing"), reader(table), nodes(LENGTH)), bound, 1e-12)
    assert close(complementary(process("absorbing", "cosine"), reader(table), nodes(64)), bound, 1e-6)
    one, x_0 = process("absorbing"), ROWS["absorbing"]
    x_t = one.draw(x_0, 0.4, seeded())
    other = bounds.complement(one, x_t, x_0)
    assert ((x_t == MASK) ^ (other == MASK)).all()
    assert torch.equal(torch.where(x_t == MASK, other, x_t), x_0)
    given = collate([row(sample, 8) for sample in SAMPLES])
    twice, masked = objectives.paired(given, objectives.mask_linear(given.answer, seeded())[0])
    assert torch.equal(masked[:3].int() + masked[3:].int(), given.answer.int())
    assert torch.equal(twice.ids[3:], given.ids)
    with pytest.raises(ConfigError, match="masked"):
        objectives.paired(given, given.known)


# --- blocks ---


def test_blocks_of_one_token_are_the_left_to_right_loss():
    """The same network read place by place: what stands before, and a mask at the place itself."""
    given = collate([row(sample, 8) for sample in SAMPLES])
    given = replace(given, weights=given.answer.float())
    net = loud(replace(TINY, kind="block", block=1))
    masked = objectives.mask_blocks(given, 1, seeded())
    assert torch.equal(masked, given.answer)
    each = []
    with torch.no_grad():
        for ids, answer in zip(given.ids, given.answer):
            for i in answer.nonzero().flatten().tolist():
                before = torch.cat((ids[:i], torch.tensor([alphabet.MASK])))[None]
                each.append(float(F.cross_entropy(net.logits(net(before))[0, -1], ids[i])))
        assert float(objectives.block_loss(net, given, masked)) == pytest.approx(sum(each) / len(each), abs=1e-5)


class Unmasked(Network):
    """A left-to-right network that, as its diffusion twin, never writes a mask."""

    def logits(self, states):
        scores = super().logits(states)
        scores[..., alphabet.MASK] = -torch.inf
        return scores


def test_blocks_of_one_token_with_a_shift_are_the_loss_of_the_causal_twin():
    given = collate([row(sample, 8) for sample in SAMPLES])
    given = replace(given, weights=given.answer.float())
    net, twin = loud(replace(TINY, kind="block", block=1, shift=True)), Unmasked(replace(TINY, kind="causal"))
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        left_to_right = float(objectives.causal_loss(twin, given))
        assert float(objectives.block_loss(net, given, given.answer)) == pytest.approx(left_to_right, abs=1e-5)
        wide = loud(replace(TINY, kind="block", block=2, shift=True))
        wide.load_state_dict(net.state_dict())
        assert abs(float(objectives.block_loss(wide, given, given.answer)) - left_to_right) > 1e-3


@pytest.mark.parametrize("shift", [False, True])
def test_one_block_of_all_tokens_is_mdlm_on_the_same_masks(shift):
    given = collate([row(SAMPLES[1], 8)] * 4)
    given = replace(given, weights=given.answer.float())
    length = given.ids.shape[1]
    masked = objectives.mask_samples(given.answer, seeded())[0]
    net = full = loud(replace(TINY, kind="block", block=length, shift=shift))
    if shift:  # without one, its queries and keys have norms that a full network has not
        full = Network(replace(TINY, shift=True))
        full.load_state_dict(net.state_dict())
    x_t = given.ids.masked_fill(masked, alphabet.MASK)
    with torch.no_grad():
        value = float(objectives.block_loss(net, given, masked))
        assert value == pytest.approx(float(objectives.loss(full, given, masked, given.weights)), abs=1e-5)
        one = Process("absorbing", alphabet.SIZE, alphabet.MASK)
        rows = bounds.mdlm(one, full.logits(full(x_t)), x_t, given.ids, 0.5) / 2  # 1 / t = 2
        assert value == pytest.approx(float((rows / masked.sum(1)).mean()), abs=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_bound_of_blocks(wrong, block):
    table, bound = wrong
    found = blocks(table, block)
    assert float((LAW * found).sum()) > ENTROPY + 1
    assert close(blocks(conditionals(), block), NLL, 1e-12)
    if block == LENGTH:
        assert close(found, bound, 1e-12)
    if block == 1:
        states = [ROWS["absorbing"].clone() for _ in range(LENGTH)]
        for i, state in enumerate(states):
            state[:, i:] = MASK
        chain = [reader(table)(x)[:, i].gather(1, ROWS["absorbing"][:, i : i + 1])[:, 0] for i, x in enumerate(states)]
        assert close(found, -torch.stack(chain).log().sum(0), 1e-12)
    estimate = bounds.block_nelbo(Sighted(table.float(), block), batch(ROWS["absorbing"].repeat(40, 1)), 6, seeded())
    estimate = estimate.double().view(40, 81)
    error = estimate.std(0) / 40**0.5
    assert ((estimate.mean(0) - found).abs() < 4 * error + 1e-5).all()


def test_the_bound_of_counts_bounds_the_law_of_one_token_per_step(wrong):
    """Row by row: -log of the chance of a row, the mean over all orders of a product, is at most the mean of -log."""
    table, bound = wrong
    states, rows = STATES["absorbing"], ROWS["absorbing"]
    chance = torch.zeros(len(states), 81, dtype=torch.float64)  # that a row comes out of a state
    for state in sorted(states.tolist(), key=lambda one: one.count(MASK)):
        at = sum(token * 4 ** (3 - i) for i, token in enumerate(state))
        open_ = [i for i, token in enumerate(state) if token == MASK]
        if not open_:
            chance[at] = (rows == torch.tensor(state)).all(1).double()
        for i in open_:
            for token in (0, 2, 3):
                chance[at] += table[at, i, token] / len(open_) * chance[at + (token - MASK) * 4 ** (3 - i)]
    own = chance[int(MASK * (64 + 16 + 4 + 1))]
    assert float(own.sum()) == pytest.approx(1)
    assert (bound >= -own.log() - 1e-9).all()
    x = one_by_one(process("absorbing"), reader(table), torch.full((40_000, LENGTH), MASK), seeded())
    found = torch.stack([(x == one_row).all(1).double().mean() for one_row in rows])
    assert float((found - own).abs().sum() / 2) < 0.02
