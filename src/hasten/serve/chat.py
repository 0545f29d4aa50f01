"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hasten.serve import generation
from hasten.serve.generation import Job
from hasten.serve.protocol import ChatBody, ResponseFormat
from hasten.serve.sse import EventStream
from hasten.types import Event, Grammar, Output

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatBody, request: Request) -> Response:
    """The assistant's next message; as server-sent events with `stream`."""
    worker = request.app.state.worker
    messages = [plain(message.model_dump(exclude_none=True)) for message in body.messages]
    job = await generation.begin(
        worker,
        request,
        body,
        lambda llm: [llm.chat_ids(messages)],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=generation.grammar(body, form(body.response_format)),
        label=body.prompt_cache_key,
    )
    head = Head(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), body.model)
    if body.stream:
        return EventStream(chunks(job, body, head), job.answer.cancel, {"X-Hasten-Method": ",".join(job.method)})
    try:
        outputs = await generation.until_gone(request, job.outputs())
    finally:
        job.answer.cancel()
    content = {
        **head.json("chat.completion"),
        "choices": [choice(job, output) for output in outputs],
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


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one string."""
    content = message.get("content", "")
    if isinstance(content, list):
        message["content"] = "".join(part["text"] for part in content)
    return message


def form(asked: ResponseFormat | None) -> Grammar | None:
    """The grammar that a response_format stands for."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object" or asked.json_schema is None:
        return Grammar("json_object")
    schema = asked.json_schema.schema_
    return Grammar("json_schema", json.dumps({} if schema is None else schema, ensure_ascii=False))


def choice(job: Job, output: Output) -> dict[str, Any]:
    """One finished choice."""
    found = None
    if output.logprobs is not None:
        found = {"content": [generation.logprob_json(job.llm, one) for one in output.logprobs], "refusal": None}
    return {
        "index": output.choice,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": found,
        "finish_reason": output.finish_reason,
    }


async def chunks(job: Job, body: ChatBody, head: Head) -> AsyncIterator[dict[str, Any]]:
    """The answer as chunks: roles first, then what every step commits, then the counts where they were asked for."""
    start = head.json("chat.completion.chunk")
    usage = body.stream_options is not None and body.stream_options.include_usage
    rest: dict[str, Any] = {"usage": None} if usage else {}
    for index in range(job.choices):
        first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield {**start, "choices": [first], **rest}
    outputs: list[Output] = []
    async for index, events in job.steps():
        part = delta(job, events, index)
        extra = generation.chunk_extension(job.llm, body.hasten, events, index)
        outputs += [event.output for event in events if event.output is not None]
        if part is not None or extra is not None:
            yield {**start, "choices": [part] if part else [], **rest, **({"hasten": extra} if extra else {})}
    if usage:
        yield {**start, "choices": [], "usage": generation.usage_json(job.requests, outputs)}


def delta(job: Job, events: Sequence[Event], index: int) -> dict[str, Any] | None:
    """The choice of a chunk: new text, its log-probabilities, the reason of the end; None when there is none of these."""
    text = "".join(event.text for event in events if event.kind == "commit")
    logprobs = [generation.logprob_json(job.llm, event.logprob) for event in events if event.logprob is not None]
    reason = next((event.output.finish_reason for event in events if event.output is not None), None)
    if not text and not logprobs and reason is None:
        return None
    return {
        "index": index,
        "delta": {"content": text} if text else {},
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        "finish_reason": reason,
    }
