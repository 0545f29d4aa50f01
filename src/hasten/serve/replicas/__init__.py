"""`hasten serve --replicas N --ray`: several processes or machines behind one address, through Ray Serve.

Ray Serve keeps the replicas (health, restarts, rolling replacement) and picks one per request, of those that hold the
request's model first. Its own HTTP proxy stays off: requests come in through the same server, gate and bounds as without
replicas, and nothing of Ray is reachable from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from hasten.engine.limits import LIMITS
from hasten.errors import HastenError, out_of_range
from hasten.serve import logs
from hasten.serve.cluster import cluster
from hasten.serve.replicas.front import Front
from hasten.serve.replicas.replica import Replica
from hasten.serve.run import Server, bound, config
from hasten.serve.security import Gate
from hasten.serve.settings import Settings

_NAME = "hasten"  # of the application, and of its one deployment
_HEALTH_S, _HEALTH_TIMEOUT_S = 2.0, 30.0
_LOG = logging.getLogger("hasten.serve")


class Fleet:
    """The replicas of one server on Ray Serve. `spec` as of Replica; `threads` CPUs each, `count` of them.

    `deploy` starts them, or replaces them one by one by new ones: a replica that goes finishes what it has begun.
    """

    def __init__(self, ray: Any, spec: Mapping[str, Any], count: int, threads: int) -> None:
        from ray import serve

        self.ray, self.serve = ray, serve
        self._application = _deployment(serve, count, threads, len(spec["models"])).bind(dict(spec))
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
        self._handle: Any = None

    def deploy(self) -> None:
        """Returns when all replicas are of this deployment and have loaded their model; raises HastenError."""
        try:
            self.serve.run(self._application, name=_NAME, route_prefix=None)
        except RuntimeError as error:
            status = self.serve.status().applications.get(_NAME)
            why = next(iter(status.deployments.values())).message if status and status.deployments else str(error)
            lines = [line.strip() for line in why.splitlines() if line.strip()]
            raise HastenError(f"the replicas did not start: {lines[-1][:300] if lines else error}") from None
        if self._handle is None:
            self._handle = self.serve.get_app_handle(_NAME).options(stream=True)

    def ask(self, model: str, request: dict[str, Any]) -> Any:
        """The answer of a replica that holds `model`, or that loads it when none has room."""
        return self._handle.options(multiplexed_model_id=model).answer.remote(model, request)

    def counts(self) -> dict[str, int]:
        """How many replicas are in which of Ray Serve's states (RUNNING, STARTING, STOPPING ...)."""
        application = self.serve.status().applications.get(_NAME)
        if application is None or not application.deployments:
            return {}
        states = next(iter(application.deployments.values())).replica_states
        return {getattr(state, "value", str(state)): count for state, count in states.items() if count}

    def every(self, name: str, *given: Any) -> list[Any]:
        """What each replica returns for its method `name`; raises HastenError when one does not answer."""
        handle = self.serve.get_app_handle(_NAME)
        silent: tuple[type[BaseException], ...] = (*self.lost, TimeoutError)
        try:
            return list(handle.broadcast(name, *given).results(timeout_s=_HEALTH_TIMEOUT_S))
        except silent as error:
            raise HastenError(f"a replica did not answer ({type(error).__name__})", hint="try again") from None

    @property
    def lost(self) -> tuple[type[BaseException], ...]:
        """What `ask` raises when a replica has gone."""
        unavailable = self.serve.exceptions.DeploymentUnavailableError
        return (self.ray.exceptions.RayError, self.serve.exceptions.ReplicaUnavailableError, unavailable)

    @property
    def full(self) -> tuple[type[BaseException], ...]:
        """What `ask` raises when too many requests wait."""
        return (self.serve.exceptions.BackPressureError,)


