"""POST /v1/chat/completions."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hasten.errors import IncompatibleError
from hasten.serve import generation
from hasten.serve.generation import Job
from hasten.serve.protocol import ChatBody, ResponseFormat
from hasten.serve.sse import EventStream
from hasten.serve.tools import Offer, ToolCallParser, assembled, read_tools
from hasten.types import Event, Grammar, Output

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatBody, request: Request) -> Response:
    """The assistant's next message; as server-sent events with `stream`."""
    worker = request.app.state.worker
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    for place in body.images():  # no model of this version has eyes; what a request shows it is not dropped in silence
        raise IncompatibleError(f"model {body.model!r} reads text only", hint="leave the images out", field=place)
    offer = read_tools(body.tools or None, body.tool_choice if body.tools else None, body.parallel_tool_calls)
    tools, asked = None if offer is None else offer.for_template(), grammar(body.response_format)
    job = await generation.begin(
        worker,
        request,
        body,
        lambda llm: [llm.chat_ids(messages, tools, body.chat_template_kwargs)],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        form=generation.form(body, asked, offer),
        label=body.prompt_cache_key,
    )
    formed = asked is not None
    head = Head(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), body.model)
    if body.stream:
        return EventStream(
            chunks(job, body, head, offer, formed), job.answer.cancel, {"X-Hasten-Method": ",".join(job.method)}
        )
    try:
        outputs = await generation.until_gone(request, job.outputs())
    finally:
        job.answer.cancel()
    content = {
        **head.json("chat.completion"),
        "choices": [choice(job, output, offer, formed) for output in outputs],
        "usage": generation.usage_json(job.requests, outputs),
        "hasten": generation.extension(outputs),
    }
    return JSONResponse(content, headers=generation.headers(outputs))


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one answer begins with."""

    id: str
    created: int
    model: str

    def json(self, kind: str) -> dict[str, Any]:
        """The head as fields of an object of this kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def grammar(asked: ResponseFormat | None) -> Grammar | None:
    """The grammar that a response_format stands for."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object" or asked.json_schema is None:
        return Grammar("json_object")
    schema = asked.json_schema.schema_
    return Grammar("json_schema", json.dumps({} if schema is None else schema, ensure_ascii=False))


def reader(job: Job, offer: Offer, index: int, formed: bool) -> ToolCallParser:
    """What reads the calls in one choice's text; ids of calls repeat when an answer is repeated with its seed."""
    request = job.requests[0]
    seed = job.answer.number if request.sampling.seed is None else request.sampling.seed
    key = hashlib.sha256(repr((seed, request.prompt)).encode()).hexdigest()
    return ToolCallParser(offer, key, index, formed=formed)


def choice(job: Job, output: Output, offer: Offer | None, formed: bool) -> dict[str, Any]:
    """One finished choice."""
    found = None
    if output.logprobs is not None:
        found = {"content": [generation.logprob_json(job.llm, one) for one in output.logprobs], "refusal": None}
    message, reason = {"content": output.text}, str(output.finish_reason)
    if offer is not None:
        parser = reader(job, offer, output.choice, formed)
        deltas = parser.push(output.text)
        last, reason = parser.finish(output.finish_reason)
        message = assembled([*deltas, *last])
    return {
        "index": output.choice,
        "message": {"role": "assistant", **message, "refusal": None},
        "logprobs": found,
        "finish_reason": reason,
    }


async def chunks(job: Job, body: ChatBody, head: Head, offer: Offer | None, formed: bool) -> AsyncIterator[dict[str, Any]]:
    """The answer as chunks: roles first, then what every step commits, then the counts where they were asked for."""
    start = head.json("chat.completion.chunk")
    usage = body.stream_options is not None and body.stream_options.include_usage
    rest: dict[str, Any] = {"usage": None} if usage else {}
    parsers = [None if offer is None else reader(job, offer, index, formed) for index in range(job.choices)]
    for index in range(job.choices):
        first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield {**start, "choices": [first], **rest}
    outputs: list[Output] = []
    async for index, events in job.steps():
        parts = deltas(job, events, index, parsers[index])
        extra = generation.chunk_extension(job.llm, body.hasten, events, index)
        outputs += [event.output for event in events if event.output is not None]
        for part in parts[:-1]:
            yield {**start, "choices": [part], **rest}
        if parts or extra is not None:
            yield {**start, "choices": parts[-1:], **rest, **({"hasten": extra} if extra else {})}
    if usage:
        yield {**start, "choices": [], "usage": generation.usage_json(job.requests, outputs)}


def deltas(job: Job, events: Sequence[Event], index: int, parser: ToolCallParser | None) -> list[dict[str, Any]]:
    """What one step adds to a choice, as choices of chunks: text or calls, log-probabilities, the reason of the end."""
    text = "".join(event.text for event in events if event.kind == "commit")
    found = [generation.logprob_json(job.llm, event.logprob) for event in events if event.logprob is not None]
    ended = next((event.output.finish_reason for event in events if event.output is not None), None)
    reason: str | None = ended
    plain: list[dict[str, Any]] = [{"content": text}] if text else []
    new = plain if parser is None else parser.push(text)
    if parser is not None and ended is not None:
        last, reason = parser.finish(ended)
        new += last
    if not new and (found or reason is not None):
        new = [{}]
    out: list[dict[str, Any]] = [{"index": index, "delta": one, "logprobs": None, "finish_reason": None} for one in new]
    if out:
        out[0]["logprobs"] = {"content": found, "refusal": None} if found else None
        out[-1]["finish_reason"] = reason
    return out
