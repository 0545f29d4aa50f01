"""Losses of masked diffusion in the form of exact counts, and of its twins: left to right and block by block.

A sample is a prompt, never masked, and an answer window of A tokens. The count form draws k uniform in 1..A, masks a random
k-subset S of the window and takes the mean cross-entropy over S: its expectation is the negative evidence lower bound per
answer token, and no weight is above one. The linear form (LLaDA's) masks every token with probability t and divides by t.
The other forms bound nothing: `uniform` has no weights, MGDM's (2410.14157) counts hard tokens and low levels of noise
more, the complementary one (LaViDa, 2505.16839) shows every row twice, so that each token of a window is learnt from once.
Other processes and their bounds are in `bounds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import out_of_range, unknown_name
from hasten.train import alphabet
from hasten.train.mixture import Batch
from hasten.train.network import Network, block_causal

Form = Literal["count", "linear", "uniform", "mgdm", "complementary"]
FORMS: tuple[Form, ...] = get_args(Form)
FLOOR = 1e-3  # the least masking probability of the linear form
LEVELS = 20  # shares of masked tokens that MGDM knows: 1/20, 2/20, ..., 1


@dataclass(frozen=True, slots=True)
class Masking:
    """Which states of a canvas are learnt from.

    `shaped` is the share of samples that look as a block decoder sees them: a block of one of the widths `blocks` in
    progress, clean before it, masked behind it, where a token counts `behind`. `prefix` is the share whose answer is given
    up to a random place.
    """

    shaped: float = 0.2
    prefix: float = 0.1
    blocks: tuple[int, ...] = (8, 16, 32)
    behind: float = 0.25

    def __post_init__(self) -> None:
        for name in ("shaped", "prefix", "behind"):
            if not 0 <= getattr(self, name) <= 1:
                raise out_of_range(name, getattr(self, name), "in [0, 1]")
        if self.shaped + self.prefix > 1:
            raise out_of_range("shaped + prefix", self.shaped + self.prefix, "at most 1")
        if not self.blocks or min(self.blocks) < 1:
            raise out_of_range("blocks", self.blocks, "widths of at least 1")


PLAIN = Masking(shaped=0.0, prefix=0.0)


def mask_samples(answer: Tensor, generator: torch.Generator, masking: Masking = PLAIN) -> tuple[Tensor, Tensor]:
    """(masked, weights), both [B, T]: a subset of every answer window by the count form, and what a token counts.

    The k of a batch are spread evenly over 1..A (k_j = ceil(A frac(u + j / B)), in random order), so that every batch sees
    all noise levels. Raises ConfigError for an empty window.
    """
    rows, length = answer.shape
    sizes = answer.sum(1)
    if bool((sizes < 1).any()):
        raise out_of_range("answer", 0, "a window of at least one token in every row")
    first = answer.float().argmax(1)
    place = torch.arange(length)[None] - first[:, None]  # within the window
    start, stop = torch.zeros_like(sizes), sizes.clone()
    kind = torch.rand(rows, generator=generator)
    inside = torch.rand(rows, generator=generator)
    widths = torch.tensor(masking.blocks)[torch.randint(len(masking.blocks), (rows,), generator=generator)]
    shaped, prefixed = kind < masking.shaped, (kind >= masking.shaped) & (kind < masking.shaped + masking.prefix)
    block = (inside * ((sizes + widths - 1) // widths)).long() * widths
    start = torch.where(shaped, block, torch.where(prefixed, (inside * sizes).long(), start))
    stop = torch.where(shaped, torch.minimum(block + widths, sizes), stop)
    eligible = answer & (place >= start[:, None]) & (place < stop[:, None])
    count = stop - start
    spread = (torch.rand(1, generator=generator) + torch.arange(rows) / rows) % 1
    spread = spread[torch.randperm(rows, generator=generator)]
    k = (count * spread).ceil().long().clamp(min=1)
    noise = torch.rand(rows, length, generator=generator).masked_fill(~eligible, 2.0)
    rank = noise.argsort(1).argsort(1)
    masked = eligible & (rank < k[:, None])
    behind = answer & shaped[:, None] & (place >= stop[:, None])
    return masked | behind, torch.where(behind, masking.behind, 1.0)


def mask_linear(answer: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(masked, weights): every token of a window by one probability t per row, uniform; 1 / t for the masked ones."""
    t = torch.rand(len(answer), 1, generator=generator) * (1 - FLOOR) + FLOOR
    masked = answer & (torch.rand(answer.shape, generator=generator) < t)
    return masked, (1 / t).expand(answer.shape)


