"""Training of feature drafters (EAGLE, FSPAD) on a target's own states: data, loss, and a loop that resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine.contracts import Needs, RowInput
from hasten.errors import out_of_range
from hasten.models.feature import FeatureModel
from hasten.models.heads import MedusaHeads
from hasten.models.transformer import Transformer
from hasten.train import loop
from hasten.train.self_text import Texts


class Trainable(Protocol):
    """What `fit` changes."""

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) of everything that training changes."""
        ...


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the training; `unroll` passes feed the layer's own outputs back, each weighted `decay` of the last."""

    steps: int = 1500
    tokens: int = 2048
    lr: float = 1e-3
    warmup: int = 50
    noise: float = 0.1
    feature_weight: float = 0.3
    unroll: int = 2
    decay: float = 0.8
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "unroll"):
            if getattr(self, name) < 1:
                raise out_of_range(f"train.{name}", getattr(self, name), "at least 1")
        for name in ("lr", "clip", "decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise out_of_range(f"train.{name}", getattr(self, name), "above 0")


def frequent(texts: Texts, count: int, vocab: int) -> Tensor:
    """The `count` most frequent ids int64 of the texts, in ascending order (ties: lower id first)."""
    often = torch.bincount(texts.ids.long(), minlength=vocab)
    best = torch.sort(often, descending=True, stable=True).indices[: min(count, vocab)]
    return best.sort().values


def features(
    target: Transformer, texts: Texts, tokens: int = 2048, fast: bool = False
) -> Iterator[list[tuple[Tensor, Tensor, int]]]:
    """Batches of (ids [T], the target's final states [T, hidden], prompt length), in the order of the texts.

    `fast` computes the states in bfloat16 (for texts that are learnt from; agreement is measured on exact ones).
    """
    batch: list[tuple[Tensor, int]] = []
    for one in texts.each():
        if batch and sum(len(ids) for ids, _ in batch) + len(one[0]) > tokens:
            yield _states(target, batch, fast)
            batch = []
        batch.append(one)
    if batch:
        yield _states(target, batch, fast)


def _states(target: Transformer, batch: list[tuple[Tensor, int]], fast: bool) -> list[tuple[Tensor, Tensor, int]]:
    rows = [RowInput(ids, torch.arange(len(ids)), logits="none") for ids, _ in batch]
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        done = target.run(rows, Needs(final_hidden=True))
    assert done.final_hidden is not None  # noqa: S101 - asked for
    final = done.final_hidden.clone()
    return [(ids, final[a:b], prompt) for (ids, prompt), (a, b) in zip(batch, done.spans, strict=True)]


def pad(batch: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T], states [B, T, hidden], weight [B, T]) where weight 1 marks tokens of answers."""
    longest = max(len(ids) for ids, _, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    states = torch.zeros(len(batch), longest, batch[0][1].shape[1])
    weight = torch.zeros(len(batch), longest)
    for i, (row, state, prompt) in enumerate(batch):
        ids[i, : len(row)], states[i, : len(row)] = row, state.float()
        weight[i, prompt : len(row)] = 1.0
    return ids, states, weight


def loss(
    model: FeatureModel,
    target: Transformer,
    ids: Tensor,
    states: Tensor,
    weight: Tensor,
    config: Config,
    noise: Tensor | None,
) -> tuple[Tensor, list[float]]:
    """(loss, top-1 agreement of every unrolled step) for a batch; see `pad` for the shapes.

    Cross-entropy to the target's distribution over the draft vocabulary, plus the smooth L1 distance of the fed-back
    feature (which for FSPAD has an output of its own, so that neither term touches the other's weights).
    """
    embeds = target.embeddings(ids[:, 1:-1]).to(states.dtype)
    inputs, told = states[:, :-2], weight[:, 2:] > 0  # the head is wide: it reads places of answers only
    wanted, counts = states[:, 1:-1][told], weight[:, 2:][told]
    head = model.head.weight
    assert head is not None  # noqa: S101 - a model in training is not packed
    share, best = _teacher(head, wanted)
    place = told.nonzero()[:, 1]
    total = torch.zeros(())
    agreement: list[float] = []
    count = counts.sum().clamp(min=1)
    fed = inputs if noise is None else inputs + noise[:, : inputs.shape[1]]
    for step in range(config.unroll):
        out = model.dense(fed, embeds)
        fed_back = model.fed_back(out).float()
        logits = F.linear(model.norm(out)[told], head).float()
        distance = F.smooth_l1_loss(fed_back[told], wanted, reduction="none").mean(-1)
        mask = counts * (place >= step)
        term = ((_entropy(share, logits) + config.feature_weight * distance) * mask).sum() / count
        total = total + config.decay**step * term
        agreement.append(float(((logits.argmax(-1) == best) * mask).sum() / count))
        # the next unrolled step reads the feature that this one predicted one place earlier
        fed = torch.cat((inputs[:, :1], fed_back[:, :-1]), 1)
    return total, agreement


@torch.no_grad()
def _teacher(head: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The target's probabilities [N, draft vocab] after its states [N, hidden], and its best of them [N]."""
    share = F.linear(states.to(head.dtype), head).float().softmax(-1)
    return share, share.argmax(-1)


def _entropy(share: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy [N] of logits [N, draft vocab] to the target's probabilities."""
    return -(share * logits.log_softmax(-1)).sum(-1)


def medusa_loss(
    model: MedusaHeads,
    target: Transformer,
    ids: Tensor,
    states: Tensor,
    weight: Tensor,
    config: Config,
    noise: Tensor | None,
) -> tuple[Tensor, list[float]]:
    """As `loss`, for Medusa heads: cross-entropy of head k to the target's distribution k places on, by decay^(k - 1)."""
    head = model.head.weight
    assert head is not None  # noqa: S101 - a model in training is not packed
    final = states if noise is None else states + noise
    guesses = model.states(final.to(head.dtype))
    row, place = (weight[:, 1:] > 0).nonzero(as_tuple=True)  # the places before tokens of answers: what is guessed there
    share, best = _teacher(head, states[row, place])
    counts = weight[row, place + 1]
    total = torch.zeros(())
    agreement: list[float] = []
    for k in range(1, model.count + 1):
        far = place >= k
        logits = F.linear(guesses[row[far], place[far] - k, k - 1], head).float()
        mask = counts[far]
        count = mask.sum().clamp(min=1)
        total = total + config.decay ** (k - 1) * (_entropy(share[far], logits) * mask).sum() / count
        agreement.append(float(((logits.argmax(-1) == best[far]) * mask).sum() / count))
    return total, agreement


def fit(
    model: Trainable,
    target: Transformer,
    data: list[tuple[Tensor, Tensor, int]],
    config: Config,
    *,
    loss: Callable[..., tuple[Tensor, list[float]]] = loss,
    checkpoint: Path | None = None,
    every: int = 100,
    report: Callable[[int, float, list[float]], None] | None = None,
) -> None:
    """Train `model` by `loss` on (ids, states, prompt length) examples; with `checkpoint` it continues where a run was cut.

    A resumed run takes the same steps as one that was never cut. Raises HastenError naming the step when the loss is not
    finite, ConfigError when the checkpoint belongs to other settings.
    """
    lengths = [len(ids) for ids, _, _ in data]
    agreement: list[float] = []

    def value(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batch, size = [], 0
        while size < config.tokens:
            i = int(torch.randint(len(data), (1,), generator=generator))
            batch.append(data[i])
            size += lengths[i]
        ids, states, weight = pad(batch)
        noise = (torch.rand(states.shape, generator=generator) - 0.5) * 2 * config.noise * states.std()
        with torch.autocast("cpu", torch.bfloat16):
            total, agreement[:] = loss(model, target, ids, states, weight, config, noise)
        return total

    loop.run(
        model.trained(),
        loop.Pace(config.steps, config.lr, config.warmup, config.clip),
        value,
        loop.Keep(checkpoint, every, str(asdict(config))),
        None if report is None else lambda step, total: report(step, total, list(agreement)),
    )
