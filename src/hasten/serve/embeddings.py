"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from hasten.errors import ContextLengthError, out_of_range
from hasten.serve import generation
from hasten.serve.access import account
from hasten.serve.completions import ids, listed, room
from hasten.serve.protocol import EmbeddingBody

if TYPE_CHECKING:
    from hasten.llm import LLM

router = APIRouter()


@router.post("/v1/embeddings", response_model=None)
async def embed(body: EmbeddingBody, request: Request) -> JSONResponse:
    """One vector per input: the final hidden states' mean, or the last token's, of length 1."""
    worker, own = request.app.state.worker, account(request.scope)
    model = own.model = generation.resolve(worker, body.model)
    llm = worker.llm(model)
    made = await worker.prepare(lambda: [ids(llm, text, "input") for text in listed(body.input, "input")])
    own.prompt_tokens = sum(map(len, made))
    work = worker.call(model, lambda loaded: vectors(loaded, made, body))
    try:
        found = await generation.until_gone(request, work)
    except ContextLengthError as error:
        raise ContextLengthError(error.message, hint=error.hint, field="input") from None
    data = [{"object": "embedding", "index": i, "embedding": _written(v, body)} for i, v in enumerate(found)]
    usage = {"prompt_tokens": own.prompt_tokens, "total_tokens": own.prompt_tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


def vectors(llm: LLM, texts: Sequence[Sequence[int]], body: EmbeddingBody) -> Generator[None, None, list[Any]]:
    """The vectors of token ids, float32 [hidden] each; yields between chunks, so that other requests go on."""
    from hasten.scoring import pooled

    out = []
    for one in texts:
        yield from room(llm, len(one))
        state = yield from pooled(llm.model, llm.engine.scheduler.pool, one, last=body.hasten.pooling == "last")
        vector = state.numpy()
        if body.dimensions is not None and body.dimensions > len(vector):
            raise out_of_range("dimensions", body.dimensions, f"at most the model's {len(vector)}")
        vector = vector[: body.dimensions]
        if body.hasten.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        out.append(vector)
        yield
    return out


def _written(vector: Any, body: EmbeddingBody) -> str | list[float]:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
