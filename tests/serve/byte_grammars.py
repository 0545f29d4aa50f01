"""llguidance over single bytes: whether a text, cut anywhere, is allowed by a grammar and may end there."""

from __future__ import annotations

import random
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from hasten.logits._compile import prepare
from hasten.types import Grammar


class _Bytes:
    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([i]) for i in range(256)), b"<eos>"]
    special_token_ids = [256]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def matcher(grammar: Grammar) -> LLMatcher:
    """A matcher of this grammar as hasten hands it to llguidance; fails where that finds a fault or warns."""
    text = prepare(grammar)
    error, notes = LLMatcher.validate_grammar_with_warnings(text, _TOKENIZER)
    assert not error, notes
    assert not notes, notes
    return LLMatcher(_TOKENIZER, text)


def allowed(form: LLMatcher, text: str) -> tuple[bool, bool]:
    """(whether every byte of `text` may be written, whether the answer may end after it)."""
    state, data = form.deep_copy(), list(text.encode())
    written = state.try_consume_tokens(data) == len(data)
    return written, written and state.is_accepting()


def walk(form: LLMatcher, rng: random.Random, start: str = "", most: int = 400) -> tuple[str, bool]:
    """(text, whole) of a random walk through the grammar from `start`, preferring short ends."""
    state, out = form.deep_copy(), bytearray(start.encode())
    assert state.consume_tokens(list(out))
    while len(out) < most:
        bits = state.compute_bitmask()
        options = [i for i in range(257) if bits[i // 8] >> (i % 8) & 1]
        if 256 in options and (len(options) == 1 or rng.random() < 0.3):
            return out.decode("utf-8", "replace"), True
        plain = [i for i in options if 32 <= i < 127] or [i for i in options if i != 256]
        closing = [i for i in plain if i in b'"}]>']
        byte = rng.choice(closing if closing and rng.random() < 0.4 else plain)
        assert state.consume_token(byte)
        out.append(byte)
    return out.decode("utf-8", "replace"), False


def names(offer: Any) -> list[str]:
    """The names of an offer's tools."""
    return [tool.name for tool in offer.tools]
