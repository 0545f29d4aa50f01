"""GET /v1/models, /hasten/methods, /health and /ready: what is served, what it can do, and whether it can now."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from hasten import registry
from hasten.serve import generation
from hasten.serve.worker import Worker

router = APIRouter()
_STARTED = int(time.time())


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models of this server, aliases included."""
    worker = request.app.state.worker
    return {"object": "list", "data": [entry(worker, name) for name in (*worker.names, *worker.settings.aliases)]}


@router.get("/v1/models/{model}")
async def model(model: str, request: Request) -> dict[str, Any]:
    """One model."""
    worker = request.app.state.worker
    generation.resolve(worker, model)
    return entry(worker, model)


def entry(worker: Worker, name: str) -> dict[str, Any]:
    """A model as /v1/models lists it; what hasten knows of it once it is loaded."""
    own = worker.resolve(name)
    out: dict[str, Any] = {"id": name, "object": "model", "created": _STARTED, "owned_by": "hasten"}
    if worker.state == "ready":
        llm = worker.llm(own)
        facts = llm.info()
        kept = ("family", "parameters", "dtype", "window", "vocabulary", "backbone", "threads")
        chat = llm.tokenizer is not None and llm.tokenizer.chat_template is not None
        out["hasten"] = {
            "kind": llm.model.capabilities.kind,
            "alias_of": own if own != name else None,
            "chat": chat,
            **{key: facts[key] for key in kept},
        }
    return out


@router.get("/hasten/methods")
def methods() -> dict[str, Any]:
    """The catalog: every method and work with its state, which fields a search reads and what a hit is worth, presets."""
    return registry.served()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the server works (a draining one still does), 503 while it loads and after its engine has ended."""
    state = request.app.state.worker.state
    return JSONResponse({"status": state}, 200 if state in ("ready", "draining") else 503)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 when requests are taken, with rows running and requests waiting; else 503."""
    worker = request.app.state.worker
    running, waiting = worker.load()
    body = {"status": worker.state, "running": running, "waiting": waiting}
    return JSONResponse(body, 200 if worker.state == "ready" else 503)
