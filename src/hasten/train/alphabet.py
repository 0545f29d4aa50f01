"""The characters the small models read and write: one token each, and the tokenizer files that say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hasten.errors import ConfigError

PAD, MASK, BOS, EOS = 0, 1, 2, 3
SPECIAL = ("<pad>", "<mask>", "<bos>", "<eos>")
_PLAIN = "\n" + "".join(chr(code) for code in range(32, 127))
_IDS = {character: i for i, character in enumerate(_PLAIN, len(SPECIAL))}
SIZE = len(SPECIAL) + len(_PLAIN)
TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}{{ '\\n' }}"


def encode(text: str) -> list[int]:
    """One id per character; raises ConfigError for a character that is neither printable ASCII nor a newline."""
    try:
        return [_IDS[character] for character in text]
    except KeyError as error:
        raise ConfigError(f"{error.args[0]!r} is not printable ASCII", field="text") from None


def decode(ids: list[int]) -> str:
    """The text of ids, up to the first end token; other special tokens are left out."""
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return "".join(_PLAIN[i - len(SPECIAL)] for i in ids if i >= len(SPECIAL))


def tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json: byte-level BPE without merges; what is not in the alphabet becomes `?`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [{"id": i, "content": text, **plain, "special": True} for i, text in enumerate(SPECIAL)]
    spelling = {"\n": "\u010a", " ": "\u0120"}
    vocab = {text: i for i, text in enumerate(SPECIAL)}
    vocab |= {spelling.get(character, character): i for character, i in _IDS.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    start = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "?",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, with a chat template: the last message and a newline."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "add_bos_token": True,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
