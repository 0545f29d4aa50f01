"""Training of what fills placeholders (hidden transfer, LUD): a frozen target, its own texts, sampled anchors.

The target runs once over a batch of texts without gradients; placeholders behind sampled positions then run over its keys
and values, with gradients to what fills them only. This dense form is written apart from `models/placeholders.py`, and
tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hasten.engine.contracts import Needs, RowInput
from hasten.engine.masks import CAUSAL, mask
from hasten.errors import out_of_range
from hasten.models.linear import Linear
from hasten.models.placeholders import finish
from hasten.models.pseudo import Guesser
from hasten.models.transformer import Block, Transformer
from hasten.train import features, loop
from hasten.train.self_text import Texts

_TOGETHER = 8  # texts marked by one pass

Item = tuple[Tensor, int, Tensor]  # ids [T], prompt length, anchors that may be sampled


@dataclass(frozen=True, slots=True)
class Config(features.Config):
    """Settings of the training: each step samples `share` of a text's anchors; depth i + 1 weighs `decay` of depth i.

    `outside` is the weight of guesses outside of lexical units, `alpha` the confidence that holds a unit together.
    """

    share: float = 0.25
    outside: float = 1.0
    alpha: float = 0.9

    def __post_init__(self) -> None:
        features.Config.__post_init__(self)
        if not 0 < self.share <= 1:
            raise out_of_range("train.share", self.share, "in (0, 1]")
        if not 0 <= self.outside <= 1:
            raise out_of_range("train.outside", self.outside, "in [0, 1]")
        check_alpha(self.alpha)


def check_alpha(alpha: float) -> None:
    """Raise ConfigError unless `alpha` is a finite number from 0 on."""
    if not 0 <= alpha < float("inf"):
        raise out_of_range("alpha", alpha, "a finite number, 0 or more")


def units(confidence: Tensor, alpha: float, most: int) -> Tensor:
    """Length int64 [T] of the lexical unit that starts at each token: it and those after it while their confidence holds.

    `confidence` [T] is the model's probability of every token given those before it; a unit has at most `most` tokens.
    """
    check_alpha(alpha)
    lengths = torch.ones(len(confidence), dtype=torch.int64)
    sure = confidence >= alpha
    for t in range(len(confidence) - 2, -1, -1):
        if sure[t + 1]:
            lengths[t] = min(most, int(lengths[t + 1]) + 1)
    return lengths


def confidences(target: Transformer, texts: Sequence[Tensor]) -> list[Tensor]:
    """Probability [T] that the target gives every token of each text after those before it; 1 for the first."""
    done = target.run([RowInput(ids, torch.arange(len(ids)), logits="none") for ids in texts], Needs(final_hidden=True))
    assert done.final_hidden is not None  # noqa: S101 - asked for
    out = []
    for ids, (start, end) in zip(texts, done.spans, strict=True):
        shares = target.logits(done.final_hidden[start : end - 1]).log_softmax(-1)
        out.append(torch.cat((torch.ones(1), shares.gather(1, ids[1:, None])[:, 0].exp())))
    return out


def states(
    target: Transformer, guesser: Guesser, texts: Sequence[Tensor], anchors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(final states [T, hidden] of every text, final states [anchors, placeholders, hidden] of the placeholders).

    Gradients reach what fills the placeholders, not the target; texts are int64 [T], anchors int64 [A] positions in them.
    """
    count, sizes = guesser.count, [len(ids) for ids in texts]
    pseudo = guesser.pseudo(count)
    at = [torch.arange(n) for n in sizes]
    ahead = [(a[None, :] + torch.arange(1, count + 1)[:, None]).flatten() for a in anchors]  # step by step
    own = [torch.arange(count).repeat_interleave(len(a)) for a in anchors]
    whose = [torch.arange(len(a)).repeat(count) for a in anchors]
    dtype = target.dtype
    turn = [table.at(torch.cat(at), dtype) for table in target.ropes]
    later = [table.at(torch.cat(ahead), dtype) for table in target.ropes]
    with torch.no_grad():
        h = target.embeddings(torch.cat(list(texts)))
    marks = torch.cat([a + sum(sizes[:i]) for i, a in enumerate(anchors)])
    waiting: list[Tensor | None] = [None] * count
    steps = [torch.cat(own) == s for s in range(count)]
    p = torch.zeros(sum(len(one) for one in ahead), h.shape[1], dtype=dtype)
    for i in range(len(target.layers) + 1):
        for step, place in enumerate(pseudo.layers):
            if place == i:
                waiting[step] = pseudo.enter(step, h[marks]).to(dtype)
                p = p.index_put((steps[step].nonzero()[:, 0],), cast(Tensor, waiting[step]))
        if i == len(target.layers):
            break
        block, entered = cast(Block, target.layers[i]), sum(place <= i for place in pseudo.layers)
        with torch.no_grad():
            q, k, v = block.project(block.attn_norm(h), None if block.rope is None else turn[block.rope])
            mixed, start = [], 0
            for n, positions in zip(sizes, at, strict=True):
                s = slice(start, start + n)
                seen = mask(CAUSAL, positions, positions, 0, block.window)
                mixed.append(block.attend(q[s], k[s].transpose(0, 1), v[s].transpose(0, 1), seen))
                start += n
            h = block.finish(h, cast(Tensor, block.out(torch.cat(mixed))))
        if not entered:
            continue
        normed = block.attn_norm(p)
        added = None if pseudo.adapt is None else pseudo.adapt(i, "qkv", normed)
        pq, pk, pv = block.project(normed, None if block.rope is None else later[block.rope], added)
        mixed, start, first = [], 0, 0
        for n, a, positions, step_of, anchor_of in zip(sizes, anchors, ahead, own, whose, strict=True):
            s, e = slice(start, start + n), slice(first, first + len(positions))
            text = torch.arange(n)[None, :] <= a[anchor_of][:, None]
            beside = (anchor_of[:, None] == anchor_of[None, :]) & (step_of[None, :] <= step_of[:, None])
            allowed = torch.cat((text, beside), 1)
            if block.window is not None:
                keys = torch.cat((torch.arange(n), positions))
                allowed = allowed & ((positions[:, None] - keys[None, :]).abs() < block.window)
            keys, values = torch.cat((k[s], pk[e])).transpose(0, 1), torch.cat((v[s], pv[e])).transpose(0, 1)
            mixed.append(block.attend(pq[e], keys, values, allowed))
            start, first = start + n, first + len(positions)
        out = cast(Tensor, block.out(torch.cat(mixed)))
        if pseudo.adapt is None:
            p = block.finish(p, out)
        else:
            p = finish(block, p, out, lambda x, i=i: pseudo.adapt(i, "ffn", x))  # type: ignore[misc]
    finals = target.norm(p).split([len(one) for one in ahead])
    with torch.no_grad():
        real = target.norm(h).split(sizes)
    return list(real), [one.unflatten(0, (count, -1)).transpose(0, 1) for one in finals]


