"""The public object: a loaded model with its tokenizer and engine, and everything a user does with it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from hasten import registry
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, HastenError, IncompatibleError, out_of_range, unknown_name
from hasten.types import Event, Grammar, Output, Request, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.engine.contracts import LogitsRule
    from hasten.engine.engine import Parts
    from hasten.models.load import Loaded
    from hasten.pass_cost import PassCost

Prompt = str | Sequence[int]
Message = Mapping[str, object]
Form = Grammar | Mapping[str, Any]  # a mapping is a JSON schema
_SLOT = re.compile(r"<mask:(\d{1,7})>")
_SAMPLING = tuple(f.name for f in fields(SamplingParams))


class Grammars(Protocol):
    """What compiles grammars (logits/grammar.py)."""

    def compile(self, grammar: Grammar) -> LogitsRule:
        """The rule of a grammar."""

    def counts(self) -> Any:
        """What was spent: numbers of grammars and masks, and seconds (logits.grammar.Counts)."""


@dataclass(frozen=True, slots=True)
class Score:
    """Natural-log probabilities of a text's tokens, and their sum `total`."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    backbone: str = "auto",
    activations: str = "exact",
    cache: str = "float32",
    weights: str = "stored",
    threads: int | None = None,
    cache_bytes: int | None = None,
    serving: bool = False,
    prefix_cache: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> LLM:
    """Load a model: catalog name, directory, hub id, .gguf or .safetensors file; catalog models are fetched on first use.

    `dtype`: of the weights - auto (as stored), float32 or bfloat16. `backbone`: auto (the native stack where it can run),
    native or torch. Lossy, for the native stack: `activations` int8 (inputs of quantised matrices rounded to 8 bits),
    `cache` bfloat16 or int8 (keys and values), `weights` int8, int4 or int4-min (rounded to nearest).
    `threads`: CPU threads for this process (default: all). `cache_bytes`: KV cache (default: half of what is free after
    loading). `serving`: refuse requests that free memory does not allow just now. `prefix_cache`: keep keys of prompts for
    later ones that begin alike. `force`: load although the memory check says it will not fit. `progress(what, done, total)`
    is called during downloads and loading.
    Raises UnknownNameError, DownloadError, FormatError, UnsupportedError, MemoryFitError, ConfigError.
    """
    import torch

    from hasten.kernels import library
    from hasten.models.load import load as load_model

    how = {"dtype": dtype, "backbone": backbone, "activations": activations, "cache": cache, "weights": weights}
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise out_of_range("threads", threads, "an integer in [1, 1024]")
        torch.set_num_threads(threads)
    if library.available():
        library.set_threads(min(torch.get_num_threads(), 256))
    loaded = load_model(model, progress=progress, force=force, **how)
    loaded.model.pack()
    return LLM(loaded, name=str(model), cache_bytes=cache_bytes, serving=serving, prefix_cache=prefix_cache)


