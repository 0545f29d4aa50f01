"""The ASGI application: routes over a worker, behind the gate, with every error in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hasten import __version__
from hasten.engine.limits import LIMITS
from hasten.errors import HastenError
from hasten.serve import chat, completions, embeddings, errors, metrics, models, page
from hasten.serve.access import Access
from hasten.serve.metrics import Metrics
from hasten.serve.security import Gate
from hasten.serve.settings import Settings
from hasten.serve.worker import Worker


def build_app(worker: Worker, settings: Settings, *, drain_s: float = LIMITS.drain_s) -> FastAPI:
    """The application that serves `worker`; it starts the worker with itself and drains it at its end."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop(drain_s)

    # FastAPI can send traces where its environment says; nothing leaves this machine but answers.
    silent: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
    app = FastAPI(title="hasten", version=__version__, docs_url=None, redoc_url=None, lifespan=life, telemetry=silent)
    app.state.worker = worker
    app.state.metrics = Metrics(worker)
    worker.observe.append(app.state.metrics.watch)
    for part in (chat, completions, embeddings, models, metrics, page):
        app.include_router(part.router)
    app.add_exception_handler(HastenError, _fail)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(Access, metrics=app.state.metrics)
    return app


async def _fail(request: Request, error: Exception) -> Response:
    return errors.respond(error)


async def _malformed(request: Request, error: Exception) -> Response:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    return errors.invalid_body(problems)


async def _http(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, a method it does not have, a body that cannot be read."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    texts = {404: "there is no such route", 405: "the route does not have this method"}
    text = texts.get(status, "the request cannot be read")
    return errors.answer(status, errors.shape(status, text, code="bad_request" if status == 400 else None))
