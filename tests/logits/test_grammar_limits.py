"""The bounds of grammars, each at its limit and one beyond; and what happens to a row whose grammar gives up."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import words

from hasten.engine.contracts import MethodContext
from hasten.engine.engine import PLAIN
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, HastenError, IncompatibleError, RuleError
from hasten.llm import LLM
from hasten.logits import _lark, _regex, _schema
from hasten.logits.grammar import Config, Grammars
from hasten.types import Grammar, Request, SamplingParams


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return words.load(tmp_path_factory.mktemp("words"))


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    return schema


def chained(length: int) -> dict:
    links: dict = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def rules(length: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(length)) + f'r{length}: "a"'


def properties(count: int) -> dict:
    return {
        "type": "object",
        "properties": {f"p{i}": {"type": "null"} for i in range(count)},
        "additionalProperties": False,
    }


most = LIMITS
BOUNDS = {
    "grammar_bytes": (
        lambda over: Grammar.json_schema('"' + "x" * (most.grammar_bytes - 2 + over) + '"'),
        "bytes",
    ),
    "grammar_depth": (lambda over: _schema.prepare(json.dumps(nested(most.grammar_depth - 1 + over))), "nested too deeply"),
    "grammar_depth along references": (
        lambda over: _schema.prepare(json.dumps(chained(most.grammar_depth - 2 + over))),
        "nested too deeply",
    ),
    "grammar_depth of rules": (lambda over: _lark.check(rules(most.grammar_depth - 2 + over)), "refer to one another"),
    "grammar_depth of groups": (
        lambda over: _regex.check("(" * (most.grammar_depth // 2 + over) + "a" + ")" * (most.grammar_depth // 2 + over), "regex"),
        "nested too deeply",
    ),
    "grammar_symbols": (
        lambda over: _schema.prepare(json.dumps({"anyOf": [True] * (most.grammar_symbols - 1 + over)})),
        "one schema too many",
    ),
    "grammar_symbols of repetitions": (lambda over: _regex.check(f"a{{{most.grammar_symbols + over}}}", "regex"), "too large"),
    "grammar_symbols of tokens": (
        lambda over: _lark.check('start: "a"' + ' "a"' * (most.grammar_symbols - 3 + over)),
        "symbols",
    ),
    "regex_size": (lambda over: _regex.check("a" * (most.regex_size + over), "regex"), "too large"),
    "enum_values": (lambda over: _schema.prepare(json.dumps({"enum": list(range(most.enum_values - 1 + over))})), "values"),
    "schema_properties": (lambda over: _schema.prepare(json.dumps(properties(most.schema_properties + over))), "properties"),
}  # fmt: skip


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_limit_is_allowed_and_one_more_is_not(bound: str) -> None:
    make, message = BOUNDS[bound]
    make(0)
    with pytest.raises(ConfigError, match=message) as caught:
        make(1)
    assert caught.value.field.startswith("grammar")


@pytest.mark.parametrize(
    "schema",
    [
        nested(LIMITS.grammar_depth - 1), chained(LIMITS.grammar_depth - 2), properties(LIMITS.schema_properties),
        {"enum": list(range(LIMITS.enum_values - 1))},
    ],
    ids=["depth", "references", "properties", "enum"],
)  # fmt: skip
def test_what_is_at_the_limit_compiles(llm: LLM, schema: dict) -> None:
    rule = llm.compile(Grammar.json_schema(schema))
    assert torch.isfinite(rule.apply(rule.open((), 9), torch.zeros(llm.model.capabilities.vocab_size))).any()


def test_what_lies_deep_is_enforced_there_too(llm: LLM) -> None:
    schema = nested(100)
    assert words.accepts(llm, Grammar.json_schema(schema), "[" * 100 + "7" + "]" * 100)
    assert not words.accepts(llm, Grammar.json_schema(schema), "[" * 99 + "7" + "]" * 99)
    assert not words.accepts(llm, Grammar.json_schema(schema), "[" * 100 + "true" + "]" * 100)


def test_choices_are_counted_like_enums(llm: LLM) -> None:
    many = [f"v{i}" for i in range(LIMITS.enum_values)]
    assert words.accepts(llm, Grammar.choice(many), many[-1])
    with pytest.raises(ConfigError, match="at most 10000"):
        llm.compile(Grammar.choice([*many, "one more"]))


def test_whitespace_is_bounded(llm: LLM) -> None:
    form = Grammar.json_schema({"type": "object"})
    for good in ("{}", "{ }", "{" + " " * 8 + "}", "{\n" + " " * 64 + "}", '{"a":\t1 ,"b" : [\r\n]}'):
        assert words.accepts(llm, form, good), good
    for bad in (" {}", "{} ", "{" + " " * 9 + "}", "{\n\n}", "{\n" + " " * 65 + "}", "{  \n }"):
        assert not words.accepts(llm, form, bad), bad


# --- time ---


def test_a_grammar_that_takes_too_long_to_compile_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = dataclasses.replace(LIMITS, compile_s=1e-6)
    monkeypatch.setattr("hasten.logits.grammar.LIMITS", limits)
    with pytest.raises(ConfigError, match="to compile"):
        llm.compile(Grammar.regex("slow{1,7}"))
    monkeypatch.setattr("hasten.logits.grammar.LIMITS", LIMITS)
    assert llm.compile(Grammar.regex("slow{1,7}"))


def run(llm: LLM, parts: list) -> tuple[list, list[str]]:
    """Outputs and errors of one sampled request per entry, all in one batch."""
    sampling = SamplingParams(max_tokens=24, temperature=1.0, seed=3)
    errors: list[str] = []
    events: list = []

    def watch(event) -> None:
        events.append(event)
        if event.kind == "error":
            errors.append(event.text)

    outs = llm.engine.run([(Request((i + 3,), sampling), one) for i, one in enumerate(parts)], watch)
    return [out[0] for out in outs], errors


def test_slow_masks_end_their_request_and_no_other(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = dataclasses.replace(PLAIN, rules=(llm.compile(Grammar.regex("[a-z]{20,40}")),))
    alone, _ = run(llm, [PLAIN, PLAIN])
    good, errors = run(llm, [PLAIN, bound])
    assert not errors
    monkeypatch.setattr("hasten.logits.grammar.LIMITS", dataclasses.replace(LIMITS, mask_s=1e-9))
    outs, errors = run(llm, [PLAIN, bound])
    assert [out.finish_reason for out in outs] == ["length", "error"]
    assert outs[0].tokens == alone[0].tokens == good[0].tokens
    assert len(errors) == 1
    assert "for a token, 4 times" in errors[0]
    assert 0 < len(outs[1].tokens) < len(good[1].tokens)  # three slow masks are forgiven
    with pytest.raises(HastenError, match="for a token"):
        llm.generate([4], grammar=Grammar.regex("[a-z]{20,40}"), max_tokens=24, temperature=1.0)
    assert llm.engine.idle
    assert llm.engine.scheduler.pool.used_bytes == 0


class Broken:
    """A rule that gives up at its third token."""

    name = "broken"

    def open(self, prompt, max_tokens) -> int:
        return 0

    def apply(self, state: int, logits: torch.Tensor) -> torch.Tensor:
        if state == 2:
            raise RuleError("it gave up", field="grammar")
        return logits

    def advance(self, state: int, token: int) -> int:
        return state + 1

    def forced(self, state: int) -> tuple[int, ...]:
        return ()


def test_a_rule_that_gives_up_ends_its_row_alone(llm: LLM) -> None:
    broken = dataclasses.replace(PLAIN, rules=(Broken(),))
    alone, _ = run(llm, [PLAIN, PLAIN, PLAIN])
    outs, errors = run(llm, [PLAIN, broken, PLAIN])
    assert errors == ["it gave up"]
    assert [len(out.tokens) for out in outs] == [24, 2, 24]
    assert (outs[0].tokens, outs[2].tokens) == (alone[0].tokens, alone[2].tokens)
    assert outs[1].tokens == alone[1].tokens[:2]


# --- memory ---


def test_a_long_answer_keeps_little_per_token(llm: LLM) -> None:
    rule = llm.compile(Grammar.regex("[a-z]*"))
    token = llm.encode("a")[0]
    zeros = torch.zeros(llm.model.capabilities.vocab_size)

    def grow(state, tokens: int):
        for _ in range(tokens):
            for other in (token, token + 1, token + 2):  # branches that nobody takes
                rule.apply(rule.advance(state, other), zeros) if other == token else rule.advance(state, other)
            state = rule.advance(state, token)
        return state

    state = grow(rule.open((), 9), 1500)  # by then what is bounded is full
    tracemalloc.start()
    grow(state, 2000)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 2000 * 400


# --- vocabularies ---


class Letters:
    """A tokenizer with twins (two ids for "a"), control tokens, ids without text, and byte pieces."""

    special_ids = frozenset((5, 6, 7))
    texts = (b"a", b"b", b"a", b"ab", b"\xc3", b"<a>", b"<end>", b"<stop>", b"\xa9", b" a")

    def __init__(self, spaced: bool = False) -> None:
        self._spaced = spaced

    def token_bytes(self, token: int) -> bytes:
        return self.texts[token] if token < len(self.texts) else b""

    def continues_text(self) -> bool:
        return self._spaced

    def copy(self) -> Letters:
        return self

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [3] * text.count("ab")  # nonsense for anything else: the longest pieces are taken then


def grammars(spaced: bool = False, ends: tuple[int, ...] = (6, 7), vocab: int = 16, kind: str = "causal") -> Grammars:
    caps = SimpleNamespace(vocab_size=vocab, eos_ids=ends, kind=kind)
    backbone = SimpleNamespace(capabilities=caps)
    return Grammars(Config(), MethodContext("letters", backbone, Letters(spaced)))  # type: ignore[arg-type]


def allowed(rule, *tokens: int) -> set[int]:
    state = rule.open((), 9)
    for token in tokens:
        state = rule.advance(state, token)
    mask = np.isfinite(rule.apply(state, torch.zeros(16)).numpy())
    assert {i for i in range(16) if rule.allows(state, i)} == set(np.flatnonzero(mask).tolist())
    return set(np.flatnonzero(mask).tolist())


def test_twins_specials_and_rows_without_text() -> None:
    rule = grammars().compile(Grammar.regex("a+b?"))
    assert allowed(rule) == {0, 2, 3}  # both ids of "a", and "ab"
    assert allowed(rule, 2) == allowed(rule, 0) == {0, 1, 2, 3, 6, 7}  # both end tokens; never 5, nor 10 and above
    assert allowed(rule, 2, 0, 3) == {6, 7}
    assert allowed(rule, 2, 1, 7) == {6, 7}  # nothing but ends after an end
    anything = grammars().compile(Grammar.regex("(.|\\n)*"))
    assert allowed(anything) == {0, 1, 2, 3, 4, 6, 7, 9}  # 8 alone is no UTF-8
    assert allowed(anything, 4) == {8}  # the rest of the character, and no end before it
    assert allowed(grammars().compile(Grammar.regex("<a>|ab"))) == {0, 2, 3}  # the name of a control token is not the token
    assert grammars().compile(Grammar.choice(["abab"])).forced(rule.open((), 9)) is not None


def test_what_must_follow_is_spelled_with_this_vocabulary() -> None:
    rule = grammars().compile(Grammar.choice(["aab a"]))
    forced = list(rule.forced(rule.open((), 9)))
    assert forced
    assert "".join(Letters.texts[i].decode() for i in forced) in ("a", "aa", "aab", "aab a")


def test_one_end_token_is_enough_and_none_is_too_few() -> None:
    assert allowed(grammars(ends=(7,)).compile(Grammar.regex("b")), 1) == {7}
    with pytest.raises(IncompatibleError, match="end token"):
        grammars(ends=())
    with pytest.raises(IncompatibleError, match="left to right"):
        grammars(kind="masked")


def test_a_space_that_would_not_be_shown_is_refused() -> None:
    grammars(spaced=False).compile(Grammar.regex(" a"))
    with pytest.raises(ConfigError, match="begin with a space"):
        grammars(spaced=True).compile(Grammar.regex(" a"))
    grammars(spaced=True).compile(Grammar.regex("a a"))


def test_a_grammar_that_this_vocabulary_cannot_write_is_refused() -> None:
    with pytest.raises(ConfigError, match="no text"):
        grammars().compile(Grammar.regex("z"))
