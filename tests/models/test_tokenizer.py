"""Tokenizers: round trips, streams, templates, and text that tries to be a special token."""

from __future__ import annotations

import itertools

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError, FormatError, HastenError
from hasten.models.gguf import open_gguf
from hasten.models.templates import ChatTemplate
from hasten.models.tokenizer import Tokenizer

# SmolLM2's vocabulary has no token for six control characters and for the first byte of U+40000..U+BFFFF (unassigned):
# any tokenizer with that vocabulary loses them.
LOST = "\x04\x06\x13\x14\x16\x1d"
LETTERS = st.one_of(
    st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cs",), exclude_characters=LOST),
    st.characters(min_codepoint=0xC0000, exclude_categories=("Cs",)),
)
TEXT = st.text(LETTERS, max_size=60)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return open_gguf(smollm2_gguf).tokenizer()


def spm(prefix: bool = True) -> tuple[Tokenizer, list[str], dict[str, float]]:
    words = ["\u2581", *"abcdehlnortw ,.", "he", "ll", "hell", "hello", "\u2581he", "\u2581hello", "wo", "wor", "ld", "world",
             "\u2581w", "\u2581world", "an", "the", "\u2581the"]  # fmt: skip
    words = [w for w in words if w != " "]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    scores = {w: -float(i) for i, w in enumerate(words)}
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [scores.get(t, 0.0) for t in tokens],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_space_prefix": prefix,
    }  # fmt: skip
    return Tokenizer.from_gguf(metadata), tokens, scores


@given(text=TEXT)
def test_encoding_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@given(ids=st.lists(st.integers(0, 49151), max_size=40))
def test_a_stream_is_the_decoded_text_and_never_half_a_character(tokenizer, ids):
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    raw = b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer.special_ids)
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")


@given(pieces=st.lists(st.one_of(TEXT, st.sampled_from(SPECIAL)), max_size=6))
def test_user_text_never_becomes_a_special_token(tokenizer, pieces):
    ids = tokenizer.encode("".join(pieces))
    assert not set(ids) & tokenizer.special_ids
    assert tokenizer.decode(ids) == "".join(pieces)


@given(contents=st.lists(st.one_of(TEXT, st.sampled_from([*SPECIAL, "{{ 7 * 7 }}", "{% raw %}"])), min_size=1, max_size=4))
def test_message_contents_cannot_end_their_turn(tokenizer, contents):
    roles = ["user", "assistant"] * 4
    ids = tokenizer.chat([{"role": r, "content": c} for r, c in zip(roles, contents)])
    benign = tokenizer.chat([{"role": r, "content": "x"} for r, c in zip(roles, contents)])
    for token in tokenizer.special_ids:
        assert ids.count(token) == benign.count(token)


def test_ordinary_messages_give_the_ids_of_transformers(tokenizer):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._fast)
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours.\n\n"},
        {"role": "assistant", "content": "Red, green, blue."}, {"role": "user", "content": "caf\u00e9 {{ 7*7 }} <b>"},
    ]  # fmt: skip
    for some in (messages, messages[1:], messages[1:2]):
        tokenizer._fast.encode_special_tokens = False
        text = theirs.apply_chat_template(
            some, chat_template=tokenizer.chat_template, add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.chat(some) == tokenizer.encode(text, special=True, bos=False)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="surrogate"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("prefix", [True, False])
@given(text=st.text("abcdehlnortw ,.\u00e9\U0001f600", max_size=25))
def test_sentencepiece_merges_are_those_of_a_plain_search(prefix, text):
    tokenizer, tokens, scores = spm(prefix)
    if not text:
        return
    symbols = list(("\u2581" if prefix else "") + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    want = []
    for symbol in symbols:
        known = symbol in scores
        want += [tokens.index(symbol)] if known else [tokens.index(f"<0x{b:02X}>") for b in symbol.encode()]
    ids = tokenizer.encode(text, bos=False)
    assert ids == want
    assert tokenizer.decode(ids) == text


BOUNDED = [
    "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ 10 ** 10 ** 10 }}", "{{ '%1000000000d' % 1 }}", "{{ 'x'.ljust(10**10) }}",
    "{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__init__.__globals__ }}", "{% include '/etc/passwd' %}",
    "{% set x = namespace(v=[]) %}{% for i in range(99999) %}{{ 'y' * 1000 }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", BOUNDED)
def test_a_hostile_template_is_stopped(source):
    template = ChatTemplate(source, SPECIAL, {})
    try:
        pieces = template.render([{"role": "user", "content": "x"}], True)
        assert sum(len(text) for text, _ in pieces) < 100  # sandboxed attributes render as nothing
    except HastenError as error:
        assert "template" in str(error)


def test_a_template_that_does_not_compile_is_named():
    with pytest.raises(FormatError, match="template"):
        ChatTemplate("{% if %}", SPECIAL, {})
