"""A tiny random model with a real tokenizer and an end token, and ways to try texts against a grammar."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_model
import jsonschema

import hasten
from hasten.llm import LLM
from hasten.types import Grammar


def write(folder: Path, **how: Any) -> Path:
    """`chat_model`'s model on disk, with <|im_end|> as its end token."""
    chat_model.write_model(folder, **how)
    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    config["eos_token_id"] = vocabulary["<|im_end|>"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> LLM:
    return hasten.load(write(folder), backbone="torch", cache_bytes=64_000_000)


def accepts(llm: LLM, grammar: Grammar, text: str, *, whole: bool = True) -> bool:
    """Whether `text` may be written token by token, and (if `whole`) the answer may end there."""
    rule = llm.compile(grammar)
    state = rule.open((), 99)
    for token in llm.encode(text):
        if not rule.allows(state, token):
            return False
        state = rule.advance(state, token)
    return not whole or rule.allows(state, llm.model.capabilities.eos_ids[0])


def schema_accepts(llm: LLM, schema: Any, value: Any) -> bool:
    """Whether `value`, written as json.dumps writes it, may be the whole answer under `schema`."""
    text = value if isinstance(value, str) and value[:1] == "\0" else json.dumps(value, ensure_ascii=False)
    return accepts(llm, Grammar.json_schema(schema), text.removeprefix("\0"))


def valid(schema: Any, value: Any) -> bool:
    """Whether `value` is valid under `schema`, formats included, by a validator that is not ours."""
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `re`, for what ECMA-262 reads as it stands
        return kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(value)


def answers(llm: LLM, grammar: Grammar, count: int = 8, **sampling: Any) -> Iterator[str]:
    """Finished answers of the random model under a grammar, sampled so that they wander."""
    prompts = [[i % 300] for i in range(count)]
    sampling = {"max_tokens": 160, "temperature": 1.5, "seed": 5, **sampling}
    for out in llm.generate(prompts, grammar=grammar, method="plain", **sampling):
        if out.finish_reason == "stop":
            yield out.text
