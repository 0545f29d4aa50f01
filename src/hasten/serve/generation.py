"""From the body of a request to engine requests, and from their events to what chat and completions have in common."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request as HttpRequest

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, IncompatibleError, UnknownNameError, out_of_range
from hasten.serve.access import Account, account
from hasten.serve.errors import ApiError
from hasten.serve.protocol import Extension, Sampling
from hasten.serve.tools import Offer, tool_grammar
from hasten.serve.worker import Answer, Worker
from hasten.types import MAX_SEED, Event, Grammar, Output, Request, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from hasten.engine.contracts import LogitsRule
    from hasten.llm import LLM

T = TypeVar("T")
# Event.code -> (HTTP status, code); a rule is the request's own: nothing can follow, or it costs too much.
_FAILURES = {"deadline": (504, "deadline"), "rule": (400, "grammar_failed"), "engine": (500, "engine_error")}


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request made ready: the model it resolved to, and the answer that its engine requests will give."""

    model: str
    llm: LLM
    answer: Answer
    requests: tuple[Request, ...]
    method: tuple[str, ...]
    account: Account

    @property
    def choices(self) -> int:
        """Choices of each request."""
        return self.requests[0].sampling.n

    async def steps(self) -> AsyncIterator[tuple[int, list[Event]]]:
        """(index of a choice over all requests, its events of one step), in the order in which they happen.

        Raises ApiError when a choice fails or runs out of time.
        """
        async for request, events in self.answer:
            by_choice: dict[int, list[Event]] = {}
            for event in events:
                by_choice.setdefault(event.choice, []).append(event)
            for choice, own in by_choice.items():
                for event in own:
                    if event.output is not None:
                        self.account.ended(event.output)
                    failed(event)
                yield request * self.choices + choice, own

    async def outputs(self) -> list[Output]:
        """All choices when they have ended, by index."""
        done: dict[int, Output] = {}
        async for index, events in self.steps():
            done.update((index, event.output) for event in events if event.output is not None)
        return [done[index] for index in sorted(done)]


def failed(event: Event) -> None:
    """Raise ApiError for an event that says that its choice has failed or was given up."""
    if event.kind == "error":
        status, code = _FAILURES[event.code]
        raise ApiError(status, event.text, code=code)
    if event.output is not None and event.output.finish_reason == "abort":
        raise ApiError(504, "the request was given up before it ended", code="aborted")


def resolve(worker: Worker, name: str) -> str:
    """The model that a body names; raises ApiError 404 as OpenAI's API does."""
    try:
        return worker.resolve(name)
    except UnknownNameError as error:
        raise ApiError(404, error.message, code="model_not_found", field="model", hint=error.hint) from None


def tenant(request: HttpRequest, label: str | None = None) -> str:
    """What keeps cached prefixes apart: the key's name, and the label that the caller gives."""
    own = str(request.scope.get("hasten.tenant", ""))
    return own if label is None else hashlib.sha256(json.dumps([own, label]).encode()).hexdigest()[:32]


async def begin(
    worker: Worker,
    http: HttpRequest,
    body: Sampling,
    prompts: Callable[[LLM], Sequence[Sequence[int]]],
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    form: Form | None = None,
    suffix: str | None = None,
    label: str | None = None,
) -> Job:
    """Make engine requests of a body and queue them. `prompts` makes token ids, off the event loop.

    Raises ApiError (404) and whatever the parts of a request are refused with.
    """
    own = account(http.scope)
    model = own.model = resolve(worker, body.model)
    llm = worker.llm(model)
    names = methods(body.hasten.method) or worker.settings.method
    masked = llm.model.capabilities.kind == "masked"
    if masked:
        _refuse_for_canvas(logprobs, form)
    elif suffix is not None:
        raise IncompatibleError("suffix needs a model that fills canvases", field="suffix")
    rules = () if form is None else (await worker.prepare(form.compile, llm),)
    owner, grammar = tenant(http, label), None if form is None else form.grammar

    def requests() -> tuple[Request, ...]:
        out = []
        for ids in prompts(llm):
            params = _sampling(body, llm, max_tokens, logprobs, len(ids))
            template = None
            if suffix is not None:
                after = llm.encode(suffix) if llm.tokenizer is None else llm.tokenizer.encode(suffix, bos=False)
                template = (*[-1] * (max_tokens or llm.model.capabilities.canvas or LIMITS.canvas), *after)
                params = replace(params, max_tokens=None)
            out.append(Request(tuple(ids), params, names, template=template, grammar=grammar, tenant=owner))
        return tuple(out)

    made = await worker.prepare(requests)
    own.method, own.prompt_tokens = names, sum(len(one.prompt) for one in made)
    answer = await worker.submit(model, made, rules, provisional=body.hasten.provisional)
    return Job(model, llm, answer, made, names, own)