class LLM:
    """A model ready to generate; make one with `hasten.load`. One thread at a time.

    Sampling keywords everywhere are the fields of SamplingParams; unknown ones are refused by name.
    """

    def __init__(
        self,
        loaded: Loaded,
        name: str,
        cache_bytes: int | None = None,
        *,
        serving: bool = False,
        prefix_cache: bool = False,
    ) -> None:
        from hasten.engine.engine import Engine
        from hasten.models.memory import available_bytes

        self.name = name
        self.source = loaded.source
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.dtype = loaded.dtype
        self.bytes = loaded.bytes
        if cache_bytes is None:
            cache_bytes = int(available_bytes() * LIMITS.cache_share)
        elif isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int) or cache_bytes < 1:
            raise out_of_range("cache_bytes", cache_bytes, "a positive number of bytes")
        self.engine = Engine(
            self.model,
            cache_bytes=cache_bytes,
            decoder=None if self.tokenizer is None else self.tokenizer.stream,
            prefix_bytes=int(cache_bytes * LIMITS.prefix_share) if prefix_cache else 0,
            identity=_identity(loaded),
            available=available_bytes if serving else None,
        )
        self._parts: dict[tuple[str, ...], Parts] = {}
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    # --- generation ---

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        method: str | Sequence[str] = "auto",
        grammar: Form | None = None,
        **sampling: Any,
    ) -> Any:
        """Continue `prompt` (text or token ids): an Output; a list of Outputs when n > 1 or for a list of prompts
        (a list of lists for both). Prompts of a list run together and do not influence one another.

        `method`: "auto" (exact methods only), "plain", "tuned" (what `hasten tune` found for this model on this machine), a
        slug ("prompt-lookup", with settings "prompt-lookup:nodes=4"), or a list of slugs. `grammar`: the form of the
        answer, a Grammar, or a JSON schema as a mapping.
        Raises ConfigError naming the field, ContextLengthError, MemoryFitError.
        """
        many = not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], int)
        prompts: Sequence[Prompt] = prompt if many else [prompt]  # type: ignore[list-item, assignment]
        requests = [self._request(self._ids(one), method, sampling, one, grammar) for one in prompts]
        outputs = [outs[0] if len(outs) == 1 else outs for outs in self._run(requests)]
        return outputs if many else outputs[0]

    def stream(
        self, prompt: Prompt, *, method: str | Sequence[str] = "auto", grammar: Form | None = None, **sampling: Any
    ) -> Iterator[Event]:
        """The trace events of one request as they happen; closing the iterator aborts it."""
        request, parts = self._request(self._ids(prompt), method, sampling, prompt, grammar)
        return self._events(request, parts)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        method: str | Sequence[str] = "auto",
        grammar: Form | None = None,
        **sampling: Any,
    ) -> Any:
        """The assistant's next message for `messages` ({"role", "content"}), through the model's chat template."""
        outs = self._run([self._request(self.chat_ids(messages), method, sampling, grammar=grammar)])[0]
        return outs[0] if len(outs) == 1 else outs

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        method: str | Sequence[str] = "auto",
        grammar: Form | None = None,
        **sampling: Any,
    ) -> Iterator[Event]:
        """As `stream`, for chat messages."""
        request, parts = self._request(self.chat_ids(messages), method, sampling, grammar=grammar)
        return self._events(request, parts)

    def fill(self, text: str, *, method: str | Sequence[str] = "auto", **sampling: Any) -> Output:
        """Fill every `<mask:N>` of `text` with N tokens that fit what stands before and after; an Output with all text.

        For models that fill canvases. Its `tokens` are those from the first slot on. Raises ConfigError without a slot, for
        slots that begin the text of a model without a start token, and for max_tokens, which the slots decide.
        """
        if "max_tokens" in sampling:
            raise ConfigError("max_tokens is given; the slots say how much is filled", field="max_tokens")
        head, *rest = _SLOT.split(text)
        if not rest:
            raise ConfigError("text has no slot", hint="mark one with <mask:8>, for eight tokens", field="text")
        template: list[int] = []
        for size, fixed in zip(rest[::2], rest[1::2], strict=True):
            if not 1 <= int(size) <= LIMITS.max_tokens:
                raise out_of_range("text", f"<mask:{size}>", f"slots of 1 to {LIMITS.max_tokens} tokens")
            template += [-1] * int(size) + (self._text_ids(fixed) if fixed else [])
        prompt = self._ids(head) if head else self.encode("")
        if not prompt:
            raise ConfigError("text begins with a slot; this model needs a token before it", field="text")
        request, parts = self._request(prompt, method, sampling, text)
        out = self._run([(replace(request, template=tuple(template)), parts)])[0][0]
        return replace(out, text=head + out.text)

    def _run(self, requests: Sequence[tuple[Request, Parts]]) -> list[list[Output]]:
        failures: list[str] = []

        def watch(event: Event) -> None:
            if event.kind == "error":
                failures.append(event.text)

        results = self.engine.run(requests, watch)
        if failures:
            raise HastenError(failures[0])
        return results

    def _events(self, request: Request, parts: Parts) -> Iterator[Event]:
        for event in self.engine.stream(request, parts):
            yield event
            if event.kind == "error":
                raise HastenError(event.text)

    def _request(
        self,
        ids: Sequence[int],
        method: str | Sequence[str],
        sampling: Mapping[str, Any],
        prompt: Prompt = "",
        grammar: Form | None = None,
    ) -> tuple[Request, Parts]:
        for name in sampling:
            if name not in _SAMPLING:
                raise unknown_name("option", name, (*_SAMPLING, "method", "grammar"))
        names = (method,) if isinstance(method, str) else tuple(method)
        text = prompt if isinstance(prompt, str) else ""
        form = Grammar.json_schema(grammar) if isinstance(grammar, Mapping) else grammar
        if form is not None and not isinstance(form, Grammar):
            raise out_of_range("grammar", form, "a hasten.Grammar, or a JSON schema as a mapping")
        request = Request(tuple(ids), SamplingParams(**sampling), names, text, grammar=form)
        return request, self.parts(names, form)

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids = self.encode(prompt)
            if not prompt or not ids:
                raise ConfigError("prompt is empty; prompt must hold at least one character", field="prompt")
            return ids
        if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Sequence):
            raise out_of_range("prompt", prompt, "a string or a list of token ids")
        return list(cast("Sequence[int]", prompt))

    def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Token ids of `messages` through the model's chat template, up to where the answer begins.

        `tools` and `options` (of the template) as `models.templates.ChatTemplate.render` takes them.
        """
        if self.tokenizer is None:
            raise ConfigError(
                f"model {self.name!r} has no tokenizer", hint="pass token ids to generate()", field="messages"
            )
        return self.tokenizer.chat(messages, tools=tools, options=options)

    # --- methods ---

    def parts(self, names: tuple[str, ...], grammar: Grammar | None = None) -> Parts:
        """The method parts for these names, built once per LLM; shared drafter state lives as long as the LLM does.

        With `grammar` they hold its rule too. Raises UnknownNameError, UnsupportedError (planned), IncompatibleError naming
        both sides, and as `compile` does.
        """
        from hasten.combine import combine
        from hasten.engine.contracts import MethodContext

        if names not in self._parts:
            context = MethodContext(self.name, self.model, self.tokenizer)
            self._parts[names] = combine(names, context, self._costs)
        parts = self._parts[names]
        return parts if grammar is None else replace(parts, rules=(*parts.rules, self.compile(grammar)))

    @property
    def grammars(self) -> Grammars:
        """What compiles grammars for this model, built when it is first asked for; its `counts()` say what was spent.

        Safe from any thread. Raises IncompatibleError for models that grammars do not work with.
        """
        from hasten.engine.contracts import MethodContext

        with self._lock:
            if self._grammars is None:
                kind = self.model.capabilities.kind
                if kind != "causal":
                    raise IncompatibleError(
                        f"grammars work from left to right; {self.name!r} is a {kind} model, whose grammars come later",
                        hint="leave the grammar out, or ask a left-to-right model",
                        field="grammar",
                    )
                self._grammars = cast(
                    Grammars, registry.build("grammar", MethodContext(self.name, self.model, self.tokenizer))
                )
            return self._grammars

    def compile(self, grammar: Grammar) -> LogitsRule:
        """The logit rule of a grammar, for `Parts.rules`; safe from any thread, beside a running engine.

        Equal grammars are compiled once while they are kept. Raises ConfigError (field "grammar") naming what is not
        supported, IncompatibleError for models that grammars do not work with.
        """
        return self.grammars.compile(grammar)

    def forget(self) -> None:
        """Drop every method built so far with what it has learnt, and kept prompts: the next request starts cold.

        Nothing may be running.
        """
        self._parts.clear()
        self.engine.forget()

    def _costs(self) -> PassCost:
        """What passes cost on this machine, from its profile to begin with (measured at first use, in under a second)."""
        from hasten.models.native import NativeStack

        if isinstance(self.model, NativeStack) and not self.engine.pass_cost.table():
            from hasten.models.cost import profile

            self.engine.pass_cost.expect(1, profile(self.model, self.name).table(256))
        return self.engine.pass_cost

    def save_state(self, path: str | Path) -> None:
        """Write what shared drafters have learnt so far (token tables; no prompts or answers) to a safetensors file."""
        from safetensors.torch import save_file

        state: dict[str, Tensor] = {}
        for names, parts in self._parts.items():
            if parts.drafter is not None and parts.drafter.scope == "shared":
                state |= {f"{'+'.join(names)}/{key}": value for key, value in parts.drafter.state_dict().items()}
        part = Path(path).with_suffix(".part")
        save_file({key: value.contiguous() for key, value in state.items()}, part, {"hasten": "state", "model": self.name})
        part.replace(path)

    def load_state(self, path: str | Path) -> None:
        """Take over what `save_state` wrote for this model, so that its methods start warm.

        Raises FormatError for a file that is not one, ConfigError for another model's or another setting's.
        """
        from safetensors import SafetensorError, safe_open

        from hasten.errors import FormatError

        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read ({error})", hint="remove it to start anew", field="state") from None
        if facts.get("hasten") != "state":
            raise FormatError(f"{path} holds no drafters' state", hint="give a file of save_state", field="state")
        if facts.get("model") != self.name:
            raise ConfigError(f"{path} belongs to model {facts.get('model')!r}, not {self.name!r}", field="state")
        for name in dict.fromkeys(key.rpartition("/")[0] for key in state):
            drafter = self.parts(tuple(name.split("+"))).drafter
            if drafter is None:
                raise FormatError(f"{path}: {name!r} drafts nothing", hint="remove it to start anew", field="state")
            start = f"{name}/"
            drafter.load_state_dict({key[len(start) :]: value for key, value in state.items() if key.startswith(start)})

    # --- everything else ---

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; text that looks like a special token stays text unless `special`.

        Raises ConfigError when the text exceeds `limits.prompt_chars` or the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError(f"model {self.name!r} has no tokenizer", hint="pass token ids", field="prompt")
        if len(text) > LIMITS.prompt_chars:
            raise out_of_range("prompt", f"{len(text)} characters", f"at most {LIMITS.prompt_chars} characters")
        return self.tokenizer.encode(text, special=special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids."""
        if self.tokenizer is None:
            raise ConfigError(f"model {self.name!r} has no tokenizer", field="tokenizer")
        return self.tokenizer.decode(list(ids), skip_special=skip_special)

    def _text_ids(self, text: Prompt) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        if self.tokenizer is None:
            raise ConfigError(f"model {self.name!r} has no tokenizer", hint="pass token ids", field="text")
        return self.tokenizer.encode(text, bos=False)

    def score(self, prompt: Prompt, text: Prompt) -> Score:
        """Log-probabilities of `text` after `prompt` under the model's raw distribution (text tokenised on its own)."""
        from hasten.scoring import score

        before = self._ids(prompt)
        after = self._text_ids(text)
        if not after:
            raise ConfigError("text is empty; text must hold at least one token", field="text")
        logprobs = score(self.model, self.engine.scheduler.pool, [*before, *after], len(before))
        return Score(tuple(after), tuple(logprobs), sum(logprobs))

    def embed(self, texts: str | Sequence[Prompt], *, pooling: str = "mean", normalize: bool = True) -> Tensor:
        """Embeddings float32 [N, hidden] of texts or token ids: the mean of the final hidden states, or the last one.

        `normalize` scales each to length 1. Raises ConfigError, ContextLengthError naming the text's length.
        """
        import torch

        from hasten.scoring import finish, pooled

        if pooling not in ("mean", "last"):
            raise out_of_range("pooling", pooling, "mean or last")
        out = []
        for text in [texts] if isinstance(texts, str) else texts:
            work = pooled(self.model, self.engine.scheduler.pool, self._ids(text), last=pooling == "last")
            out.append(finish(work))
        if not out:
            raise ConfigError("texts is empty; texts must hold at least one text", field="texts")
        stacked = torch.stack(out)
        return torch.nn.functional.normalize(stacked, dim=-1) if normalize else stacked

    def info(self) -> dict[str, Any]:
        """Facts about the loaded model, JSON-ready: name, source, parameters, dtype, bytes, window, threads, backbone."""
        import torch

        caps = self.model.capabilities
        config = getattr(self.model, "config", None)
        return {
            "model": self.name,
            "source": self.source,
            "family": getattr(config, "family", caps.kind),
            "parameters": getattr(config, "parameters", None),
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": self.bytes,
            "window": caps.max_len,
            "vocabulary": caps.vocab_size,
            "cache_bytes": self.engine.scheduler.pool.budget_bytes,
            "threads": torch.get_num_threads(),
            "backbone": self.model.name,
        }


def _identity(loaded: Loaded) -> str:
    """What tells this model from any other, and from itself with other rounding."""
    weights = getattr(loaded.model, "weights", None)
    layouts = [] if weights is None else sorted({str(matrix.layout) for matrix in weights.matrices.values()})
    return f"{loaded.source} {loaded.dtype} {getattr(loaded.model, 'activations', 'exact')} {layouts}"
