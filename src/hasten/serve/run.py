"""Running a server: models under their names, uvicorn with bounds on headers, a drain when it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError
from hasten.serve import logs
from hasten.serve.app import build_app
from hasten.serve.settings import NAME, Settings
from hasten.serve.worker import Worker

if TYPE_CHECKING:
    from hasten.llm import LLM
    from hasten.serve.replicas.front import Front


_FLUSH_S = 5  # after the drain: for clients to take the rest of their answers


class TimedH11(H11Protocol):
    """uvicorn's HTTP/1.1 with a time for the headers: a client that sends them byte by byte is cut off."""

    _late: asyncio.TimerHandle | None = None
    _begun: Any = None  # the request whose headers were the last to arrive whole

    def connection_made(self, transport: Any) -> None:
        """Start the clock of the first request."""
        super().connection_made(transport)
        self._late = self.loop.call_later(LIMITS.body_s, self._cut)

    def handle_events(self) -> None:
        """Stop the clock when a request has begun, start it when part of the next has come and none is being answered.

        uvicorn itself closes connections on which nothing at all comes after an answer.
        """
        super().handle_events()
        if self.cycle is not self._begun:
            self._begun = self.cycle
            if self._late is not None:
                self._late.cancel()
                self._late = None
        elif self._late is None and self.cycle.response_complete and self.conn.trailing_data[0]:
            self._late = self.loop.call_later(LIMITS.body_s, self._cut)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _cut(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with an end that loses nothing: told to stop, it answers what it has begun and 503 to the rest.

    The first SIGTERM or SIGINT drains the worker, for `drain_s` seconds at most; the second ends the process at once, as
    if nobody had caught it. A worker that ends by itself ends the server too.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker | Front, drain_s: float = LIMITS.drain_s) -> None:
        super().__init__(config)
        self._worker, self._drain_s, self._told_s = worker, drain_s, 0.0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal that asks for the end."""
        if self._told_s:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._told_s = time.monotonic()
        self._worker.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: True when there is nothing left to do."""
        late = self._told_s and time.monotonic() >= self._told_s + self._drain_s
        if late:
            logs.say("time is up; what still runs is given up")
            await self._worker.stop()
        if late or self._worker.state == "stopped" or (self._told_s and not self._worker.busy):
            self.should_exit = True
        return await super().on_tick(counter)


def named(models: Sequence[str], aliases: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Callable[[], LLM]]:
    """Name -> function that loads it. A path is served under its last part, without the suffix.

    Raises ConfigError for two models of one name and for aliases of models that are not served.
    """
    out: dict[str, Callable[[], LLM]] = {}
    for model in models:
        name = model if NAME.match(model) and not model.endswith((".gguf", ".safetensors")) else Path(model).name
        name = name.removesuffix(".gguf").removesuffix(".safetensors")
        if not NAME.match(name):
            raise ConfigError(f"model {model!r} gives no name to serve it under", hint="rename it", field="models")
        if name in out:
            raise ConfigError(f"two models would be served as {name!r}", hint="rename one", field="models")
        out[name] = partial(opened, model, options, len(models))
    for alias, model in aliases.items():
        if model not in out:
            raise ConfigError(f"alias {alias!r} means {model!r}, which is not served", field="alias")
        if alias in out:
            raise ConfigError(f"alias {alias!r} is the name of a model", field="alias")
    return out


def opened(model: str, options: Mapping[str, Any], sharers: int) -> LLM:
    """A model for a server, whose keys and values take one of `sharers` equal parts of the memory there is for them."""
    import hasten
    from hasten.models.memory import available_bytes

    room = None if sharers == 1 else int(available_bytes() * LIMITS.cache_share / sharers)
    return hasten.load(model, serving=True, cache_bytes=room, **options)


def config(app: Any, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings: bounded headers and connections, no access log of its own, no server header."""
    return uvicorn.Config(
        app,
        host=settings.host.strip("[]"),
        port=settings.port,
        http=TimedH11,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=LIMITS.connections,
        backlog=LIMITS.connections,
        h11_max_incomplete_event_size=LIMITS.http_header_bytes,
        timeout_keep_alive=int(LIMITS.body_s),
        timeout_graceful_shutdown=_FLUSH_S,
    )


def run(
    sources: Mapping[str, Callable[[], LLM]], settings: Settings, *, log_level: str = "info", log_json: bool = False
) -> None:
    """Serve until a signal. Raises ConfigError when the port is taken, and what ended the worker if something did."""
    logs.configure(log_level, log_json)
    worker = Worker(sources, settings)
    server = Server(config(build_app(worker, settings), settings), worker)
    with bound(settings) as listener:
        port = listener.getsockname()[1]
        scheme = "http"
        logs.say(f"hasten serves {', '.join(sources)} on {scheme}://{settings.host}:{port}")
        if not settings.loopback and not settings.keys:
            logs.say("everybody who can reach this machine can use the server (--i-know)", "warning")
        server.run([listener])
    if worker.failure is not None:
        raise worker.failure
    logs.say("stopped")


def bound(settings: Settings) -> socket.socket:
    """A socket that listens at the address of `settings`; raises ConfigError when it is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
        listener.listen(LIMITS.connections)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror})",
            hint="another server may be running; --port chooses another",
            field="port",
        ) from None
    return listener