def methods(given: str | Sequence[str]) -> tuple[str, ...]:
    """Method names of a request; raises ConfigError for names that are too long or too many."""
    names = (given,) if isinstance(given, str) else tuple(given)
    if len(names) > 16 or any(not name or len(name) > 256 for name in names):
        raise out_of_range("hasten.method", f"{len(names)} names", "up to 16 names of 1 to 256 characters")
    return names


def _sampling(body: Sampling, llm: LLM, max_tokens: int | None, logprobs: int | None, prompt: int) -> SamplingParams:
    """Sampling parameters of a body; without max_tokens, what the window and the server's limit leave."""
    caps = llm.model.capabilities
    if max_tokens is None and caps.kind != "masked":
        max_tokens = max(1, min(LIMITS.served_tokens, caps.max_len - prompt))
    bias: dict[int, float] = {}
    for key, value in body.logit_bias.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise out_of_range("logit_bias", key[:40], "token ids as keys")
        bias[int(key)] = value
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.hasten.top_k,
        min_p=body.hasten.min_p,
        repetition_penalty=body.hasten.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        ignore_eos=body.hasten.ignore_eos,
        seed=None if body.seed is None else body.seed & MAX_SEED,
        n=body.n,
        logprobs=logprobs,
    )


def _refuse_for_canvas(logprobs: int | None, form: Form | None) -> None:
    """What has no meaning on a canvas is refused, not dropped."""
    if form is not None:
        raise IncompatibleError(
            "grammars work from left to right; this model fills a canvas, whose grammars hasten does not have yet",
            hint="ask a left-to-right model, or leave response_format, tools and grammars out",
            field=form.field,
        )
    if logprobs is not None:
        raise IncompatibleError("a model that fills canvases has no left-to-right probabilities", field="logprobs")


@dataclass(frozen=True, slots=True)
class Form:
    """The form of an answer, and the field that asked for it: what is wrong with the grammar is said of that field.

    `parts`: fields and grammars that it was put together from; a fault of one of them is said of that one.
    """

    grammar: Grammar
    field: str
    parts: tuple[tuple[str, Grammar], ...] = ()

    def compile(self, llm: LLM) -> LogitsRule:
        """The rule of the form for a model; raises ConfigError naming the field and, for tools, whose schema it is."""
        try:
            return llm.compile(self.grammar)
        except ConfigError as error:
            for path, grammar in self.parts:
                try:
                    llm.compile(grammar)
                except ConfigError as own:
                    raise ConfigError(f"{path}: {own.message}", hint=own.hint, field=path) from None
            raise type(error)(error.message, hint=error.hint, field=self.field) from None


def form(body: Sampling, asked: Grammar | None, offer: Offer | None = None) -> Form | None:
    """The one form that a body asks for, by response_format with tools or by the extension; raises ConfigError for two."""
    own, forms = body.hasten, list[Form]()
    if offer is not None:
        schemas = [(path, Grammar.json_schema(dict(schema))) for path, schema in offer.schemas()]
        parts = schemas if asked is None else [("response_format", asked), *schemas]
        whole = tool_grammar(offer, asked)
        forms += [Form(whole, "tools", tuple(parts))] if whole is not None else []
    elif asked is not None:
        forms.append(Form(asked, "response_format"))
    if own.regex is not None:
        forms.append(Form(Grammar.regex(own.regex), "hasten.regex"))
    if own.lark is not None:
        forms.append(Form(Grammar.lark(own.lark), "hasten.lark"))
    if own.choice is not None:
        forms.append(Form(Grammar.choice(own.choice), "hasten.choice"))
    if len(forms) > 1:
        raise ConfigError(
            f"{forms[0].field} and {forms[1].field} both say what the answer looks like", field=forms[1].field
        )
    return forms[0] if forms else None


