"""What runs in a replica: the server's own application for each model it holds, answering relayed requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError
from hasten.serve.asgi import answer, exchange, http_scope, reason
from hasten.serve.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from hasten.serve.worker import Worker


class Replica:
    """Holds models, each with its engine and its application. `spec` is made of plain values: `models` (name -> what
    hasten.load takes), `load` (its options), `settings` (fields of Settings), `replicas` (how many share the memory),
    `closed` (whether the cluster is of this machine alone)."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.workers: dict[str, Worker] = {}
        self._apps: dict[str, FastAPI] = {}
        self._stack = AsyncExitStack()

    async def open(self, name: str) -> FastAPI:
        """The application that serves the model `name`, once it is loaded; raises HastenError when it cannot be."""
        from hasten.serve.app import build_app
        from hasten.serve.run import opened
        from hasten.serve.worker import Worker

        given = dict(self.spec["settings"])
        given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        settings = Settings(**given)
        settings = replace(settings, aliases={a: model for a, model in settings.aliases.items() if model == name})
        sharers = self.spec["replicas"] * len(self.spec["models"])
        source = partial(opened, self.spec["models"][name], self.spec["load"], sharers)
        worker = Worker({name: source}, settings)
        app = build_app(worker, settings)
        await self._stack.enter_async_context(app.router.lifespan_context(app))
        while worker.state == "loading":
            await asyncio.sleep(0.02)
        if worker.state == "stopped":
            raise HastenError(
                f"model {name!r} could not be loaded ({reason(worker.failure)})", hint="see the replica's log"
            )
        self.workers[name], self._apps[name] = worker, app
        return app

    async def relay(self, app: FastAPI, request: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """First [status, headers], then the pieces of the body as the application sends them.

        `request` holds `method`, `path`, `query`, `headers` and `body` as they came in, key included: it is checked again.
        """
        scope = http_scope(request["method"], request["path"], request["headers"], request["query"])
        async with aclosing(exchange(app, scope, request["body"])) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    fields = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in message["headers"]]
                    yield [message["status"], fields]
                elif message["type"] == "http.response.body" and message.get("body"):
                    yield bytes(message["body"])

    async def pages(self, request: Mapping[str, Any]) -> list[list[Any]]:
        """[labels, status, text] of what each application here answers to `request`, which has no body."""
        out = []
        for name, app in list(self._apps.items()):
            scope = http_scope(request["method"], request["path"], request["headers"], request["query"])
            status, _, body = await answer(app, scope)
            out.append([{"replica": str(os.getpid()), "engine": name}, status, body.decode("utf-8", "replace")])
        return out

    def check(self) -> None:
        """Raise HastenError when an engine has ended: the replica is to be replaced."""
        for name, worker in self.workers.items():
            if worker.state == "stopped":
                raise HastenError(f"the engine of {name!r} has ended ({reason(worker.failure)})")

    def facts(self) -> dict[str, Any]:
        """What this replica holds and does: its process, models, rows running, requests waiting."""
        loads = [worker.load() for worker in self.workers.values()]
        running, waiting = sum(one for one, _ in loads), sum(one for _, one in loads)
        return {"pid": os.getpid(), "models": sorted(self.workers), "running": running, "waiting": waiting}
