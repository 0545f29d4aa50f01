"""The thread that owns the models: requests go in from the event loop, the events of every step come back out.

A turn takes what has been asked meanwhile, advances one engine by one pass (the one that has had least time so far), one
chunk of a call that waits (embeddings, scores), and hands events over. An abort therefore waits for one pass at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from hasten.engine.limits import LIMITS
from hasten.errors import HastenError, IncompatibleError, unknown_name
from hasten.serve.settings import Settings

if TYPE_CHECKING:
    from hasten.engine.contracts import LogitsRule
    from hasten.engine.engine import Engine
    from hasten.llm import LLM
    from hasten.types import Event, Request

State = Literal["loading", "ready", "draining", "stopped"]
Observer = Callable[[str, float, "Sequence[Event]", int, int], None]
_LOG = logging.getLogger("hasten.serve")
_TAKEN: weakref.WeakSet[Engine] = weakref.WeakSet()  # engines that some worker of this process serves
_CLAIMS = threading.Lock()


class UnavailableError(HastenError):
    """The server cannot take requests now: it is loading, draining, or has stopped."""


@dataclass(slots=True, eq=False)
class _Open:
    """A request whose events somebody waits for: its place in their submission, and choices that have not ended."""

    answer: Answer
    index: int
    left: int


@dataclass(slots=True, eq=False)
class _Seat:
    """One model: its engine's time so far, open answers by engine request, and calls that wait for a turn."""

    llm: LLM
    spent_s: float = 0.0
    answers: dict[int, _Open] = field(default_factory=dict)
    calls: list[tuple[Generator[None, None, Any], asyncio.Future[Any]]] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return bool(self.calls) or not self.llm.engine.idle or bool(self.answers)


class Answer:
    """What comes back for the requests of one submission: iterate for (index of the request, its events of one step).

    Ends when every choice has ended. `cancel` gives up what is still open; call it whenever you stop listening.
    """

    def __init__(self, worker: Worker, model: str, choices: int, provisional: bool) -> None:
        self._worker, self._model, self._open = worker, model, choices
        self.provisional, self.number = provisional, secrets.randbits(63)
        self._inbox: asyncio.Queue[tuple[int, list[Event]] | BaseException] = asyncio.Queue()
        self.ids: list[int] = []
        self.waiting = 0  # requests ahead of this one when it was added

    async def __aiter__(self) -> AsyncIterator[tuple[int, list[Event]]]:
        while self._open:
            item = await self._inbox.get()
            if isinstance(item, BaseException):
                self._open = 0
                raise item
            self._open -= sum(event.output is not None for event in item[1])
            yield item

    def put(self, item: tuple[int, list[Event]] | BaseException) -> None:
        """Deliver events or a failure; on the event loop only."""
        self._inbox.put_nowait(item)

    def cancel(self) -> None:
        """Abort what is still open, between two passes; safe at any time, any number of times."""
        if self._open:
            self._open = 0
            self._worker.abort(self._model, self)


