"""The engine: owns a backbone, its cache and a scheduler; `add / step / abort / stream`."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from hasten.budget import PassCost
from hasten.engine.ar import AutoregressiveLoop, Row
from hasten.engine.cache import RowCache
from hasten.engine.canvas import Canvas, CanvasLoop
from hasten.engine.contracts import Backbone, Drafter, Law, LogitsRule
from hasten.engine.limits import LIMITS
from hasten.engine.sampling import Sampler, choice_seed
from hasten.engine.scheduler import Scheduler, Ticket
from hasten.engine.trace import Trace
from hasten.engine.verify import check_law
from hasten.errors import ConfigError, ContextLengthError, IncompatibleError, out_of_range
from hasten.text import StopText, TextDecoder
from hasten.types import Event, Output, Request


@dataclass(frozen=True, slots=True)
class Parts:
    """The method parts of one request, already built: `method` names them in the output.

    `law` None picks the drafter's own where it names one, else the exact one: greedy at temperature 0, else match, or
    rejection for drafts that are sampled.
    `budget` is the most draft nodes per step; with `measured` only the nodes that pay on this machine are
    verified, else all that the drafter proposes. `canvas` (a hasten.policy.Policy) is how a masked model decodes.
    """

    drafter: Drafter | None = None
    rules: tuple[LogitsRule, ...] = ()
    law: Law | None = None
    budget: int = 16
    measured: bool = False
    method: tuple[str, ...] = ("plain",)
    canvas: Any = None


PLAIN = Parts()


class Engine:
    """Continuous batching over one model: requests join and leave between steps, and batching changes no result.

    `decoder` makes a fresh incremental detokeniser per row (None: token ids only, no stop strings). `cache_bytes` bounds
    KV memory, `rows` the sequences advanced together. One thread at a time.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        cache_bytes: int,
        decoder: Callable[[], TextDecoder] | None = None,
        rows: int = LIMITS.rows,
        queue: int = LIMITS.queue,
    ) -> None:
        if backbone.capabilities.kind not in ("causal", "masked"):
            raise IncompatibleError(
                f"model kind {backbone.capabilities.kind!r} cannot be decoded by this engine",
                hint="load a causal or masked model",
                field="model",
            )
        self.backbone = backbone
        self.trace = Trace()
        self.scheduler = Scheduler(backbone.pool(cache_bytes), rows, queue)
        self._decoder = decoder
        self._loop = AutoregressiveLoop(backbone, self.trace)
        self.canvas_loop = CanvasLoop(backbone, self.trace)
        self._step = self.canvas_loop.step if backbone.capabilities.kind == "masked" else self._loop.step
        self._request_ids, self._row_ids = count(1), count(1)
        self._open: dict[int, int] = {}
        self._inboxes: dict[int, deque[Event]] = {}

    @property
    def idle(self) -> bool:
        """True when nothing waits or runs."""
        return self.scheduler.idle

    @property
    def pass_cost(self) -> PassCost:
        """What decoding passes cost on this machine, as measured so far."""
        return self._loop.budget.cost

    def add(self, request: Request, parts: Parts = PLAIN) -> int:
        """Queue a request and return its id; everything that can be refused is refused here, before any work.

        Raises ContextLengthError (prompt or prompt + max_tokens over the window), MemoryFitError (never fits),
        ConfigError (token ids, law), QueueFullError.
        """
        caps = self.backbone.capabilities
        sampling, prompt = request.sampling, request.prompt
        largest = max(prompt)
        if largest >= caps.vocab_size:
            raise out_of_range("prompt", largest, f"token ids below the vocabulary of {caps.vocab_size}")
        if len(prompt) >= caps.max_len:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens; the model's window of {caps.max_len} leaves no room for an answer",
                hint="shorten the prompt",
                field="prompt",
            )
        room = caps.max_len - len(prompt)
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise ContextLengthError(
                f"max_tokens = {sampling.max_tokens} and a prompt of {len(prompt)} tokens exceed the model's window of "
                f"{caps.max_len}",
                hint=f"ask for at most {room} tokens, or shorten the prompt",
                field="max_tokens",
            )
        if sampling.stop and self._decoder is None:
            raise ConfigError("stop strings need a tokenizer; this engine has none", hint="use stop_ids", field="stop")
        if caps.kind == "masked" or parts.canvas is not None or request.template is not None:
            return self._add_canvas(request, parts)
        draws = parts.drafter.draws if parts.drafter else "point"
        exact: Law = "greedy" if sampling.greedy else "match" if draws == "point" else "rejection"
        law: Law = parts.law or getattr(parts.drafter, "law", None) or exact
        check_law(law, draws)
        if law == "trust" and not sampling.greedy and not getattr(parts.drafter, "sampled", False):
            name = parts.drafter.name if parts.drafter else "plain"
            raise ConfigError(
                f"temperature = {sampling.temperature} with drafts that nobody verifies changes what is sampled",
                hint=f"temperature=0, an exact mode, or {name}:sampled=true to accept that",
                field="temperature",
            )
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        Sampler(sampling, seed, prompt, caps.vocab_size)  # refuses ids outside the vocabulary now, not when admitted
        slack = parts.budget if parts.drafter is not None else 0
        limit = min(room, LIMITS.max_tokens) if sampling.max_tokens is None else sampling.max_tokens
        if sampling.max_tokens is None:  # no limit asked for: as much as the window and the cache hold
            while limit > 1 and not self.scheduler.pool.could_ever_fit((len(prompt) + limit + slack) * sampling.n):
                limit //= 2
        request_id = next(self._request_ids)
        added_s = self.trace.now()

        def start(caches: list[RowCache]) -> list[Row]:
            rows: list[Row] = []
            for choice, cache in enumerate(caches):
                own = choice_seed(seed, choice)
                rows.append(
                    Row(
                        id=next(self._row_ids),
                        request_id=request_id,
                        choice=choice,
                        request=request,
                        sampler=Sampler(sampling, own, prompt, caps.vocab_size, parts.rules, limit),
                        text=StopText(self._decoder() if self._decoder else None, sampling.stop),
                        cache=cache,
                        eos_ids=frozenset() if sampling.ignore_eos else frozenset(caps.eos_ids),
                        limit=limit,
                        added_s=added_s,
                        started_s=self.trace.now(),
                        method=parts.method,
                        drafter=parts.drafter,
                        law=law,
                        budget=parts.budget,
                        measured=parts.measured,
                        lead=rows[0] if rows else None,
                        tokens=list(prompt),
                    )
                )
            return rows

        self.scheduler.enqueue(Ticket(request_id, sampling.n, len(prompt) + limit + slack, start))
        self._open[request_id] = sampling.n
        return request_id

    def _add_canvas(self, request: Request, parts: Parts) -> int:
        """Queue a request of a masked model."""
        caps, policy = self.backbone.capabilities, parts.canvas
        if caps.kind != "masked":
            raise IncompatibleError(
                f"a {caps.kind} model has no canvas to fill", hint="load a masked model", field="method"
            )
        if policy is None or parts.drafter is not None or parts.rules:
            raise IncompatibleError("a masked model needs canvas methods and nothing else", field="method")
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        first = policy.open(request, caps)
        ends = frozenset() if request.sampling.ignore_eos or request.template else frozenset(caps.eos_ids)
        request_id, added_s = next(self._request_ids), self.trace.now()

        def start(caches: list[RowCache]) -> list[Canvas]:
            return [
                Canvas(
                    id=next(self._row_ids), request_id=request_id, choice=choice, request=request, policy=policy,
                    state=replace(first, seed=choice_seed(seed, choice)), cache=cache, eos_ids=ends, added_s=added_s,
                    text=StopText(self._decoder() if self._decoder else None, request.sampling.stop),
                    started_s=self.trace.now(), method=parts.method, shown=first.prompt_len,
                )
                for choice, cache in enumerate(caches)
            ]  # fmt: skip

        most = policy.stepper.most if policy.stepper.most > 1 else 0  # drafted states lie side by side behind the canvas
        slots = len(first.tokens) + most * (len(first.tokens) - first.window[0] + caps.logit_shift)
        self.scheduler.enqueue(Ticket(request_id, request.sampling.n, slots if policy.cache.stores else 1, start))
        self._open[request_id] = request.sampling.n
        return request_id

    def step(self) -> list[Event]:
        """Admit what fits, advance every running row by one pass, and return the events of this step."""
        self.trace.step += 1
        list(self.scheduler.admit())
        if self.scheduler.running:
            with getattr(self.backbone, "alone", nullcontext)():  # a backbone with threads of its own
                self._step(self.scheduler.running)
            for row in [row for row in self.scheduler.running if row.reason is not None]:
                self._retire(row)
        events = self.trace.take()
        for event in events:
            if event.request in self._inboxes:
                self._inboxes[event.request].append(event)
        return events

    def _retire(self, row: Row) -> None:
        """End a row: wake choices that waited for its prompt, free its memory, tell the trace."""
        for other in self.scheduler.running if isinstance(row, Row) else ():
            if other.lead is row:
                if row.cache.length >= row.prompt_len - 1:
                    other.cache.copy_from(row.cache)
                    other.cache.truncate(row.prompt_len - 1)
                other.lead = None
        self.scheduler.retire(row)
        if isinstance(row, Row) and row.drafter is not None and row.opened:
            row.drafter.close(row.id)
            self._loop.budget.book(row.drafter).acceptance.forget(row.id)
        if row.error:
            self.trace.emit("error", row.request_id, row.choice, row.added_s, text=row.error)
        output = row.output(self.trace.now())
        self.trace.emit("stop", row.request_id, row.choice, row.added_s, output=output)
        left = self._open.get(row.request_id, 1) - 1
        if left:
            self._open[row.request_id] = left
        else:
            self._open.pop(row.request_id, None)

    def abort(self, request_id: int) -> bool:
        """End a request between two forwards; True when it was still open. Safe to call at any time, any number of times.

        Its rows stop with finish_reason "abort" and keep what they had; the stop events come with the next step.
        """
        if request_id not in self._open:
            return False
        if self.scheduler.drop(request_id):
            self._open.pop(request_id)
            return True
        for row in [row for row in self.scheduler.running if row.request_id == request_id]:
            row.reason = "abort"
            row.text.finish()
            self._retire(row)
        return True

    def stream(self, request: Request, parts: Parts = PLAIN) -> Iterator[Event]:
        """Events of one request as they happen; other requests advance meanwhile. Closing the iterator aborts it."""
        request_id = self.add(request, parts)
        inbox = self._inboxes[request_id] = deque()
        try:
            while request_id in self._open or inbox:
                if not inbox:
                    self.step()
                while inbox:
                    yield inbox.popleft()
        finally:
            self.abort(request_id)
            self._inboxes.pop(request_id, None)

    def run(
        self, requests: Sequence[tuple[Request, Parts]], watch: Callable[[Event], None] | None = None
    ) -> list[list[Output]]:
        """All requests to their end, batched: per request its outputs in order of choice.

        If one cannot be added, none runs. `watch` sees every event.
        """
        ids: list[int] = []
        outputs: dict[int, list[Output]] = {}
        try:
            for request, parts in requests:
                while len(self.scheduler.waiting) >= self.scheduler.max_queue and ids:
                    self._collect(outputs, watch)
                ids.append(self.add(request, parts))
            while any(request_id in self._open for request_id in ids):
                self._collect(outputs, watch)
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
            self.trace.take()
            raise
        return [sorted(outputs[request_id], key=lambda output: output.choice) for request_id in ids]

    def _collect(self, outputs: dict[int, list[Output]], watch: Callable[[Event], None] | None) -> None:
        for event in self.step():
            if watch is not None:
                watch(event)
            if event.output is not None:
                outputs.setdefault(event.request, []).append(event.output)
