"""Tokenizers: text to ids and back, from a directory's tokenizer.json or a GGUF file's metadata.

Encoding and merging are the `tokenizers` library's; decoding is ours, byte by byte, so that streamed text is exactly the
decoded text and never shows half a character. User text never becomes special tokens.
"""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Mapping, Sequence
from copy import copy as shallow_copy
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Fast

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, FormatError, UnsupportedError, out_of_range
from hasten.models.templates import ChatTemplate

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_END_NAMES = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
)
_CONTROL, _USER, _BYTE = 3, 4, 6


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte, reversed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(other)}}


_BYTES = _byte_alphabet()


def _pre_tokenizer(name: str) -> tuple[Any, Any, bool]:
    """(pre-tokenizer, normalizer, ignore_merges) for a GGUF file's `tokenizer.ggml.pre`."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), raw])

    if name in ("smollm", "smaug-bpe-digits"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]), None, False
    if name in ("default", "gpt-2", "gpt2"):
        return plain, None, False
    if name in ("llama-bpe", "llama3", "llama-v3", "smaug-bpe"):
        return split(_LLAMA3), None, True
    if name in ("qwen2", "deepseek-r1-qwen"):
        return split(_QWEN2), normalizers.NFC(), False
    raise UnsupportedError(
        f"pre-tokenizer {name!r} is not known; known: smollm, gpt-2, llama-bpe, qwen2", field="tokenizer.ggml.pre"
    )


def end_ids_from_gguf(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text: the declared ones and control tokens with a well-known end-of-turn name."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, list) and len(tokens) == len(types):
        ids += [
            i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _CONTROL and text in _END_NAMES
        ]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0))


class Tokenizer:
    """Text to ids and back; make one with `from_dir` or `from_gguf`.

    `special_ids` are the control tokens: never produced from user text, left out of decoded text by default. `eos_ids`
    end a text, `mask_id` marks a position to fill in. `chat_template` is the template's source, None for base models.
    """

    def __init__(
        self,
        fast: Fast,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        mask_id: int | None = None,
        add_bos: bool = False,
        template: str | None = None,
        special: Sequence[int] = (),
    ) -> None:
        self._fast = fast
        self._encoding = threading.Lock()
        self.bos_id, self.eos_ids, self.pad_id, self.add_bos = bos_id, tuple(eos_ids), pad_id, add_bos
        self.mask_id = mask_id
        added = fast.get_added_tokens_decoder()
        self.special_ids = frozenset({i for i, token in added.items() if token.special} | set(special))
        self._added = {i: token.content for i, token in added.items()}
        spec = json.loads(fast.to_str())
        decoder = json.dumps(spec.get("decoder") or {})
        if '"ByteLevel"' in decoder:
            self._kind = "bytes"
        elif '"ByteFallback"' in decoder:
            self._kind = "pieces"
        else:
            raise UnsupportedError(
                "the tokenizer is neither byte-level nor byte-fallback; its text cannot be streamed exactly",
                field="tokenizer.json",
            )
        self._strip = '"Strip"' in decoder
        self._texts: dict[int, bytes] = {}
        self.chat_template = template
        self._template: ChatTemplate | None = None

    # --- construction ---

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """From tokenizer.json (with tokenizer_config.json and chat_template.jinja when present) in a directory.

        Raises FormatError when the files are damaged, UnsupportedError when there is only a slow tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise UnsupportedError(
                f"{path} has no tokenizer.json", hint="save the fast tokenizer: AutoTokenizer(...).save_pretrained(dir)"
            )
        try:
            fast = Fast.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for every malformed file
            raise FormatError(f"not a tokenizer: {str(error)[:200]}", path=str(file)) from None
        config = read_json(path / "tokenizer_config.json")
        names = {**read_json(path / "special_tokens_map.json"), **config}

        def token(key: str) -> int | None:
            value = names.get(key)
            text = value.get("content") if isinstance(value, Mapping) else value
            return fast.token_to_id(text) if isinstance(text, str) else None

        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates: the default one
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        separate = path / "chat_template.jinja"
        if separate.is_file():
            template = separate.read_text(encoding="utf-8")
        bos, eos = token("bos_token"), token("eos_token")
        start = fast.encode("", add_special_tokens=True).ids
        ends = [eos, *(fast.token_to_id(name) for name in _END_NAMES[:4])]
        special = {i for i, t in fast.get_added_tokens_decoder().items() if t.special}
        return cls(
            fast,
            bos_id=bos,
            eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None and (i in special or i == eos))),
            pad_id=token("pad_token"),
            mask_id=token("mask_token"),
            add_bos=bool(start) and start[0] == bos,
            template=template if isinstance(template, str) else None,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata; byte-level BPE ("gpt2") and SentencePiece BPE with byte fallback ("llama") are read.

        Raises FormatError naming the key that is missing or wrong, UnsupportedError for other kinds.
        """

        def strings(key: str, size: int | None = None, kind: type | tuple[type, ...] = str) -> list[Any]:
            value = metadata.get(f"tokenizer.ggml.{key}")
            if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
                raise FormatError(f"metadata tokenizer.ggml.{key} is missing or of the wrong type", field=key)
            if size is not None and len(value) != size:
                raise FormatError(f"metadata tokenizer.ggml.{key} has {len(value)} entries, not {size}", field=key)
            return value

        def number(key: str) -> int | None:
            value = metadata.get(f"tokenizer.ggml.{key}")
            good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(tokens)
            return value if good else None

        kind = metadata.get("tokenizer.ggml.model")
        tokens = strings("tokens")
        types = strings("token_type", len(tokens), int) if "tokenizer.ggml.token_type" in metadata else [1] * len(tokens)
        if not tokens:
            raise FormatError("metadata tokenizer.ggml.tokens is empty", field="tokens")
        if kind == "gpt2":
            fast = _byte_level(tokens, strings("merges"), str(metadata.get("tokenizer.ggml.pre", "default")))
        elif kind == "llama":
            scores = strings("scores", len(tokens), (int, float))
            prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
            fast = _sentencepiece(tokens, scores, prefix)
        else:
            raise UnsupportedError(
                f"tokenizer model {kind!r} is not read; known: gpt2, llama", field="tokenizer.ggml.model"
            )
        control = [i for i, k in enumerate(types) if k == _CONTROL]
        fast.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control])
        user = [tokens[i] for i, k in enumerate(types) if k == _USER and tokens[i]]
        fast.add_tokens([AddedToken(text, special=False, normalized=False) for text in user])
        add_bos = metadata.get("tokenizer.ggml.add_bos_token")
        bos = number("bos_token_id")
        template = metadata.get("tokenizer.chat_template")
        return cls(
            fast,
            bos_id=bos,
            eos_ids=[i for i in end_ids_from_gguf(metadata) if i < len(tokens)],
            pad_id=number("padding_token_id"),
            add_bos=bos is not None and bool(kind == "llama" if add_bos is None else add_bos),
            template=template if isinstance(template, str) else None,
            special=control,
        )

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, chat template included; `from_dir` reads the same tokenizer back.

        Raises UnsupportedError for one whose special tokens these files cannot tell.
        """
        spec = json.loads(self._fast.to_str())
        bos = None if self.bos_id is None else self.token_text(self.bos_id)
        if self.add_bos and bos is not None:
            start, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
            second = {"Sequence": {"id": "B", "type_id": 0}}
            special = {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}}
            spec["post_processor"] = {
                "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, second],
                "special_tokens": special,
            }  # fmt: skip
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        ids = {"bos": self.bos_id, "eos": next(iter(self.eos_ids), None), "pad": self.pad_id, "mask": self.mask_id}
        config |= {f"{name}_token": self.token_text(i) for name, i in ids.items() if i is not None}
        config |= {"add_bos_token": self.add_bos, "chat_template": self.chat_template}
        for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        again = Tokenizer.from_dir(folder)
        for name in ("bos_id", "pad_id", "mask_id", "add_bos", "special_ids", "chat_template", "vocab_size"):
            if getattr(self, name) != getattr(again, name):
                raise UnsupportedError(f"the tokenizer's {name} cannot be written to a directory", field=name)

    # --- text to ids ---

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, bos: bool | None = None, special: bool = False) -> list[int]:
        """Ids of `text`. `special`: whether text such as "<|im_end|>" becomes the token of that name (user text: never).

        `bos`: put the start token first (None = as the model was trained). Raises ConfigError when text is no string.
        """
        if not isinstance(text, str):
            raise out_of_range("text", text, "a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError("text holds half of a surrogate pair, which no encoding can express", field="text") from None
        with self._encoding:  # the switch belongs to the whole tokenizer: another thread must not turn it between the two
            self._fast.encode_special_tokens = not special
            ids = self._fast.encode(text, add_special_tokens=False).ids
        if (self.add_bos if bos is None else bos) and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        return list(ids)

    def copy(self) -> Tokenizer:
        """A tokenizer of its own, so that a thread that must not wait never waits for another's long text."""
        own = shallow_copy(self)
        own._fast, own._encoding = Fast.from_str(self._fast.to_str()), threading.Lock()
        return own

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Ids of a conversation through the model's chat template; contents are data, whatever they look like.

        `tools` and `options` as `ChatTemplate.render` takes them. Raises ConfigError when the model has no template, or the
        messages are malformed.
        """
        if self.chat_template is None:
            raise ConfigError(
                "the model has no chat template",
                hint="use generate() with plain text, or an instruct model",
                field="messages",
            )
        if self._template is None:
            texts = [self.token_text(i) for i in self.special_ids]
            names = {
                "bos_token": self.bos_id,
                "eos_token": self.eos_ids[0] if self.eos_ids else None,
                "pad_token": self.pad_id,
            }
            constants = {name: self.token_text(i) for name, i in names.items() if i is not None}
            self._template = ChatTemplate(self.chat_template, texts, {"bos_token": "", "eos_token": "", **constants})
        ids: list[int] = []
        for text, trusted in self._template.render(messages, generation_prompt, tools=tools, options=options):
            ids += self.encode(text, bos=False, special=trusted)
        return ids

    # --- ids to text ---

    def token_text(self, token: int) -> str:
        """The vocabulary's own spelling of an id; raises ConfigError outside the vocabulary."""
        text = self._fast.id_to_token(token)
        if text is None:
            raise out_of_range("token", token, f"an id of the tokenizer, below {self.vocab_size}")
        return text

    def special_id(self, text: str) -> int | None:
        """The id of the control token of that name, None when there is none."""
        token = self._fast.token_to_id(text)
        return token if token in self.special_ids else None

    def token_strings(self) -> list[str]:
        """The vocabulary's spelling of every id in order, "" for ids without one."""
        return [self._fast.id_to_token(i) or "" for i in range(self.vocab_size)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for in a text (before the first-space rule of SentencePiece vocabularies)."""
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = self._fast.id_to_token(token)
        if text is None:
            return b""  # padding rows of the embedding have no text
        if self._kind == "bytes":
            if all(c in _BYTES for c in text):
                return bytes(_BYTES[c] for c in text)
            return text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                return text.encode()
        return text.replace("\u2581", " ").encode()

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are no valid UTF-8 become U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        return "".join(stream.push(token) for token in ids) + stream.flush()

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A fresh incremental decoder."""
        return TextStream(self, skip_special)

    def continues_text(self) -> bool:
        """Whether the first space of a decoded text is an artefact to strip (SentencePiece with a dummy prefix)."""
        return self._kind == "pieces" and self._strip


class TextStream:
    """Incremental decoding: whole characters only; pushes plus flush equal `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = tokenizer.continues_text()

    def push(self, token: int) -> str:
        """New whole characters after `token`."""
        if token in self._skip:
            return ""
        raw = self._tokenizer.token_bytes(token)
        if self._first and raw:
            self._first = False
            raw = raw.removeprefix(b" ")
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """What is left: U+FFFD when the text ends inside a character."""
        return self._utf8.decode(b"", final=True)


def _byte_level(tokens: list[str], merges: list[str], pre: str) -> Fast:
    splitter, normalizer, ignore = _pre_tokenizer(pre)
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise FormatError(f"merge {merge!r:.40} is not two tokens", field="tokenizer.ggml.merges")
        pairs.append((left, right))
    fast = _bpe(tokens, pairs, ignore_merges=ignore)
    fast.pre_tokenizer, fast.decoder = splitter, decoders.ByteLevel()
    if normalizer is not None:
        fast.normalizer = normalizer
    return fast


def _sentencepiece(tokens: list[str], scores: list[float], prefix: bool) -> Fast:
    rank = {text: i for i, text in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for text, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in rank and right in rank:
                merges.append((-score, rank[left], rank[right], left, right))
    merges.sort(key=lambda merge: merge[0])
    fast = _bpe(tokens, [(left, right) for *_, left, right in merges], byte_fallback=True, fuse_unk=True)
    replace = normalizers.Replace(" ", "\u2581")
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return fast


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Fast:
    vocab = {text: i for i, text in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise FormatError(f"the vocabulary repeats {len(tokens) - len(vocab)} tokens", field="tokenizer.ggml.tokens")
    try:
        return Fast(models.BPE(vocab, merges, **options))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for every malformed vocabulary
        raise FormatError(f"not a BPE vocabulary: {str(error)[:200]}", field="tokenizer.ggml.merges") from None


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object file; {} when absent. Raises FormatError when it is something else."""
    if not path.is_file():
        return {}
    if path.stat().st_size > LIMITS.config_bytes:
        raise FormatError(f"has more than {LIMITS.config_bytes} bytes", path=str(path))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {str(error)[:100]}", path=str(path)) from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", path=str(path))
    return value
