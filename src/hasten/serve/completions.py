"""POST /v1/completions: text or token ids in, text out; with `echo` and `logprobs` the scores of a prompt.

That is what evaluation harnesses ask of a server: `max_tokens` 0 or 1, `echo`, `logprobs`, prompts as token ids.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Generator, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, ContextLengthError, IncompatibleError, out_of_range
from hasten.serve import generation
from hasten.serve.access import Account, account
from hasten.serve.chat import Head
from hasten.serve.generation import Job
from hasten.serve.protocol import CompletionBody
from hasten.serve.sse import EventStream
from hasten.types import Event, Output, TokenLogprob

if TYPE_CHECKING:
    from hasten.llm import LLM
    from hasten.serve.worker import Worker

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def complete(body: CompletionBody, request: Request) -> Response:
    """Continuations of prompts; as server-sent events with `stream`."""
    worker, head = request.app.state.worker, Head(f"cmpl-{secrets.token_hex(12)}", int(time.time()), body.model)
    prompts = listed(body.prompt)
    if body.max_tokens == 0:
        work = scored(worker, body, prompts, head, account(request.scope))
        return JSONResponse(await generation.until_gone(request, work))
    if len(prompts) > LIMITS.served_queue:  # the queue takes all or none, so that trying again would not help
        raise out_of_range("prompt", f"{len(prompts)} of them", f"1 to {LIMITS.served_queue} texts to continue")
    job = await generation.begin(
        worker,
        request,
        body,
        lambda llm: [ids(llm, prompt) for prompt in prompts],
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        form=generation.form(body, None),
        suffix=body.suffix,
    )
    if body.stream:
        return EventStream(chunks(job, body, prompts, head), job.answer.cancel, {"X-Hasten-Method": ",".join(job.method)})
    try:
        outputs = await generation.until_gone(request, job.outputs())
        read: list[list[TokenLogprob]] = []
        if body.echo and body.logprobs is not None:
            judged = scores(worker, job.model, [one.prompt for one in job.requests], body.logprobs)
            read = await generation.until_gone(request, judged)
    finally:
        job.answer.cancel()
    choices = []
    for index, output in enumerate(outputs):
        at = index // job.choices
        before = echoed(job.llm, prompts[at], job.requests[at].prompt) if body.echo else ""
        entries = [*(read[at] if read else ()), *(output.logprobs or ())] if body.logprobs is not None else None
        first = job.requests[at].prompt[0] if read else None
        choices.append(choice(job.llm, index, before + output.text, entries, first, output.finish_reason))
    content = {
        **head.json("text_completion"),
        "choices": choices,
        "usage": generation.usage_json(job.requests, outputs),
        "hasten": generation.extension(outputs),
    }
    return JSONResponse(content, headers=generation.headers(outputs))


def listed(given: str | list[str] | list[int] | list[list[int]], field: str = "prompt") -> list[str | list[int]]:
    """The prompts of a body, one or many; raises ConfigError, naming `field`, for none, too many or an empty one."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        many: list[Any] = [given]
    else:
        many = list(given)
    if not 1 <= len(many) <= LIMITS.served_inputs:
        raise out_of_range(field, f"{len(many)} of them", f"1 to {LIMITS.served_inputs} texts")
    if not all(many):
        raise ConfigError(f"{field} has an empty text; each must hold at least one character or token", field=field)
    return many


def ids(llm: LLM, given: str | Sequence[int], field: str = "prompt") -> list[int]:
    """Token ids of one prompt; raises ConfigError, naming `field`, for ids outside the vocabulary."""
    if isinstance(given, str):
        return llm.encode(given)
    vocabulary = llm.model.capabilities.vocab_size
    if max(given) >= vocabulary:
        raise out_of_range(field, max(given), f"token ids below the vocabulary of {vocabulary}")
    return list(given)


def echoed(llm: LLM, given: str | list[int], prompt: Sequence[int]) -> str:
    """The text that `echo` repeats: the prompt as it was given, token ids decoded."""
    return given if isinstance(given, str) else llm.decode(prompt, skip_special=False)


def choice(
    llm: LLM,
    index: int,
    text: str,
    entries: Sequence[TokenLogprob] | None,
    first: int | None,
    reason: str | None,
    start: int = 0,
) -> dict[str, Any]:
    """One choice; `first` is the prompt's first token, which nothing comes before and which has no probability.

    `start`: characters of the choice that were sent before.
    """
    found = None
    if entries is not None:
        tokens = ([] if first is None else [first]) + [one.token for one in entries]
        none: list[None] = [] if first is None else [None]
        found = {
            "tokens": [generation.piece(llm, token) for token in tokens],
            "token_logprobs": [*none, *(one.logprob for one in entries)],
            "top_logprobs": [*none, *(_best(llm, one) for one in entries)],
            "text_offset": [*accumulate((_width(llm, token) for token in tokens), initial=start)][: len(tokens)],
        }
    return {"index": index, "text": text, "logprobs": found, "finish_reason": reason}