def loss(
    target: Transformer, guesser: Guesser, batch: Sequence[Item], anchors: Sequence[Tensor], config: Config
) -> tuple[Tensor, list[float]]:
    """(loss, top-1 agreement by depth): cross-entropy of placeholder i to the target's distribution i places on.

    Where a batch holds units (lengths by start, in place of the anchors that may be sampled), guesses past a unit's end
    weigh `config.outside`.
    """
    real, guessed = states(target, guesser, [ids for ids, _, _ in batch], anchors)
    total, weight = torch.zeros(()), torch.zeros(())
    hits, tries = torch.zeros(guesser.count), torch.zeros(guesser.count)
    depth = torch.arange(1, guesser.count + 1)
    for (ids, _, unit), final, mine, a in zip(batch, real, guessed, anchors, strict=True):
        where = a[:, None] + depth  # the real place that a placeholder stands for
        inside = where < len(ids)
        with torch.no_grad():
            teacher = guesser.logits(final[where.clamp(max=len(ids) - 1)].to(guesser.dtype))
            share, best = teacher.softmax(-1), teacher.argmax(-1)
        logits = guesser.logits(mine)
        entropy = -(share * logits.log_softmax(-1)).sum(-1)
        # the unit starts at the token after the anchor, and the first placeholder guesses its second token
        in_unit = depth < unit[(a + 1).clamp(max=len(ids) - 1)][:, None]
        factor = inside * torch.where(in_unit, 1.0, config.outside) * config.decay ** (depth - 1)
        total, weight = total + (entropy * factor).sum(), weight + factor.sum()
        hits += ((logits.argmax(-1) == best) & inside).sum(0)
        tries += inside.sum(0)
    return total / weight.clamp(min=1e-6), (hits / tries.clamp(min=1)).tolist()


