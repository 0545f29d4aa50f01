"""Every drafter under a grammar: forced chains come between its own drafts, and the tokens are those of plain decoding."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import tiny
from drafters import Sampled
from test_every_drafter import SLUGS, make

from hasten.engine.contracts import MethodContext
from hasten.engine.engine import PLAIN, Engine, Parts
from hasten.logits.grammar import Config, Grammars
from hasten.types import Grammar, Request, SamplingParams

FORM = r"((key|name): [a-d]{1,3}(, the value is [0-9]{2,4})?; ){1,3}end of it[.!]"
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.9, "top_p": 0.95}}


class Ascii:
    """Token i of the tiny models is the character 31 + i; token 0 ends a text. A few words have tokens of their own."""

    special_ids = frozenset((0,))
    words = {3: "the ", 4: "value", 5: " is ", 6: "key: ", 7: "end of"}  # in place of some marks

    def token_bytes(self, token: int) -> bytes:
        return self.words.get(token, chr(31 + token)).encode() if token else b""

    def continues_text(self) -> bool:
        return False

    def copy(self) -> Ascii:
        return self

    def encode(self, text: str, bos: bool = False) -> list[int]:
        out = []
        while text:
            token = next((i for i, word in self.words.items() if text.startswith(word)), ord(text[0]) - 31)
            out.append(token)
            text = text[len(self.words.get(token, "x")) :]
        return out


def text(tokens: tuple[int, ...]) -> str:
    return b"".join(Ascii().token_bytes(token) for token in tokens).decode()


def rule(engine: Engine) -> Any:
    return Grammars(Config(), MethodContext("tiny", engine.backbone, Ascii())).compile(Grammar.regex(FORM))


def requests(sampling: str, count: int = 40) -> list[Request]:
    r = random.Random(5)
    out = []
    for i in range(count):
        prompt = tuple(r.randrange(1, tiny.VOCAB) for _ in range(r.randint(1, 20)))
        out.append(Request(prompt, SamplingParams(max_tokens=r.choice([1, 2, 9, 80]), seed=i, **SAMPLINGS[sampling])))
    return out


def run(engine: Engine, batch: list[Request], parts: Parts) -> list[Any]:
    return [outs[0] for outs in engine.run([(request, parts) for request in batch])]


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
@pytest.mark.parametrize("slug", SLUGS)
def test_text_is_that_of_plain_decoding_under_the_same_grammar(slug, sampling, tmp_path):
    engine = tiny.engine(rows=5)
    form, batch = rule(engine), requests(sampling)
    parts = Parts(make(slug, engine, tmp_path), rules=(form,), budget=8)
    plain = run(engine, batch, replace(PLAIN, rules=(form,)))
    done = run(engine, batch, parts)
    ended = [text(out.tokens) for out in done if out.finish_reason == "stop"]
    assert len(ended) > 5
    assert all(re.fullmatch(FORM, one) for one in ended)
    if sampling == "greedy" or parts.drafter.draws == "point":
        assert [out.tokens for out in done] == [out.tokens for out in plain]
    alone = [run(engine, [request], parts)[0].tokens for request in batch[:6]]
    if sampling == "greedy" or parts.drafter.draws == "point":
        assert alone == [out.tokens for out in plain[:6]]
    assert sum(out.usage.accepted_tokens for out in plain) > 50, "forced chains were drafted"
    assert engine.scheduler.pool.used_bytes == 0


def test_without_forced_chains_the_text_is_the_same(monkeypatch):
    engine = tiny.engine(rows=5)
    form, batch = rule(engine), requests("sampled")
    fast = run(engine, batch, replace(PLAIN, rules=(form,)))
    monkeypatch.setattr(type(form), "forced", lambda self, state: ())
    slow = run(engine, batch, replace(PLAIN, rules=(form,)))
    assert [out.tokens for out in fast] == [out.tokens for out in slow]
    assert sum(out.usage.forwards for out in fast) < 0.8 * sum(out.usage.forwards for out in slow)
    assert not any(out.usage.drafted_tokens for out in slow)


@pytest.mark.parametrize("law", ["typical", "trust"])
def test_lossy_laws_stay_within_the_grammar(law, tmp_path):
    """Drafts that are hardly judged are still judged by the grammar."""
    engine = tiny.engine(rows=5)
    sampling = "sampled" if law == "typical" else "greedy"
    parts = Parts(make("token-recycling", engine, tmp_path), rules=(rule(engine),), law=law, budget=8)
    done = run(engine, requests(sampling), parts)
    ended = [text(out.tokens) for out in done if out.finish_reason == "stop"]
    assert len(ended) > 5
    assert all(re.fullmatch(FORM, one) for one in ended)


@pytest.mark.parametrize("draws", ["iid", "swor"])
def test_sampled_drafts_are_judged_by_the_law_of_the_grammar(draws):
    """The first token of an answer under rejection: as often each as plain sampling draws it under the same grammar."""
    import torch
    from toys import chi_square

    engine = tiny.engine()
    grammars = Grammars(Config(), MethodContext("tiny", engine.backbone, Ascii()))
    form = grammars.compile(Grammar.regex("[a-h][0-9]"))
    q = torch.ones(tiny.VOCAB)
    q[66:74] = 6.0
    runs, prompt = 1500, (5, 9, 40)
    counts: Any = {}
    batch = [Request(prompt, SamplingParams(max_tokens=2, temperature=1.0, seed=i)) for i in range(runs)]
    drafter = Sampled(lambda _: q / q.sum(), draws, width=3, depth=1, seed=1)
    for out in run(engine, batch, Parts(drafter, rules=(form,), budget=8)):
        counts[out.tokens[0]] = counts.get(out.tokens[0], 0) + 1
    with torch.no_grad():
        logits = engine.backbone(torch.tensor([prompt]))[0, -1]
    law = form.apply(form.open(prompt, 2), logits).softmax(-1)
    chances = {i: float(p) for i, p in enumerate(law) if p > 0}
    from collections import Counter

    assert set(counts) <= set(chances)
    statistic, bound = chi_square(Counter(counts), chances, runs)
    assert statistic < bound
    free, _ = chi_square(Counter(counts), {i: float(p) for i, p in enumerate(logits.softmax(-1))}, runs)
    assert free > bound  # the control: it is not the law without the grammar
