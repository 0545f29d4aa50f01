"""The values that cross hasten's borders: requests in, outputs and trace events out, and the card of a method.

Everything here is frozen, standard-library only and safe to share between threads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, out_of_range

Exactness = Literal["exact", "distribution", "lossy", "model"]
FinishReason = Literal["stop", "length", "abort", "error"]
GrammarKind = Literal["json_schema", "json_object", "regex", "lark", "choice"]
EventKind = Literal[
    "queue", "prefill", "forward", "draft", "accept", "propose", "commit", "block", "stop", "error"
]  # fmt: skip

MAX_SEED = 2**63 - 1


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False, integer: bool = False) -> None:
    """Raise unless `value` is a finite number (never a bool) in [low, high] (or (low, high] with `open_low`)."""
    kinds = (int,) if integer else (int, float)
    what = "an integer" if integer else "a number"
    bracket = "(" if open_low else "["
    allowed = f"{what} in {bracket}{low:g}, {high:g}]" if abs(high) < 1e12 else f"{what} in {bracket}{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise out_of_range(name, value, allowed)
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        raise out_of_range(name, value, allowed)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when generation ends; every field is checked on construction.

    Order of application to the logits of one position: repetition, presence and frequency penalties, logit_bias,
    logit rules (grammars), temperature, top_k, top_p, min_p. `temperature = 0` is greedy; ties go to the lowest id.

    Fields
        max_tokens: tokens to generate at most, 1..2**31-1; None fills the model's window.
        temperature: 0..100. top_k: 0 (off) or >= 1. top_p: (0, 1]. min_p: [0, 1], relative to the best token.
        repetition_penalty: (0, 10], over prompt and output (as transformers). presence_penalty and
        frequency_penalty: [-2, 2], over the output only (as OpenAI).
        logit_bias: token id -> added value in [-100, 100]; at most `limits.logit_bias` entries.
        stop: strings that end the text (not included in it). stop_ids: token ids that do, besides the model's own.
        ignore_eos: go on past the model's end tokens.
        seed: 0..2**63-1; None draws one, reported in the output. The random number of a position depends on the
        seed and the position only, so the same request gives the same text alone, in a batch and after a restart.
        n: independent choices, 1..limits.n. logprobs: None, or how many alternatives (0..20) to report per token.

    Raises ConfigError naming the field.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _number("max_tokens", self.max_tokens, 1, 2**31 - 1, integer=True)
        _number("temperature", self.temperature, 0, 100)
        _number("top_k", self.top_k, 0, 2**31 - 1, integer=True)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 10, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("n", self.n, 1, LIMITS.n, integer=True)
        if self.seed is not None:
            _number("seed", self.seed, 0, MAX_SEED, integer=True)
        if self.logprobs is not None:
            _number("logprobs", self.logprobs, 0, LIMITS.logprobs, integer=True)
        if not isinstance(self.ignore_eos, bool):
            raise out_of_range("ignore_eos", self.ignore_eos, "true or false")
        object.__setattr__(self, "stop", self._strings("stop", self.stop))
        object.__setattr__(self, "stop_ids", self._ids("stop_ids", self.stop_ids))
        object.__setattr__(self, "logit_bias", self._bias(self.logit_bias))
        if len(self.stop) > LIMITS.stop_strings:
            raise out_of_range("stop", list(self.stop), f"at most {LIMITS.stop_strings} strings")
        for text in self.stop:
            if not text or len(text) > LIMITS.stop_chars:
                raise out_of_range("stop", text, f"strings of 1 to {LIMITS.stop_chars} characters")

    @staticmethod
    def _strings(name: str, value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
            raise out_of_range(name, value, "a string or a list of strings")
        return tuple(value)

    @staticmethod
    def _ids(name: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise out_of_range(name, value, "a list of token ids")
        for v in value:
            _number(name, v, 0, 2**31 - 1, integer=True)
        return tuple(value)

    @staticmethod
    def _bias(value: object) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise out_of_range("logit_bias", value, "a mapping from token id to a number in [-100, 100]")
        if len(value) > LIMITS.logit_bias:
            raise ConfigError(
                f"logit_bias has {len(value)} entries; logit_bias must have at most {LIMITS.logit_bias}",
                field="logit_bias",
            )
        for key, bias in value.items():
            _number("logit_bias", key, 0, 2**31 - 1, integer=True)
            _number("logit_bias", bias, -100, 100)
        return dict(value)

    @property
    def greedy(self) -> bool:
        """True when the choice needs no random number."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like.

    `source` is a JSON schema (as JSON text), a regex, a Lark grammar or a JSON list of choices; "json_object" is any JSON
    object, its source empty. Made by the methods named after the kinds; compiled and checked by `hasten.logits.grammar`,
    which refuses by its JSON path what is not supported. Equal grammars are compiled once.
    """

    kind: GrammarKind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "json_object", "regex", "lark", "choice"):
            raise out_of_range("grammar.kind", self.kind, "json_schema, json_object, regex, lark or choice")
        if not isinstance(self.source, str) or (not self.source) != (self.kind == "json_object"):
            raise out_of_range("grammar.source", self.source, "text, and empty for json_object only")
        if len(self.source.encode("utf-8", "replace")) > LIMITS.grammar_bytes:
            raise out_of_range("grammar.source", f"{len(self.source)} characters", f"at most {LIMITS.grammar_bytes} bytes")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON that is valid under `schema`: a mapping, or its JSON text; properties are written in the schema's order."""
        return cls("json_schema", schema if isinstance(schema, str) else _json("schema", schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that matches `pattern` as a whole."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, source: str) -> Grammar:
        """A sentence of a Lark grammar; its first rule is named start."""
        return cls("lark", source)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of `choices`."""
        if isinstance(choices, (str, bytes)) or not isinstance(choices, Sequence):
            raise out_of_range("grammar.choice", choices, "a list of strings")
        return cls("choice", _json("choice", list(choices)))


def _json(name: str, value: object) -> str:
    """`value` as JSON text; raises ConfigError when it is none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"grammar.{name} is not JSON: {str(error)[:120]}", field="grammar") from None


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to generate from: prompt token ids (never empty), how to sample, and which methods to use.

    `prompt_text` is kept for the record only; the engine reads ids. `method` is "auto" (exact methods only), "plain",
    one slug, or a tuple of slugs that combine. `template` is the canvas of a masked model, after the prompt: fixed tokens,
    and -1 for every slot to fill; None is a canvas of max_tokens slots. `grammar`: the form of the answer, left to right.
    `tenant` keeps cached prefixes apart: a row only ever reuses keys of its own tenant.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    method: tuple[str, ...] = ("auto",)
    prompt_text: str = ""
    template: tuple[int, ...] | None = None
    grammar: Grammar | None = None
    tenant: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("prompt is empty; prompt must hold at least one token", field="prompt")
        for v in self.prompt:
            if isinstance(v, bool) or not isinstance(v, int) or v < 0:
                raise out_of_range("prompt", v, "token ids >= 0")
        for v in self.template or ():
            if isinstance(v, bool) or not isinstance(v, int) or v < -1:
                raise out_of_range("template", v, "token ids, or -1 for a slot")
        if self.template is not None and -1 not in self.template:
            raise ConfigError("template has no slot; template must hold at least one -1", field="template")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one committed token, and the `top` alternatives, under the model's raw distribution.

    Raw means: after the model's own soft-cap, before penalties, bias, temperature and cut-offs.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost: token counts, target forwards and computed query tokens, times in seconds.

    `forwards` counts target passes after the prompt was read; the pass that read the prompt yields the first token.
    `computed_tokens` counts query tokens through the target, prompt and rejected drafts included. `draft_s` is the part
    of the time that went into drafting and into choosing how much of a draft to verify, shared among the rows of a pass.
    `cached_tokens` of the prompt were not computed: their keys were kept from an earlier request.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    forwards: int = 0
    computed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    cached_tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Block efficiency: committed tokens per target pass, without the pass that reads a prompt and its token."""
        return self.decoded / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of decoding, from the first token on (reading the prompt excluded)."""
        return self.decoded / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def decoded(self) -> int:
        """Tokens of decoding passes: all but the prompt's own one, which a canvas does not have."""
        return max(0, self.completion_tokens - (self.prefill_s > 0))


@dataclass(frozen=True, slots=True)
class Output:
    """One finished choice of a request.

    `tokens` holds every committed id, the end token included; `text` leaves out the end token and the stop string.
    `seed` is the one used, given or drawn, so that any answer can be repeated.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    seed: int
    choice: int = 0
    method: tuple[str, ...] = ("plain",)
    stop: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the trace; progress bars, live views, server streams, metrics and tests all read these.

    kind
        queue: the request was added (`position` = requests that wait before it, `total` = rows that run).
        prefill: prompt positions were read (`position` = how many are in the cache, `total` = prompt length,
        `cached_tokens` = how many of them were kept from an earlier request).
        forward: one target pass of this row (`total` = its query tokens, `backbone` = what ran it: native or torch); of a
        guided canvas two that run as one.
        draft: nodes proposed (`tokens`, `parents`). accept: the drafted tokens kept (`tokens`).
        propose: a provisional canvas token (`position`, `token`, `confidence`); may still change.
        commit: a final token (`position`, `token`, `confidence` = its probability, `text` = new whole characters).
        block: a canvas block was planned (`position` = start, `total` = end).
        stop: the choice ended (`output`). error: it failed (`text` = message, `code` = why: its "deadline" passed, its
        "rule" let nothing follow, or the "engine" could not go on).
    `step` is the engine step, `time_s` seconds since the request was added, `position` absolute (0 = first prompt token).
    """

    kind: EventKind
    request: int
    choice: int = 0
    step: int = 0
    time_s: float = 0.0
    position: int = -1
    token: int = -1
    confidence: float = float("nan")
    text: str = ""
    total: int = 0
    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    backbone: str = ""
    logprob: TokenLogprob | None = None
    output: Output | None = None
    cached_tokens: int = 0
    code: str = ""


def commit_log(events: Iterable[Event]) -> Mapping[int, list[tuple[int, int, int, float]]]:
    """Choice -> [(step, position, token, confidence)] of every commit, in the order they happened."""
    log: dict[int, list[tuple[int, int, int, float]]] = {}
    for event in events:
        if event.kind == "commit":
            log.setdefault(event.choice, []).append((event.step, event.position, event.token, event.confidence))
    return log


@dataclass(frozen=True, slots=True)
class MethodCard:
    """The facts about one method, declared once in its module as `card`; docs, `hasten methods` and checks read it.

    `plugs_into` is the method's folder (draft, unmask, logits, ...). `needs` lists capabilities the model must offer,
    `conflicts` slugs it cannot be combined with. `claim` is the paper's headline, `no_help` when the method does not
    help; both are one sentence. `knobs` maps a setting's name to a short explanation. `paper` is an arXiv id or "".
    """

    slug: str
    title: str
    paper: str
    date: str
    plugs_into: str
    exactness: Exactness
    claim: str
    no_help: str
    knobs: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON-ready values."""
        return {name: getattr(self, name) for name in self.__slots__}