def _width(llm: LLM, token: int) -> int:
    return len(generation.token_bytes(llm, token).decode("utf-8", "replace"))


def _best(llm: LLM, one: TokenLogprob) -> dict[str, float]:
    """The alternatives of a token, best first; of two that are written alike, the better one."""
    out: dict[str, float] = {}
    for token, value in one.top:
        out.setdefault(generation.piece(llm, token), value)
    return out


async def scores(worker: Worker, model: str, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprob]]:
    """Log-probabilities of every prompt's tokens but the first, with the `top` best alternatives of each."""
    if worker.llm(model).model.capabilities.kind == "masked":
        raise IncompatibleError("a model that fills canvases has no left-to-right probabilities", field="logprobs")
    out: list[list[TokenLogprob]] = []
    for prompt in prompts:
        work = partial(_judge, prompt=prompt, top=top)
        try:
            out.append(await worker.call(model, work))
        except ContextLengthError as error:
            raise ContextLengthError(error.message, hint=error.hint, field="prompt") from None
    return out


def _judge(llm: LLM, prompt: Sequence[int], top: int) -> Generator[None, None, list[TokenLogprob]]:
    from hasten.scoring import judge

    yield from room(llm, len(prompt))
    return (yield from judge(llm.model, llm.engine.scheduler.pool, prompt, 1, top))


def room(llm: LLM, tokens: int) -> Generator[None, None, None]:
    """Wait, turn by turn, until the cache has room for a text that fits when others have ended."""
    pool = llm.engine.scheduler.pool
    while not pool.fits(tokens) and pool.could_ever_fit(tokens) and llm.engine.scheduler.running:
        yield


async def scored(worker: Worker, body: CompletionBody, prompts: Sequence[Any], head: Head, own: Account) -> dict[str, Any]:
    """The answer to max_tokens = 0: prompts echoed, with their log-probabilities where they are asked for."""
    model = own.model = generation.resolve(worker, body.model)
    llm = worker.llm(model)
    if body.n != 1 or body.stream or body.suffix is not None:
        raise ConfigError("max_tokens = 0 gives one answer, not streamed, without a suffix", field="max_tokens")
    made = await worker.prepare(lambda: [ids(llm, prompt) for prompt in prompts])
    read = await scores(worker, model, made, body.logprobs) if body.logprobs is not None else None
    count = own.prompt_tokens = sum(map(len, made))
    return {
        **head.json("text_completion"),
        "choices": [
            choice(llm, i, echoed(llm, given, one), read[i] if read else None, one[0] if read else None, "length")
            for i, (given, one) in enumerate(zip(prompts, made, strict=True))
        ],
        "usage": {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count},
    }


async def chunks(job: Job, body: CompletionBody, prompts: Sequence[Any], head: Head) -> AsyncIterator[dict[str, Any]]:
    """The answer as chunks: prompts first where they are echoed, then what every step commits."""
    start = head.json("text_completion")
    usage = body.stream_options is not None and body.stream_options.include_usage
    rest: dict[str, Any] = {"usage": None} if usage else {}
    sent = [0] * (len(job.requests) * job.choices)
    if body.echo:
        for index in range(len(sent)):
            at = index // job.choices
            text = echoed(job.llm, prompts[at], job.requests[at].prompt)
            sent[index] = len(text)
            yield {**start, "choices": [choice(job.llm, index, text, None, None, None)], **rest}
    outputs: list[Output] = []
    async for index, events in job.steps():
        outputs += [event.output for event in events if event.output is not None]
        part = delta(job, events, index, sent[index])
        sent[index] += sum(_width(job.llm, event.logprob.token) for event in events if event.logprob is not None)
        extra = generation.chunk_extension(job.llm, body.hasten, events, index)
        if part is not None or extra is not None:
            yield {**start, "choices": [part] if part else [], **rest, **({"hasten": extra} if extra else {})}
    if usage:
        yield {**start, "choices": [], "usage": generation.usage_json(job.requests, outputs)}


def delta(job: Job, events: Sequence[Event], index: int, sent: int) -> dict[str, Any] | None:
    """The choice of a chunk, after `sent` characters; None when nothing is new."""
    text = "".join(event.text for event in events if event.kind == "commit")
    entries = [event.logprob for event in events if event.logprob is not None]
    reason = next((event.output.finish_reason for event in events if event.output is not None), None)
    if not text and not entries and reason is None:
        return None
    return choice(job.llm, index, text, entries or None, None, reason, sent)
