"""Scores and vectors of text read in chunks, against one whole pass."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import tiny
import torch

import hasten
from hasten.engine.contracts import Needs, RowInput
from hasten.engine.limits import LIMITS
from hasten.engine.masks import CAUSAL, FULL
from hasten.errors import ConfigError, ContextLengthError, IncompatibleError
from hasten.scoring import bound, finish, judge, pooled


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of 48 queries instead of hundreds, which a tiny model's window would not hold two of."""
    monkeypatch.setattr("hasten.scoring.LIMITS", dataclasses.replace(LIMITS, prefill_chunk=48))


def counted(work):
    """The result of work in chunks, and how many times it stopped in between."""
    steps = 0
    while True:
        try:
            next(work)
            steps += 1
        except StopIteration as end:
            return end.value, steps


@pytest.mark.parametrize("last", [False, True])
def test_a_vector_read_in_chunks_is_that_of_one_pass(last, chunks):
    model, tokens = tiny.model(), [t % tiny.PLAIN.vocab_size for t in range(3, 131)]
    row = RowInput(torch.tensor(tokens), torch.arange(len(tokens)), visibility=CAUSAL, logits="none")
    states = model.run([row], Needs(final_hidden=True)).final_hidden
    whole = states[-1] if last else states.mean(0)
    found, steps = counted(pooled(model, model.pool(1 << 22), tokens, last=last))
    assert steps == 2
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_a_model_that_sees_both_ways_reads_a_text_whole():
    llm = hasten.load("mini-dlm")
    ids = llm.encode("reverse: abcdef\n")
    row = RowInput(torch.tensor(ids), torch.arange(len(ids)), visibility=FULL, logits="none")
    states = llm.model.run([row], Needs(final_hidden=True)).final_hidden
    assert torch.equal(llm.embed([ids], normalize=False)[0], states.float().sum(0) / len(ids))
    causal = llm.model.run([RowInput(row.tokens, row.positions, logits="none")], Needs(final_hidden=True)).final_hidden
    assert not torch.allclose(states, causal)


def test_the_best_alternatives_are_those_of_the_logits():
    model, tokens = tiny.model(), [5, 9, 2, 7, 30, 11]
    found = finish(judge(model, model.pool(1 << 22), tokens, 1, top=3))
    row = RowInput(torch.tensor(tokens), torch.arange(len(tokens)), logits="all")
    logs = model.run([row]).logits.log_softmax(-1)
    for at, one in enumerate(found):
        assert one.token == tokens[at + 1]
        assert one.logprob == pytest.approx(float(logs[at, one.token]), abs=1e-5)
        values, ids = logs[at].topk(3)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("read", [lambda *given: judge(*given, 1), pooled])
def test_memory_is_given_back_when_a_reading_is_given_up(read, chunks):
    model = tiny.model()
    pool = model.pool(1 << 22)
    work = read(model, pool, [3] * 100)
    next(work)
    assert pool.used_bytes > 0
    work.close()
    assert pool.used_bytes == 0


@pytest.mark.parametrize("tokens", [[], [-1], [10**6]])
def test_ids_outside_the_vocabulary_are_refused(tokens):
    model = tiny.model()
    with pytest.raises(ConfigError, match="tokens"):
        finish(pooled(model, model.pool(1 << 22), tokens))


def test_a_text_longer_than_the_window_is_refused():
    model = tiny.model()
    with pytest.raises(ContextLengthError):
        finish(pooled(model, model.pool(1 << 22), [1] * (model.capabilities.max_len + 1)))


def test_the_bound_is_the_mean_over_masks():
    """Against the expectation over every mask of three answer tokens, written out."""
    llm = hasten.load("mini-dlm")
    prompt, answer, mask = llm.encode("copy: abc\n"), llm.tokenizer.encode("abd", bos=False), llm.model.capabilities.mask_id
    exact = 0.0
    for count in (1, 2, 3):
        masks = list(combinations(range(3), count))
        for hidden in masks:
            tokens = torch.tensor([*prompt, *(mask if i in hidden else t for i, t in enumerate(answer))])
            row = RowInput(tokens, torch.arange(len(tokens)), visibility=FULL, logits="all")
            logits = llm.model.run([row]).logits
            logits[:, mask] = -torch.inf
            logs = logits.log_softmax(-1)
            value = sum(float(logs[len(prompt) + i - llm.model.capabilities.logit_shift, answer[i]]) for i in hidden)
            exact += value * 3 / count / len(masks) / 3
    found = finish(bound(llm.model, prompt, answer, samples=600, seed=1))
    assert found == pytest.approx(exact, rel=0.1)
    assert found == finish(bound(llm.model, prompt, answer, samples=600, seed=1))


def test_one_masked_token_has_an_exact_likelihood():
    llm = hasten.load("mini-dlm")
    prompt, answer = llm.encode("reverse: ab\nb"), llm.tokenizer.encode("a", bos=False)
    one = finish(bound(llm.model, prompt, answer, samples=1))
    assert one == pytest.approx(finish(bound(llm.model, prompt, answer, samples=7, seed=3)), abs=1e-6)


def test_a_causal_model_has_no_bound():
    with pytest.raises(IncompatibleError, match="mask token"):
        finish(bound(tiny.model(), [1], [2]))
