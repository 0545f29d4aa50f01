"""A model whose answers are known in advance: how right and how sure it is at a position follows from what stands before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from canvases import EOS, MASK, Masked
from torch import Tensor

from hasten.engine.contracts import Pass, RowInput

VOCAB = 97


def answer(prompt: Sequence[int], canvas: int) -> list[int]:
    """What the model writes after a prompt [a, ..., length of the answer]: end tokens behind it."""
    a, length = prompt[0], min(prompt[-1], canvas)
    return [10 + (a * 7 + j * 3) % 60 for j in range(length)] + [EOS] * (canvas - length)


class Scripted(Masked):
    """Right where one of the two positions before is known. It is surer at even positions, whether it is right or not."""

    def logits(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Logits float32 [L, vocab] of a canvas; the length of its prompt stands in token 1."""
        ids = torch.as_tensor(tokens)
        n, place = int(ids[1]), torch.arange(len(ids))
        text = torch.tensor([*ids[:n].tolist(), *answer(ids[:n].tolist(), len(ids) - n)])
        masked = (ids == MASK).long()
        unknown = torch.nn.functional.pad(masked, (1, 0))[:-1] + torch.nn.functional.pad(masked, (2, 0))[:-2]
        best = torch.where((text != EOS) & (unknown == 2), 80, text)
        sure = torch.tensor([[0.93, 0.85, 0.78], [0.8, 0.7, 0.6]])[place % 2, unknown] + place / 1e4
        sure = torch.where(text == EOS, 0.97, sure)[:, None]
        out = ((1 - sure) / (VOCAB - 2)).repeat(1, VOCAB)
        out[:, MASK] = 1e-30
        return out.scatter(1, best[:, None], sure).log()

    def run(self, rows: Sequence[RowInput], needs: object = None) -> Pass:
        """One pass over whole canvases."""
        logits = [self.logits(row.tokens)[list(row.wanted())] for row in rows]
        ends = list(itertools.accumulate(map(len, logits)))
        spans = list(itertools.accumulate(row.queries for row in rows))
        return Pass(torch.cat(logits), (0, *ends[:-1]), tuple(zip((0, *spans[:-1]), spans, strict=True)))


def tasks(count: int, longest: int = 14) -> list[list[int]]:
    """Prompts [a, own length, filler, length of the answer]."""
    generator = torch.Generator().manual_seed(count)
    numbers = torch.randint(1, 60, (count,), generator=generator).tolist()
    lengths = torch.randint(4, longest + 1, (count,), generator=generator).tolist()
    return [[a, 4, 9, length] for a, length in zip(numbers, lengths, strict=True)]
