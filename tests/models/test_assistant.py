"""The assistant follows rows: its logits are those of a pass over the whole text, whatever was drafted and refused."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import tiny
import torch

from hasten.engine.contracts import RowView
from hasten.errors import IncompatibleError
from hasten.models.assistant import Assistant, check_vocabularies


def dense(model, text) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(text)]))[0, -1]


def view(row: int, tokens: list[int]) -> RowView:
    return RowView(row, tokens, 40, 0.0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_on_random_rows(seed):
    model = tiny.model(seed=2)
    assistant = Assistant(model, tiny.VOCAB)
    r = random.Random(seed)
    texts = {row: [r.randrange(tiny.VOCAB) for _ in range(r.randint(1, 20))] for row in (1, 2, 3)}
    for row in texts:
        assistant.open(row)
    for _ in range(6):
        rows = r.sample(list(texts), r.randint(1, 3))
        for row, logits in zip(rows, assistant.begin([view(row, texts[row]) for row in rows], 3, 12), strict=True):
            assert torch.allclose(logits, dense(model, texts[row]), atol=1e-4)
        paths = {row: [] for row in rows}
        for _ in range(r.randint(0, 3)):
            asks = []
            for row in rows:
                known = len(paths[row])
                new = [(r.randrange(tiny.VOCAB), r.randint(-1, known - 1)) for _ in range(r.randint(1, 4))]
                paths[row] += [(*(paths[row][p] if p >= 0 else ()), token) for token, p in new]
                asks.append((row, [token for token, _ in new], [p for _, p in new]))
            for (row, tokens, _), logits in zip(asks, assistant.grow(asks), strict=True):
                for path, got in zip(paths[row][-len(tokens) :], logits, strict=True):
                    assert torch.allclose(got, dense(model, [*texts[row], *path]), atol=1e-4)
        for row in rows:  # some of a draft is accepted, or none, or the text goes another way
            texts[row] += [*(r.choice(paths[row]) if paths[row] and r.random() < 0.7 else ()), r.randrange(tiny.VOCAB)]
            if r.random() < 0.2:
                texts[row] = [*texts[row][: r.randint(1, len(texts[row]))], 3]
    for row in texts:
        assistant.close(row)
        assistant.close(row)
    assert assistant.pool.used_bytes == 0


def test_rows_without_room_or_window_are_not_followed():
    small = tiny.model(dataclasses.replace(tiny.PLAIN, max_len=24))
    assistant = Assistant(small, tiny.VOCAB, cache_bytes=small.pool(10_000_000).layout.nbytes(64))
    assistant.open(1)
    assistant.open(2)
    assert [one is not None for one in assistant.begin([view(1, [1] * 20), view(2, [1] * 5)], 3, 3)] == [True, False]
    assert assistant.begin([view(1, [1] * 22)], 3, 3) == [None]
    assistant.close(1)
    assert assistant.begin([view(2, [1] * 5)], 3, 3) != [None]


def test_a_vocabulary_may_be_padded_on_either_side():
    model = tiny.model()
    wide, narrow = Assistant(model, tiny.VOCAB + 5), Assistant(model, tiny.VOCAB - 5)
    for one in (wide, narrow):
        one.open(1)
    [logits] = wide.begin([view(1, [1, 2])], 1, 1)
    assert logits.shape == (tiny.VOCAB + 5,)
    assert (logits[-5:].softmax(-1) == 0.2).all() or torch.isinf(logits[-5:]).all()
    [logits] = narrow.begin([view(1, [1, 2])], 1, 1)
    assert logits.shape == (tiny.VOCAB - 5,)


def test_vocabularies_are_compared_token_by_token():
    def spelling(*tokens: str) -> SimpleNamespace:
        return SimpleNamespace(token_strings=lambda: list(tokens))

    check_vocabularies(spelling("a", "b"), spelling("a", "b", "pad"), 2, 3, "m")
    with pytest.raises(IncompatibleError, match=r"'m'.*token 1 is 'x', the target's is 'b'"):
        check_vocabularies(spelling("a", "b"), spelling("a", "x"), 2, 2, "m")
    check_vocabularies(None, None, 7, 7, "m")
    with pytest.raises(IncompatibleError, match="8 tokens and the target 7"):
        check_vocabularies(None, spelling("a"), 7, 8, "m")
