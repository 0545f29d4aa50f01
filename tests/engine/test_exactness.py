"""The exactness matrix: method x batch x sampling gives the tokens of plain decoding, on several kinds of stacks."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import tiny
import torch
from drafters import Oracle, RandomTree, Stub, small_model

from hasten.draft.prompt_lookup import Config, PromptLookup
from hasten.draft.tvdpp import Tvdpp
from hasten.engine import ar
from hasten.engine.contracts import MethodContext
from hasten.engine.engine import PLAIN, Engine, Parts
from hasten.types import Request, SamplingParams

SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_p": 0.9},
    "shaped": {
        "temperature": 1.3, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.4,
        "frequency_penalty": 0.3, "logit_bias": {3: 2.5},
    },
}  # fmt: skip


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """Ragged prompts of 1 to 40 tokens, half of them repetitive so that lookup matches."""
    r = random.Random(seed)
    out = []
    for i in range(count):
        n = r.randint(1, 40)
        period = r.randint(1, 5) if i % 2 else n
        base = [r.randrange(tiny.VOCAB) for _ in range(period)]
        out.append(tuple((base * n)[:n]))
    return out


def requests(count: int, sampling: dict, seed: int = 0) -> list[Request]:
    return [
        Request(prompt, SamplingParams(max_tokens=24, seed=100 + i, ignore_eos=i % 3 == 0, **sampling))
        for i, prompt in enumerate(prompts(count, seed))
    ]


def reference(engine: Engine, request: Request) -> list[int]:
    """Plain decoding as a loop over the dense oracle: no cache, no engine, only the sampler."""
    from hasten.engine.sampling import Sampler

    p = request.sampling
    sampler = Sampler(p, p.seed or 0, request.prompt, tiny.VOCAB)
    tokens = list(request.prompt)
    with torch.no_grad():
        while len(tokens) - len(request.prompt) < (p.max_tokens or 0):
            token = sampler.choose(engine.backbone(torch.tensor([tokens]))[0, -1], (), len(tokens))
            tokens.append(token)
            sampler.commit(token)
            if token in engine.backbone.capabilities.eos_ids and not p.ignore_eos:
                break
    return tokens[len(request.prompt) :]


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def engine(request: pytest.FixtureRequest) -> Engine:
    return tiny.engine(tiny.CONFIGS[request.param])


def run(engine: Engine, batch: list[Request], parts: Parts) -> list[tuple[int, ...]]:
    return [outs[0].tokens for outs in engine.run([(request, parts) for request in batch])]


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
def test_plain_decoding_equals_a_loop_over_the_dense_stack(engine: Engine, sampling: str) -> None:
    for request in requests(6, SAMPLINGS[sampling]):
        assert list(run(engine, [request], PLAIN)[0]) == reference(engine, request)


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
def test_batching_changes_nothing(engine: Engine, sampling: str) -> None:
    batch = requests(12, SAMPLINGS[sampling])
    alone = [run(engine, [request], PLAIN)[0] for request in batch]
    assert run(engine, batch, PLAIN) == alone
    assert [t for i in range(0, 12, 4) for t in run(engine, batch[i : i + 4], PLAIN)] == alone
    assert len(set(alone)) > 6  # the texts differ, so the comparison means something


@pytest.mark.parametrize(
    ("sampling", "kind"),
    list(itertools.product(SAMPLINGS, ["random", "right", "half", "wide", "lookup", "small", "empty"])),
)
def test_drafts_change_nothing(engine: Engine, sampling: str, kind: str) -> None:
    batch = requests(10, SAMPLINGS[sampling], seed=3)
    plain = run(engine, batch, PLAIN)
    texts = {r.prompt: [*r.prompt, *t] for r, t in zip(batch, plain, strict=True)}
    drafter: Stub | PromptLookup | Tvdpp = {
        "random": lambda: RandomTree(tiny.VOCAB),
        "right": lambda: Oracle(texts, tiny.VOCAB),
        "half": lambda: Oracle(texts, tiny.VOCAB, skill=0.5),
        "wide": lambda: Oracle(texts, tiny.VOCAB, skill=0.8, wide=True),
        "lookup": lambda: PromptLookup(Config(), MethodContext("tiny", engine.backbone)),
        "small": lambda: small_model(engine, 60, nodes=5, sample=False),
        "empty": Stub,
    }[kind]()
    parts = Parts(drafter, budget=9)
    assert run(engine, batch, parts) == plain
    assert [run(engine, [request], parts)[0] for request in batch] == plain
    assert engine.scheduler.pool.used_bytes == 0
    if isinstance(drafter, Stub):
        assert not drafter.live
        assert drafter.opened


def test_an_oracle_reaches_depth_plus_one_and_an_empty_drafter_is_plain_decoding() -> None:
    engine = tiny.engine()
    request = Request((5, 6, 7), SamplingParams(max_tokens=26, ignore_eos=True))
    plain = engine.run([(request, PLAIN)])[0][0]
    oracle = Oracle({request.prompt: [*request.prompt, *plain.tokens]}, tiny.VOCAB)
    fast = engine.run([(request, Parts(oracle, budget=4))])[0][0]
    assert fast.tokens == plain.tokens
    assert plain.usage.forwards == 25
    assert fast.usage.forwards == 5  # 25 tokens after the first, five at a time
    assert fast.usage.tokens_per_forward == 5.0
    assert fast.usage.accepted_tokens == 20
    empty = engine.run([(request, Parts(Stub(), budget=4))])[0][0]
    assert empty.usage.forwards == plain.usage.forwards
    assert empty.usage.computed_tokens == plain.usage.computed_tokens


def test_feedback_reports_what_the_target_saw() -> None:
    engine = tiny.engine()
    request = Request((9, 8, 7, 6), SamplingParams(max_tokens=12, ignore_eos=True))
    plain = engine.run([(request, PLAIN)])[0][0]
    full = [*request.prompt, *plain.tokens]
    drafter = Oracle({request.prompt: full}, tiny.VOCAB, skill=0.6)
    drafter.needs = RandomTree.needs
    engine.run([(request, Parts(drafter, budget=4))])
    with torch.no_grad():
        dense, taps = engine.backbone(torch.tensor([full]), hidden=(1,))
    prompt, *cycles = drafter.heard
    assert (prompt.nodes, prompt.path) == ((), ())
    assert (prompt.tokens, prompt.next) == (request.prompt[:-1], request.prompt[-1])
    torch.testing.assert_close(prompt.hidden[1], taps[1][0, :3], atol=1e-4, rtol=0)
    torch.testing.assert_close(prompt.logits, dense[0, :3], atol=1e-4, rtol=0)
    assert prompt.topk.tolist() == dense[0, :3].topk(3).indices.tolist()
    at = len(request.prompt)  # index into `full` of the token that follows the current root
    for heard in cycles[:-1]:
        assert heard.nodes == tuple(range(len(heard.nodes)))
        assert heard.tokens[0] == full[at - 1]
        assert heard.next == full[at + len(heard.path)]
        assert len(heard.hidden[1]) == len(heard.nodes)
        torch.testing.assert_close(heard.hidden[1][0], taps[1][0, at - 1], atol=1e-4, rtol=0)
        for j, node in enumerate(heard.path):
            torch.testing.assert_close(heard.logits[node + 1], dense[0, at + j], atol=1e-4, rtol=0)
            assert heard.topk[node + 1].tolist() == dense[0, at + j].topk(3).indices.tolist()
        at += len(heard.path) + 1


def test_a_long_prompt_is_reported_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.engine.ar.LIMITS", dataclasses.replace(ar.LIMITS, prefill_chunk=7))
    engine = tiny.engine()
    prompt = tuple(range(1, 21))
    drafter = RandomTree(tiny.VOCAB)
    request = Request(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    other = Request((5,), SamplingParams(max_tokens=4, ignore_eos=True))
    engine.run([(request, Parts(drafter, budget=3)), (other, PLAIN)])
    read = [heard for heard in drafter.heard if not heard.nodes]
    assert [len(heard.tokens) for heard in read] == [7, 7, 5]
    assert sum((heard.tokens for heard in read), ()) == prompt[:-1]
    with torch.no_grad():
        dense = engine.backbone(torch.tensor([prompt]))[0]
    torch.testing.assert_close(torch.cat([heard.logits for heard in read]), dense[:19], atol=1e-4, rtol=0)