def _deployment(serve: Any, count: int, threads: int, models: int) -> Any:
    """Replica as Ray Serve's deployment."""

    class Served(Replica):
        async def __init__(self, spec: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
            if spec["closed"]:
                _keep_to_loopback()
            Replica.__init__(self, spec)
            names = list(spec["models"])
            rank = serve.get_replica_context().rank  # which of the replicas this is: models are spread over them
            await self.hold(names[getattr(rank, "rank", rank or 0) % len(names)])

        @serve.multiplexed(max_num_models_per_replica=models)
        async def hold(self, model: str) -> Any:
            return await self.open(model)

        async def answer(self, model: str, request: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
            async with contextlib.aclosing(self.relay(await self.hold(model), request)) as parts:
                async for part in parts:
                    yield part

        def check_health(self) -> None:
            self.check()

    return serve.deployment(
        name=_NAME,
        num_replicas=count,
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=LIMITS.rows + LIMITS.served_queue,
        max_queued_requests=LIMITS.served_queue,
        graceful_shutdown_timeout_s=LIMITS.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        max_constructor_retry_count=2,
    )(Served)


def _keep_to_loopback() -> None:
    """In a replica, before Ray Serve opens its port for calls between deployments: on every interface, and there are none.

    Ray has no setting for it. A version that does this in another way fails here, and is not served with.
    """
    from ray.serve._private import replica

    add = replica.add_port_to_grpc_server

    def add_here(server: Any, address: str) -> int:
        port = address.removeprefix("[::]:")
        if not port.isdigit():
            raise HastenError(f"Ray Serve listens on {address}", hint="use the version of Ray that hasten asks for")
        return add(server, f"127.0.0.1:{port}")

    replica.add_port_to_grpc_server = add_here


def run_replicas(
    models: Mapping[str, str],
    settings: Settings,
    *,
    load: Mapping[str, Any],
    count: int,
    threads: int | None = None,
    address: str | None = None,
    log_level: str = "info",
    log_json: bool = False,
) -> None:
    """Serve `models` (name -> what hasten.load takes) from `count` replicas until a signal; SIGHUP replaces them in turn.

    `threads` CPU threads each (default: an even share). `address`: a Ray cluster that runs already (default: one on this
    machine, for this server). Raises ConfigError, MissingExtraError, HastenError when the replicas do not start.
    """
    if isinstance(count, bool) or not 1 <= count <= 1024:
        raise out_of_range("replicas", count, "an integer in [1, 1024]")
    share = threads or max(1, (os.cpu_count() or 1) // count)
    logs.configure(log_level, log_json)
    plain = {**asdict(settings), "aliases": dict(settings.aliases)}
    spec = {
        "models": dict(models),
        "load": {**load, "threads": share},
        "settings": plain,
        "replicas": count,
        "closed": address is None,
    }
    with bound(settings) as listener, cluster(address, count * share + 1) as ray, _fleet(ray, spec, count, share) as fleet:
        front = Front(tuple(models), settings, fleet.ask, fleet.lost, fleet.full, fleet.counts, fleet.every)
        server = Server(config(Gate(front, settings), settings), front)
        port = listener.getsockname()[1]
        logs.say(f"hasten starts {count} replicas of {', '.join(models)} for {settings.host}:{port}")
        asyncio.run(_serve(server, listener, fleet, front))
    if front.failure is not None:
        raise front.failure
    logs.say("stopped")


@contextmanager
def _fleet(ray: Any, spec: Mapping[str, Any], count: int, threads: int) -> Iterator[Fleet]:
    fleet = Fleet(ray, spec, count, threads)
    try:
        yield fleet
    finally:
        fleet.serve.shutdown()


async def _serve(server: Server, listener: Any, fleet: Fleet, front: Front) -> None:
    """Answer requests, with 503 until the replicas are there; replace them when a SIGHUP asks for it."""
    at_work: set[asyncio.Task[None]] = set()

    async def deploy() -> None:
        first = front.state == "loading"
        _LOG.info("the replicas start" if first else "the replicas are replaced one by one")
        try:
            await asyncio.to_thread(fleet.deploy)
        except HastenError as error:
            if front.state == "loading":
                front.fail(error)
            else:
                _LOG.error("the replicas were not replaced: %s", error)
            return
        if front.state == "loading":
            front.state = "ready"
        _LOG.info("the replicas are ready" if first else "the replicas have been replaced")

    def hang_up() -> None:
        if not at_work:
            task = asyncio.ensure_future(deploy())
            at_work.add(task)
            task.add_done_callback(at_work.discard)

    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
    hang_up()
    await server.serve([listener])
    for task in at_work:
        task.cancel()