class Worker:
    """Owns the models of a server and their thread; `start` on a running event loop, `stop` to end.

    `models` maps a name to an LLM or to a function that loads it (in the worker's thread, while the server answers that
    it is loading). `observe` functions get (model, seconds, events, rows, waiting) after every pass.
    """

    def __init__(
        self,
        models: Mapping[str, LLM | Callable[[], LLM]],
        settings: Settings,
        observe: Sequence[Observer] = (),
    ) -> None:
        self.settings, self.observe = settings, list(observe)
        self.state: State = "loading"
        self.failure: BaseException | None = None  # what ended the engine's thread
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="hasten-prepare")
        self._sources = dict(models)
        self._seats: dict[str, _Seat] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="hasten-engine", daemon=True)
        self._begun, self._leaving = threading.Event(), threading.Lock()
        self._ending = False

    # --- on the event loop ---

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models, loaded or not, without aliases."""
        return tuple(self._sources)

    def start(self) -> None:
        """Begin loading; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def drain(self) -> None:
        """Take no further request; what runs goes on. Safe in a signal handler."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    async def stop(self, seconds: float = 0.0) -> None:
        """Drain for at most `seconds`, abort the rest, end the thread."""
        self.drain()
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end and self._thread.is_alive():
            await asyncio.sleep(0.02)
        self._post(self._end)
        if self._begun.is_set():  # what still loads cannot be interrupted, and the thread does not outlive the process
            await asyncio.to_thread(self._thread.join, 10.0)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def resolve(self, name: str) -> str:
        """The model that a request's name or alias means; raises UnknownNameError."""
        found = self.settings.aliases.get(name, name)
        if found not in self._sources:
            raise unknown_name("model", name, {*self._sources, *self.settings.aliases})
        return found

    def llm(self, model: str) -> LLM:
        """A loaded model, for what may run beside its engine: tokenising, templates, grammars.

        Raises UnavailableError while the server loads, drains or has stopped.
        """
        if self.state != "ready":
            raise self._unavailable()
        return self._seats[model].llm

    async def prepare(self, function: Callable[..., Any], *given: Any) -> Any:
        """Run something that takes time off the event loop and off the engine, in the small pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *given)

    async def submit(
        self,
        model: str,
        requests: Sequence[Request],
        rules: tuple[LogitsRule, ...] = (),
        *,
        provisional: bool = False,
        deadline_s: float | None = None,
    ) -> Answer:
        """Queue requests together, each with its methods and these rules: all are taken or none.

        Raises what `LLM.parts` and `Engine.add` raise, and UnavailableError.
        """
        self.llm(model)
        answer = Answer(self, model, sum(one.sampling.n for one in requests), provisional)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._post(lambda: self._add(model, requests, rules, answer, deadline_s or LIMITS.deadline_s, done))
        try:
            await done
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return answer

    async def call(self, model: str, function: Callable[[LLM], Any]) -> Any:
        """Run `function(llm)` in the engine's thread between two passes and return its result.

        A generator is advanced by one `yield` per turn, so that requests go on meanwhile; its return value is the result.
        """
        self.llm(model)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._post(lambda: self._call(model, function, future))
        return await future

    def abort(self, model: str, answer: Answer) -> None:
        """Give up the requests of an answer; returns at once."""
        self._post(lambda: self._abort(model, answer))

    def loaded(self) -> list[tuple[str, LLM]]:
        """(name, model) of every model loaded so far, for whoever reads counters."""
        return [(name, seat.llm) for name, seat in list(self._seats.items())]

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return any(seat.busy for seat in list(self._seats.values()))

    def load(self) -> tuple[int, int]:
        """(rows running, requests waiting) over all models, as of now."""
        schedulers = [seat.llm.engine.scheduler for seat in self._seats.values()]
        return sum(len(s.running) for s in schedulers), sum(len(s.waiting) for s in schedulers)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)
        if self.state == "stopped":  # nobody else takes it any more
            self._leave()

    def _leave(self) -> None:
        """The thread ends, or has ended: whoever still waits is told."""
        with self._leaving:
            self._take(wait=False)
            for seat in self._seats.values():
                self._fail(seat, self._unavailable())

    def _unavailable(self) -> UnavailableError:
        why = {"loading": "is loading its models", "draining": "is shutting down"}.get(self.state, "has stopped")
        return UnavailableError(f"the server {why}", hint="try again later")

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            for name, source in self._sources.items():
                started = time.perf_counter()
                llm = source() if callable(source) else source
                self._claim(name, llm.engine)
                self._seats[name] = _Seat(llm)
                llm.engine.scheduler.max_queue = LIMITS.served_queue
                with contextlib.suppress(IncompatibleError):  # masked models, and models without an end token
                    llm.grammars  # noqa: B018 - read the vocabulary now, so that no request waits for it
                _LOG.info("model loaded", extra={"model": name, "seconds": round(time.perf_counter() - started, 2)})
            self._begun.set()
            if self.state == "loading":
                self.state = "ready"
            while not self._ending:
                self._take(wait=not self.busy)
                self._turn()
        except BaseException as error:  # noqa: BLE001 - nobody above but whoever asks for `failure`
            self.failure = error
            if self._begun.is_set() or not isinstance(error, HastenError):
                _LOG.exception("the engine's thread ended")
        finally:
            self._begun.set()
            self.state = "stopped"
            self._leave()
            with _CLAIMS:
                _TAKEN.difference_update(seat.llm.engine for seat in self._seats.values())

    def _claim(self, name: str, engine: Engine) -> None:
        """An engine has one thread and one reader of its events; raises IncompatibleError where it has them already."""
        with _CLAIMS:
            if engine in _TAKEN:
                raise IncompatibleError(
                    f"model {name!r} is served already, and an engine takes its requests from one place",
                    hint="load it a second time, or give it an alias",
                    field="models",
                )
            _TAKEN.add(engine)

    def _take(self, wait: bool) -> None:
        """Carry out what was asked meanwhile; with nothing else to do, wait for it."""
        try:
            command = self._inbox.get(timeout=0.5) if wait else self._inbox.get_nowait()
            while True:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _end(self) -> None:
        self._ending = True

    def _turn(self) -> None:
        """One pass of the engine that has had least time, then one chunk of a call on the same model."""
        busy = [(seat.spent_s, name) for name, seat in self._seats.items() if seat.busy]
        if not busy:
            return
        least = min(spent for spent, _ in busy)
        name = min(busy)[1]
        seat, started = self._seats[name], time.perf_counter()
        events: list[Event] = []
        if not seat.llm.engine.idle or seat.answers:
            try:
                events = seat.llm.engine.step()
            except Exception as error:  # noqa: BLE001 - the thread outlives any pass
                _LOG.exception("a pass failed", extra={"model": name})
                self._reset(seat, HastenError(f"the engine failed ({type(error).__name__})", hint="try again"))
        if seat.calls:
            self._advance(seat)
        spent = time.perf_counter() - started
        seat.spent_s += spent
        for other in self._seats.values():
            if not other.busy:  # who comes back later has saved nothing up
                other.spent_s = max(other.spent_s, least)
        scheduler = seat.llm.engine.scheduler
        for watch in self.observe:  # before anybody hears of the pass: who has an answer finds it counted
            watch(name, spent, events, len(scheduler.running), len(scheduler.waiting))
        self._deliver(seat, events)

    def _deliver(self, seat: _Seat, events: Sequence[Event]) -> None:
        """Hand the events of a pass to those who wait for them, in one call into the event loop."""
        batches: dict[int, list[Event]] = {}
        for event in events:
            if event.request in seat.answers:
                batches.setdefault(event.request, []).append(event)
        if not batches or self._loop is None:
            return
        out = []
        for request, batch in batches.items():
            one = seat.answers[request]
            out.append((one.answer, one.index, batch))
            one.left -= sum(event.output is not None for event in batch)
            if not one.left:
                del seat.answers[request]
        self._watched(seat)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, out)

    def _add(
        self,
        model: str,
        requests: Sequence[Request],
        rules: tuple[LogitsRule, ...],
        answer: Answer,
        deadline_s: float,
        done: asyncio.Future[None],
    ) -> None:
        seat = self._seats[model]
        engine = seat.llm.engine
        ids: list[int] = []
        try:
            if self.state == "stopped":
                raise self._unavailable()
            answer.waiting = len(engine.scheduler.waiting)
            for request in requests:
                parts = seat.llm.parts(request.method)
                ids.append(engine.add(request, replace(parts, rules=(*parts.rules, *rules)), deadline_s))
        except Exception as error:  # noqa: BLE001 - goes to who asked
            for one in ids:
                engine.abort(one)
            if not isinstance(error, HastenError):
                _LOG.exception("a request could not be added")
            self._settle(done, error)
            return
        for index, one in enumerate(ids):
            seat.answers[one] = _Open(answer, index, requests[index].sampling.n)
        answer.ids = ids
        self._watched(seat)
        self._settle(done, None)

    def _abort(self, model: str, answer: Answer) -> None:
        seat = self._seats[model]
        for one in answer.ids:
            seat.llm.engine.abort(one)
            seat.answers.pop(one, None)
        self._watched(seat)

    @staticmethod
    def _watched(seat: _Seat) -> None:
        """Guesses of open places are told only while somebody looks at them: they cost a softmax over the canvas."""
        seat.llm.engine.canvas_loop.provisional = any(one.answer.provisional for one in seat.answers.values())

    def _call(self, model: str, function: Callable[[LLM], Any], future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        seat = self._seats[model]
        try:
            if self.state == "stopped":
                raise self._unavailable()
            result = function(seat.llm)
        except Exception as error:  # noqa: BLE001 - goes to who asked
            self._settle(future, error)
            return
        if isinstance(result, Generator):
            seat.calls.append((result, future))
        else:
            self._settle(future, None, result)

    def _advance(self, seat: _Seat) -> None:
        """One chunk of the oldest call."""
        work, future = seat.calls[0]
        if future.cancelled():
            work.close()
            seat.calls.pop(0)
            return
        try:
            next(work)
            seat.calls.append(seat.calls.pop(0))
        except StopIteration as end:
            seat.calls.pop(0)
            self._settle(future, None, end.value)
        except Exception as error:  # noqa: BLE001 - goes to who asked
            seat.calls.pop(0)
            self._settle(future, error)

    def _reset(self, seat: _Seat, error: HastenError) -> None:
        """After a pass that raised: every open request of the model ends with `error`; the engine goes on without them."""
        for request in list(seat.answers):
            seat.llm.engine.abort(request)
        self._fail(seat, error)

    def _fail(self, seat: _Seat, error: HastenError) -> None:
        answers = {id(one.answer): one.answer for one in seat.answers.values()}
        seat.answers.clear()
        if self._loop is not None and not self._loop.is_closed():
            for answer in answers.values():
                self._loop.call_soon_threadsafe(answer.put, error)
        for _, future in seat.calls:
            self._settle(future, error)
        seat.calls.clear()

    def _settle(self, future: asyncio.Future[Any], error: Exception | None, value: Any = None) -> None:
        def settle() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(settle)


def _put(batches: Sequence[tuple[Answer, int, list[Event]]]) -> None:
    for answer, index, events in batches:
        answer.put((index, events))
