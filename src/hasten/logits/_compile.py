"""llguidance: the model's vocabulary as a trie, and grammars compiled over it.

The bytes of a token are our tokenizer's own. Special tokens and rows of the output layer without text have none, so no
grammar can ever reach them; the end tokens are handled by id, outside the trie (`grammar.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError
from hasten.logits import _lark, _regex, _schema
from hasten.types import Grammar

_PARSER = LLParserLimits(
    max_grammar_size=LIMITS.grammar_symbols,
    max_items_in_row=10_000,  # four for every optional property of an object
    max_lexer_states=20_000,  # about 2 KB each, and every row has its own
    verbose_errors=False,
)


class Trie:
    """The vocabulary of one model as llguidance sees it; built once, shared by all threads.

    Tokens with the same bytes are one leaf of the trie: `leaf[id]` is the id that stands for them there, and `twins`
    [2, n] lists (the others, their leaf).
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        self.vocab_size, self.end_ids = vocab_size, tuple(end_ids)
        hidden = {*tokenizer.special_ids, *end_ids}
        texts = [b"" if i in hidden else tokenizer.token_bytes(i) for i in range(vocab_size)]
        first: dict[bytes, int] = {}
        self.leaf: dict[int, int] = {}
        others = []
        for i, text in enumerate(texts):
            if text:
                self.leaf[i] = first.setdefault(text, i)
                if first[text] != i:
                    others.append((i, first[text]))
                    texts[i] = b""
        self.twins = np.array(others, dtype=np.int64).reshape(-1, 2).T
        self.spaced = tokenizer.continues_text()
        self.begins_spaced = np.array([text.startswith(b" ") for text in texts])
        words = _Words(texts, first, tokenizer.copy(), self.end_ids[0])
        self.handle = LLTokenizer(
            words,  # type: ignore[arg-type]  # all that is asked of a wrapper
            n_vocab=vocab_size,
            eos_token=list(end_ids),
            slices=LLTokenizer.json_slices(),
        )


class _Words:
    """What llguidance asks of a tokenizer: the bytes of every id, and how a text is usually written in tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes], known: dict[bytes, int], tokenizer: Any, eos: int) -> None:
        self.tokens, self.eos_token_id = tokens, eos
        self._known, self._tokenizer = known, tokenizer
        self._longest = max(map(len, known), default=1)

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are those of `text`: the tokenizer's where they are, else the longest pieces."""
        raw = text.encode()
        ids = [self._known.get(self._tokenizer.token_bytes(i), -1) for i in self._tokenizer.encode(text, bos=False)]
        if -1 not in ids and b"".join(self.tokens[i] for i in ids) == raw:
            return ids
        ids, at = [], 0
        while at < len(raw):
            end = next((e for e in range(min(len(raw), at + self._longest), at, -1) if raw[at:e] in self._known), 0)
            if not end:
                break
            ids.append(self._known[raw[at:end]])
            at = end
        return ids


def prepare(grammar: Grammar) -> str:
    """`grammar` checked, and written as llguidance's own description; raises ConfigError with field "grammar"."""
    try:
        grammar.source.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "the grammar holds half of a surrogate pair, which no text can express", field="grammar"
        ) from None
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(_regex.check(grammar.source, "the regex")))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(_lark.check(grammar.source)))
    if grammar.kind == "choice":
        return str(LLMatcher.grammar_from_lark(_choices(grammar.source)))
    return str(LLMatcher.grammar_from_json_schema(_schema.prepare(grammar.source or '{"type": "object"}')))


def _choices(source: str) -> str:
    choices = _schema.loads(source, "choice")
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise ConfigError("choice must be a list of strings, none of them empty", field="grammar")
    if len(choices) > LIMITS.enum_values:
        raise ConfigError(f"choice has {len(choices)} entries; at most {LIMITS.enum_values}", field="grammar")
    if any(0xD800 <= ord(c) < 0xE000 for one in choices for c in one):
        raise ConfigError("choice holds half of a surrogate pair, which no text can express", field="grammar")
    # one terminal, not a rule: a parser would keep an item for every choice
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in dict.fromkeys(choices))


def build(trie: Trie, description: str) -> LLMatcher:
    """A matcher at its start; raises ConfigError with llguidance's reason in one line."""
    matcher = LLMatcher(trie.handle, description, log_level=0, limits=_PARSER)
    if matcher.is_error():
        reason = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:300]
        hint = ""
        if "oneOf" in reason:
            reason, hint = (
                "the alternatives of a oneOf may hold together",
                "use anyOf, or give each a property with a const",
            )
        raise ConfigError(f"the grammar cannot be compiled: {reason}", hint=hint, field="grammar")
    warnings = matcher.get_grammar_warnings()
    if warnings:
        raise ConfigError(f"the grammar cannot be enforced completely: {' '.join(warnings)[:300]}", field="grammar")
    return matcher
