"""Grammars as rules over logits: what is allowed, states as values, and the same tokens whoever drafts."""

from __future__ import annotations

import json
import random
import re
import threading
from dataclasses import replace
from pathlib import Path

import drafters
import pytest
import torch
import words

import hasten
from hasten.engine.engine import PLAIN, Parts
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, IncompatibleError, RuleError
from hasten.llm import LLM
from hasten.types import Grammar, Request, SamplingParams

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS = {
    "schema": Grammar.json_schema(PERSON),
    "regex": Grammar.regex("(ab|cd){2,5}-[0-9]{1,3}"),
    "lark": Grammar.lark('start: item ("," item)*\nitem: "x" NUMBER\nNUMBER: /[0-9]{1,2}/'),
    "choice": Grammar.choice(["yes", "no", "perhaps not"]),
    "object": Grammar.json_object(),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return words.load(tmp_path_factory.mktemp("model"))


def right(form: str, text: str) -> bool:
    """Whether a text has the form, by other means than ours."""
    if form == "schema":
        return words.valid(PERSON, json.loads(text))
    if form == "regex":
        return re.fullmatch("(ab|cd){2,5}-[0-9]{1,3}", text) is not None
    if form == "lark":
        return re.fullmatch("x[0-9]{1,2}(,x[0-9]{1,2})*", text) is not None
    if form == "choice":
        return text in ("yes", "no", "perhaps not")
    return isinstance(json.loads(text), dict)


@pytest.mark.parametrize("form", FORMS)
def test_every_finished_answer_has_its_form(llm, form):
    found = list(words.answers(llm, FORMS[form], 12, max_tokens=400 if form == "object" else 160))
    assert found, "nothing ended"
    assert [text for text in found if not right(form, text)] == []
    free = llm.generate([[i] for i in range(4)], method="plain", max_tokens=60, temperature=1.5, seed=5)
    assert not any(right(form, out.text) for out in free if form not in ("object", "schema"))  # the model alone has no form


def test_only_end_tokens_follow_a_whole_answer(llm):
    rule = llm.compile(Grammar.regex("ab"))
    state = rule.open((), 10)
    for token in llm.encode("ab"):
        state = rule.advance(state, token)
    logits = rule.apply(state, torch.zeros(llm.model.capabilities.vocab_size))
    assert torch.isfinite(logits).nonzero()[:, 0].tolist() == list(llm.model.capabilities.eos_ids)


def test_special_tokens_are_never_part_of_an_answer(llm):
    rule = llm.compile(Grammar.regex("(.|\\n)*"))
    mask = torch.isfinite(rule.apply(rule.open((), 10), torch.zeros(llm.model.capabilities.vocab_size)))
    special = llm.tokenizer.special_ids - set(llm.model.capabilities.eos_ids)
    assert special
    assert not any(mask[token] for token in special)
    assert int(mask.sum()) > 200


@pytest.mark.parametrize("form", ["schema", "regex", "lark"])
def test_states_are_values_in_any_order(llm, form):
    """A random walk over the tree of states: every state gives the mask that a fresh matcher gives after its tokens."""
    rule = llm.compile(FORMS[form])
    r, vocab = random.Random(3), llm.model.capabilities.vocab_size
    zeros = torch.zeros(vocab)
    nodes = [((), rule.open((), 99))]
    for _ in range(60):
        path, state = r.choice(nodes)
        allowed = torch.isfinite(rule.apply(state, zeros)).nonzero()[:, 0].tolist()
        token = r.choice(allowed)
        nodes.append(((*path, token), rule.advance(state, token)))
    for path, state in r.sample(nodes, len(nodes)):
        fresh = rule.open((), 99)
        for token in path:
            assert rule.allows(fresh, token)
            fresh = rule.advance(fresh, token)
        mask = torch.isfinite(rule.apply(state, zeros))
        assert torch.equal(mask, torch.isfinite(rule.apply(fresh, zeros)))
        for token in r.sample(range(vocab), 12):
            assert rule.allows(state, token) == bool(mask[token])


def test_a_forbidden_token_ends_what_follows_it(llm):
    rule = llm.compile(Grammar.regex("ab"))
    state = rule.advance(rule.open((), 9), llm.encode("z")[0])
    with pytest.raises(RuleError, match="forbids"):
        rule.apply(state, torch.zeros(llm.model.capabilities.vocab_size))
    assert not rule.allows(state, llm.encode("a")[0])


def test_what_must_follow_is_known(llm):
    rule = llm.compile(Grammar.choice(["the quick brown fox", "the lazy dog"]))
    state = rule.open((), 99)
    assert llm.decode(rule.forced(state)).startswith("the")
    one = llm.compile(Grammar.choice(["the quick brown fox"]))
    assert llm.decode(one.forced(one.open((), 99))) == "the quick brown fox"
    out = llm.generate([5], grammar=Grammar.choice(["the quick brown fox"]), method="plain", max_tokens=40)
    assert (out.text, out.finish_reason) == ("the quick brown fox", "stop")
    assert out.usage.forwards < out.usage.completion_tokens - 1  # it was not asked for token by token


def outputs(llm: LLM, form: str, parts: Parts, sampling: SamplingParams, prompts: int = 3) -> list[tuple[int, ...]]:
    rule = llm.compile(FORMS[form])
    own = replace(parts, rules=(rule,))
    requests = [(Request((i + 3, i + 9), sampling), own) for i in range(prompts)]
    return [out.tokens for outs in llm.engine.run(requests) for out in outs]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_drafts_change_no_token(llm, form, temperature):
    """Alone, in a batch, with random trees and with drafts that are right, wrong and in between: the same answers."""
    sampling = SamplingParams(max_tokens=48, temperature=temperature, seed=7)
    plain = outputs(llm, form, PLAIN, sampling)
    alone = [
        llm.engine.run([(Request((i + 3, i + 9), sampling), replace(PLAIN, rules=(llm.compile(FORMS[form]),)))])[0][
            0
        ].tokens
        for i in range(3)
    ]
    assert alone == plain
    vocab = llm.model.capabilities.vocab_size
    texts = {(i + 3, i + 9): (i + 3, i + 9, *tokens) for i, tokens in enumerate(plain)}
    for drafter in (
        drafters.RandomTree(vocab, 4),
        drafters.Oracle(texts, vocab, skill=1.0),
        drafters.Oracle(texts, vocab, skill=0.6, wide=True),
        drafters.Oracle(texts, vocab, skill=0.0),
    ):
        found = outputs(
            llm, form, Parts(drafter=drafter, budget=7, law="greedy" if temperature == 0 else "match"), sampling
        )
        assert found == plain, drafter.name


@pytest.mark.parametrize("method", ["prompt-lookup", "token-recycling", ["prompt-lookup", "token-recycling"]])
def test_methods_by_name_change_no_token(llm, method):
    how = {"max_tokens": 60, "temperature": 0.8, "seed": 2, "grammar": PERSON}
    text = "the quick brown fox jumps over the lazy dog "
    assert llm.generate(text, method=method, **how).tokens == llm.generate(text, method="plain", **how).tokens


def test_an_answer_that_was_valid_anyway_is_unchanged(llm):
    """The mask takes away what is wrong and nothing else."""
    free = llm.generate([[i] for i in range(20, 36)], method="plain", max_tokens=6)
    for i, out in enumerate(free):
        again = llm.generate([20 + i], method="plain", max_tokens=6, grammar=Grammar.regex("(.|\\n){0,400}"))
        clean = [t for t in out.tokens if t in llm.tokenizer.special_ids]
        if not clean and "\ufffd" not in out.text:
            assert again.tokens == out.tokens
    other = llm.generate([20], method="plain", max_tokens=6, grammar=Grammar.regex("[xyz]+"))
    assert other.tokens != free[0].tokens  # the control: a grammar that does not fit changes the text


def test_choices_logprobs_and_stops_go_with_grammars(llm):
    how = {"max_tokens": 40, "temperature": 1.0, "seed": 3, "grammar": FORMS["regex"]}
    many = llm.generate([4, 5], n=4, logprobs=2, **how)
    assert len({out.text for out in many}) > 1
    assert all(right("regex", out.text) for out in many if out.finish_reason == "stop")
    assert all(len(out.logprobs) == len(out.tokens) for out in many)
    cut = llm.generate([4, 5], stop="-", **how)
    assert cut.finish_reason == "stop"
    assert re.fullmatch("(ab|cd){2,5}", cut.text)


def test_equal_grammars_are_compiled_once_and_kept_within_bounds(llm, monkeypatch):
    before = llm.grammars.counts()
    first = llm.compile(Grammar.regex("k{3}"))
    assert llm.compile(Grammar.regex("k{3}")) is first
    after = llm.grammars.counts()
    assert (after.compiled, after.reused) == (before.compiled + 1, before.reused + 1)
    monkeypatch.setattr("hasten.logits.grammar.LIMITS", replace(LIMITS, grammar_cache_bytes=100_000))
    for i in range(30):
        llm.compile(Grammar.regex(f"a{{{i + 1}}}"))
    assert llm.grammars.counts().kept_bytes <= 100_000
    assert llm.compile(Grammar.regex("k{3}")) is not first  # it had to go


def test_many_threads_compile_beside_a_running_engine(llm):
    wrong: list[str] = []

    def work(start: int) -> None:
        for i in range(start, start + 12):
            rule = llm.compile(Grammar.regex(f"t{{{i}}}"))
            if not rule.allows(rule.open((), 9), llm.encode("t")[0]):
                wrong.append(str(i))

    threads = [threading.Thread(target=work, args=(1 + 12 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    out = llm.generate([3], grammar=PERSON, method="plain", max_tokens=60, temperature=1.0, seed=1)
    for thread in threads:
        thread.join()
    assert not wrong
    assert out.tokens == llm.generate([3], grammar=PERSON, method="plain", max_tokens=60, temperature=1.0, seed=1).tokens


@pytest.mark.parametrize(
    ("grammar", "words_"),
    [
        (Grammar.regex("(?=a)b"), "look"),
        (Grammar.regex(r"(a)\1"), "regex"),
        (Grammar.regex("a("), "regex"),
        (Grammar.lark("begin: 'a'"), "start"),
        (Grammar.lark('start: "a'), "closed"),
        (Grammar.json_schema({"type": "strin"}), "type"),
        (Grammar.json_schema({"$ref": "https://host/schema"}), "ref"),
        (Grammar("json_schema", "{"), "JSON"),
        (Grammar("choice", "[]"), "choice"),
        (Grammar("choice", '["a", ""]'), "empty"),
    ],
)
def test_what_cannot_be_enforced_is_refused(llm, grammar, words_):
    with pytest.raises(ConfigError, match=words_) as caught:
        llm.compile(grammar)
    assert caught.value.field == "grammar"
    assert llm.generate([3], grammar=FORMS["choice"], method="plain", max_tokens=20).text in ("yes", "no", "perhaps not")


@pytest.mark.parametrize("kind", ["xml", ""])
def test_kinds_are_checked(kind):
    with pytest.raises(ConfigError, match="kind"):
        Grammar(kind, "x")


def test_wrong_uses_are_refused(llm):
    with pytest.raises(ConfigError, match="grammar"):
        llm.generate([3], grammar="[0-9]+")
    with pytest.raises(IncompatibleError, match="needs a grammar"):
        llm.generate([3], method="grammar")
    with pytest.raises(IncompatibleError, match="left to right"):
        hasten.load("mini-dlm").generate("copy: ab\n", grammar=PERSON)


def test_a_model_without_an_end_cannot_follow_a_grammar(tmp_path: Path):
    from chat_model import write_model

    endless = hasten.load(write_model(tmp_path), backbone="torch", cache_bytes=8_000_000)
    with pytest.raises(IncompatibleError, match="end token"):
        endless.generate([3], grammar=PERSON)