def mask_levels(answer: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(masked, weights) of MGDM: a level k uniform in 1..20 per row, every token masked by k / 20; it counts 21 - k."""
    k = torch.randint(1, LEVELS + 1, (len(answer), 1), generator=generator)
    masked = answer & (torch.rand(answer.shape, generator=generator) < k / LEVELS)
    return masked, (LEVELS + 1.0 - k).expand(answer.shape)


def paired(batch: Batch, masked: Tensor) -> tuple[Batch, Tensor]:
    """(the batch twice, what is masked) [2B, T]: first `masked`, then the rest of every window; each token of it once.

    Raises ConfigError for masked tokens outside the windows.
    """
    if bool((masked & ~batch.answer).any()):
        raise out_of_range("masked", int((masked & ~batch.answer).sum()), "0 tokens outside the windows of answers")
    twice = Batch(*(torch.cat((one, one)) for one in (batch.ids, batch.answer, batch.known, batch.weights)))
    return twice, torch.cat((masked, batch.answer & ~masked))


def draw(batch: Batch, form: Form, generator: torch.Generator, masking: Masking = PLAIN) -> tuple[Batch, Tensor, Tensor]:
    """(batch, masked, weights) for `loss` in a form; only the count form has the states of a `masking`.

    Raises UnknownNameError for another form.
    """
    if form == "count":
        return batch, *mask_samples(batch.answer, generator, masking)
    if form == "mgdm":
        return batch, *mask_levels(batch.answer, generator)
    masked, weights = mask_linear(batch.answer, generator)
    if form == "linear":
        return batch, masked, weights
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    if form == "complementary":
        batch, masked = paired(batch, masked)
    return batch, masked, torch.ones(masked.shape)


def focal(each: Tensor, scale: float = 0.25, power: float = 1.0) -> Tensor:
    """Token losses u reweighted as MGDM does, scale (1 - e^-u)^power u: tokens that are known well count little."""
    return scale * (-torch.expm1(-each)) ** power * each


def opened(rows: int, length: int, share: float, generator: torch.Generator) -> Tensor:
    """What queries see [rows, length, length]: all places before them, and `share` of those behind, drawn one by one.

    A left-to-right network becomes a diffusion network while the share grows from 0 to 1 (DiffuLLaMA, arXiv 2410.17891).
    """
    before = torch.ones(length, length, dtype=torch.bool).tril()
    return before | (torch.rand(rows, length, length, generator=generator) < share)


def loss(
    network: Network, batch: Batch, masked: Tensor, weights: Tensor, form: Form = "count", seen: Tensor | None = None
) -> Tensor:
    """The loss of a diffusion network on a batch whose `masked` tokens are hidden from it; `seen` as in `opened`.

    count: mean over the masked of each row, then over rows. linear: weighted sum over the length of the window, then the
    mean over rows. uniform, complementary: mean over all masked tokens of the batch. mgdm: `focal` losses times the
    weights, over the number of masked tokens. Raises UnknownNameError for another form.
    """
    states = network(batch.ids.masked_fill(masked, alphabet.MASK), batch.known, seen)
    return reduce(network, states, batch, masked, weights, form)


def reduce(network: Network, states: Tensor, batch: Batch, masked: Tensor, weights: Tensor, form: Form = "count") -> Tensor:
    """The loss out of states [B, T, hidden] that were computed without sight of the masked tokens."""
    places = masked.nonzero()[:, 0]
    each = F.cross_entropy(network.logits(states[masked]), batch.ids[masked], reduction="none")
    weight = (weights * batch.weights)[masked]
    if form in ("uniform", "complementary"):
        return (each * weight).sum() / weight.sum().clamp(min=1e-9)
    if form == "mgdm":
        return (focal(each) * weight).sum() / batch.weights[masked].sum().clamp(min=1e-9)
    rows = len(batch.ids)
    total = each.new_zeros(rows).index_add(0, places, each * weight)
    if form == "linear":
        return (total / batch.answer.sum(1)).mean()
    if form != "count":
        raise unknown_name("form", form, FORMS)
    return (total / torch.zeros(rows).index_add(0, places, weight).clamp(min=1e-9)).mean()


def causal_loss(network: Network, batch: Batch) -> Tensor:
    """Mean cross-entropy of a left-to-right network over the answers, each token from those before it."""
    target = batch.answer[:, 1:]
    states = network(batch.ids[:, :-1], batch.known[:, :-1])
    each = F.cross_entropy(network.logits(states[target]), batch.ids[:, 1:][target], reduction="none")
    weight = batch.weights[:, 1:][target]
    rows, places = len(batch.ids), target.nonzero()[:, 0]
    total = torch.zeros(rows).index_add(0, places, each * weight)
    return (total / torch.zeros(rows).index_add(0, places, weight)).mean()


def mask_blocks(batch: Batch, block: int, generator: torch.Generator) -> Tensor:
    """Masked tokens [B, T] for `block_loss`: in every block of every row a random subset of its answer, of 1 to all tokens.

    Blocks are counted from position 0 of the row, prompt included, as a block-causal model sees them.
    """
    rows, length = batch.ids.shape
    blocks = -(-length // block)
    room = blocks * block - length
    answer = F.pad(batch.answer, (0, room)).view(rows, blocks, block)
    count = answer.sum(2)
    spread = torch.rand(1, generator=generator) + torch.randperm(rows * blocks, generator=generator) / (rows * blocks)
    k = (count * (spread % 1).view(rows, blocks)).ceil().clamp(min=1)
    noise = torch.rand(answer.shape, generator=generator).masked_fill(~answer, 2.0)
    masked = answer & (noise.argsort(2).argsort(2) < k[..., None])
    return masked.view(rows, -1)[:, :length]


def block_loss(network: Network, batch: Batch, masked: Tensor) -> Tensor:
    """The loss of a block-causal network: the mean over all blocks of the count form in each (BD3-LM, 2503.09573).

    A block of nothing but end tokens counts less.
    """
    mean, most = block_means(network, batch, masked)
    return (mean * most).sum() / most.sum().clamp(min=1e-9)


def block_means(network: Network, batch: Batch, masked: Tensor) -> tuple[Tensor, Tensor]:
    """(mean loss of the masked tokens, weight of the weightiest), [B, blocks]; 0 for a block without masked tokens.

    All blocks at once, the noisy row beside the clean one. A noisy block sees itself and the clean blocks before it; the
    clean half is block-causal. With `shift` the first token of a block is read from the clean half: when a block is
    written, the one before it is finished.
    """
    rows, length = batch.ids.shape
    block = network.shape.block
    of = torch.arange(length) // block
    earlier, own = of[:, None] > of[None, :], of[:, None] == of[None, :]
    noisy = torch.cat((own, earlier), 1)
    clean = torch.cat((torch.zeros_like(own), block_causal(length, block)), 1)
    both = torch.cat((batch.ids.masked_fill(masked, alphabet.MASK), batch.ids), 1)
    known = torch.cat((batch.known, batch.known), 1)
    places = torch.arange(length).repeat(2)
    halves = network(both, known, torch.cat((noisy, clean)), places)
    states = halves[:, :length]
    if network.shape.shift:
        opens = (places[:length] % block == 0) & (places[:length] > 0)
        states = torch.where(opens[:, None], halves[:, length:], states)
    each = F.cross_entropy(network.logits(states[masked]), batch.ids[masked], reduction="none")
    at = masked.nonzero()
    blocks = int(of[-1]) + 1
    cell, weight = at[:, 0] * blocks + of[at[:, 1]], batch.weights[masked]
    total, counted = (one.new_zeros(rows * blocks).index_add(0, cell, one) for one in (each * weight, weight))
    most = torch.zeros(rows * blocks).scatter_reduce(0, cell, weight, "amax")
    return (total / counted.clamp(min=1e-9)).view(rows, blocks), most.view(rows, blocks)


@torch.no_grad()
def nelbo(network: Network, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
    """An estimate [B] of every row's negative evidence lower bound in nats per answer token, from `draws` masks per row."""
    even = Batch(batch.ids, batch.answer, batch.known, batch.answer.float())
    total = torch.zeros(len(batch.ids))
    for _ in range(draws):
        masked, _ = mask_samples(even.answer, generator)
        states = network(even.ids.masked_fill(masked, alphabet.MASK), even.known)
        each = F.cross_entropy(network.logits(states[masked]), even.ids[masked], reduction="none")
        rows = masked.nonzero()[:, 0]
        total += torch.zeros(len(total)).index_add(0, rows, each) / masked.sum(1)
    return total / draws