# --- what goes back ---


def piece(llm: LLM, token: int) -> str:
    """The text of one token; "bytes:\\x.." where it is no whole text, as OpenAI's API writes it."""
    raw = token_bytes(llm, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_bytes(llm: LLM, token: int) -> bytes:
    """The bytes of one token; its number where the model has no tokenizer."""
    return str(token).encode() if llm.tokenizer is None else llm.tokenizer.token_bytes(token)


def logprob_json(llm: LLM, one: TokenLogprob) -> dict[str, Any]:
    """One entry of a chat answer's logprobs."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": piece(llm, token), "logprob": max(value, -9999.0), "bytes": list(token_bytes(llm, token))}

    return {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]}


def usage_json(requests: Sequence[Request], outputs: Sequence[Output]) -> dict[str, Any]:
    """Token counts of a whole answer: every prompt once, every choice's tokens."""
    prompt = sum(len(request.prompt) for request in requests)
    completion = sum(output.usage.completion_tokens for output in outputs)
    cached = sum(output.usage.cached_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
    }


def cost(outputs: Sequence[Output]) -> dict[str, Any]:
    """What the choices cost: sums over them, and ratios of the sums."""
    names = ("forwards", "computed_tokens", "drafted_tokens", "accepted_tokens", "prefill_s", "decode_s", "draft_s")
    sums: dict[str, Any] = {name: sum(getattr(output.usage, name) for output in outputs) for name in names}
    decoded = sum(output.usage.decoded for output in outputs)
    sums["tokens_per_forward"] = decoded / sums["forwards"] if sums["forwards"] else 0.0
    sums["tokens_per_s"] = decoded / sums["decode_s"] if sums["decode_s"] > 0 else 0.0
    return sums


def extension(outputs: Sequence[Output]) -> dict[str, Any]:
    """The `hasten` object of an answer."""
    first = outputs[0]
    return {"usage": cost(outputs), "method": list(first.method), "seed": first.seed}


def headers(outputs: Sequence[Output]) -> dict[str, str]:
    """The trace of an answer as headers."""
    spent = cost(outputs)
    drafted = spent["drafted_tokens"]
    return {
        "X-Hasten-Method": ",".join(outputs[0].method),
        "X-Hasten-Seed": str(outputs[0].seed),
        "X-Hasten-Forwards": str(spent["forwards"]),
        "X-Hasten-Tokens-Per-Forward": f"{spent['tokens_per_forward']:.3f}",
        "X-Hasten-Acceptance": f"{spent['accepted_tokens'] / drafted if drafted else 0.0:.3f}",
    }


def event_json(llm: LLM, event: Event, choice: int) -> dict[str, Any]:
    """One event of the trace, with the texts of its tokens; what does not apply is left out."""
    out: dict[str, Any] = {"kind": event.kind, "choice": choice, "step": event.step, "t": round(event.time_s, 6)}
    if event.position >= 0:
        out["position"] = event.position
    if event.token >= 0:
        out |= {"token": event.token, "piece": piece(llm, event.token)}
    if event.confidence == event.confidence:
        out["confidence"] = round(event.confidence, 5)
    if event.tokens:
        out |= {"tokens": list(event.tokens), "pieces": [piece(llm, token) for token in event.tokens]}
        out["parents"] = list(event.parents)
    for name in ("text", "total", "backbone"):
        value = getattr(event, name)
        if value:
            out[name] = value
    return out


async def until_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone", code="client_gone")
        return task.result()
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()


def chunk_extension(llm: LLM, body: Extension, events: Sequence[Event], choice: int) -> dict[str, Any] | None:
    """The `hasten` object of a stream's chunk: the trace where it was asked for, and the cost with the last events."""
    out: dict[str, Any] = {}
    if body.trace:
        shown = [e for e in events if e.kind != "propose" or body.provisional]
        out["events"] = [event_json(llm, event, choice) for event in shown]
    done = [event.output for event in events if event.output is not None]
    if done:
        out |= extension(done)
    return out or None