class Marked(Sequence[Item]):
    """Texts with the lengths of the unit that starts at each token, marked when first asked for, with their neighbours.

    Where units are not `marked`, they are endless. Texts with next to no answer are left out.
    """

    def __init__(self, texts: Texts, target: Transformer, guesser: Guesser, config: Config, marked: bool) -> None:
        self._texts = [(ids, prompt) for ids, prompt in texts.each() if len(ids) >= prompt + 3]
        self._target, self._most, self._alpha, self._marked = target, guesser.count + 1, config.alpha, marked
        self._done: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._done:
            first = index - index % _TOGETHER  # always the same ones, so that a run that goes on marks alike
            some = self._texts[first : first + _TOGETHER]
            for i, (one, unit) in enumerate(zip(some, self._units([ids for ids, _ in some]), strict=True), first):
                self._done[i] = (*one, unit)
        return self._done[index]

    def _units(self, texts: Sequence[Tensor]) -> list[Tensor]:
        if not self._marked:
            return [torch.full((len(ids),), self._most) for ids in texts]
        with torch.autocast("cpu", torch.bfloat16):
            return [units(sure, self._alpha, self._most) for sure in confidences(self._target, texts)]


def sample(batch: Sequence[Item], config: Config, generator: torch.Generator) -> list[Tensor]:
    """Anchors int64 of every text: the share of its answer's places that is asked for, half of them before units."""
    chosen = []
    for ids, prompt, unit in batch:
        places = torch.arange(max(0, prompt - 1), len(ids) - 2)
        count = max(1, round(config.share * len(places)))
        likely = 1.0 + 2.0 * (unit[places + 1] > 1)
        drawn = torch.multinomial(likely, count, generator=generator)
        chosen.append(places[drawn].sort().values)
    return chosen


@contextmanager
def trainable(target: Transformer) -> Iterator[None]:
    """Within it the target's weights are not packed, so that gradients pass through its operators."""
    packed = [module for module in target.modules() if isinstance(module, Linear) and module.packed is not None]
    for module in packed:
        module.unpack()
    try:
        yield
    finally:
        for module in packed:
            module.pack()


def fit(
    guesser: Guesser,
    target: Transformer,
    data: Sequence[Item],
    config: Config,
    *,
    checkpoint: Path | None = None,
    every: int = 20,
    report: Callable[[int, float, list[float]], None] | None = None,
) -> None:
    """Train what fills the placeholders; with `checkpoint` it continues where a run was cut, by the same steps.

    The target's weights must not be packed. Raises HastenError naming the step when the loss is not finite, ConfigError
    when the checkpoint belongs to other settings.
    """
    found: list[float] = []

    def value(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batch: list[Item] = []
        while sum(len(ids) for ids, _, _ in batch) < config.tokens:
            batch.append(data[int(torch.randint(len(data), (1,), generator=generator))])
        with torch.autocast("cpu", torch.bfloat16):
            total, found[:] = loss(target, guesser, batch, sample(batch, config, generator), config)
        return total

    loop.run(
        guesser.trained(),
        loop.Pace(config.steps, config.lr, config.warmup, config.clip),
        value,
        loop.Keep(checkpoint, every, str(asdict(config))),
        None if report is None else lambda step, total: report(step, total, list(found)),
    )


def agreement(target: Transformer, guesser: Guesser, data: Sequence[Item]) -> list[float]:
    """How often a placeholder's best token is the target's, one value per depth, at every place of the answers."""
    sums, weight = torch.zeros(guesser.count), 0.0
    for ids, prompt, unit in data:
        places = torch.arange(max(0, prompt - 1), len(ids) - guesser.count)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = loss(target, guesser, [(ids, prompt, unit)], [places], Config())[1]
        sums, weight = sums + len(places) * torch.tensor(found), weight + len(places)
    return (sums / max(weight, 1.0)).tolist()
