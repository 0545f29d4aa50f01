"""The engine: owns a backbone, its cache and a scheduler; `add / step / abort / stream`."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from hasten.engine.ar import AutoregressiveLoop
from hasten.engine.cache import RowCache
from hasten.engine.canvas import Canvas, CanvasLoop
from hasten.engine.contracts import Backbone, Drafter, Law, LogitsRule
from hasten.engine.limits import LIMITS
from hasten.engine.prefix import PrefixStore
from hasten.engine.rows import Row
from hasten.engine.sampling import Sampler, choice_seed
from hasten.engine.scheduler import Scheduler, Ticket
from hasten.engine.trace import Trace
from hasten.engine.verify import check_law
from hasten.errors import BusyError, ConfigError, ContextLengthError, IncompatibleError, RuleError, out_of_range
from hasten.failure import contained, out_of_memory, words
from hasten.pass_cost import PassCost
from hasten.text import StopText, TextDecoder
from hasten.types import Event, FinishReason, Output, Request, Usage

_ACTIVATIONS = 16  # hidden states' worth of float32 numbers that a query token takes while it runs through a layer
_LOGITS = 3  # copies of its logits that a position takes while a token is chosen for it
_PACE = 0.8  # weight of the past in the seconds between two requests that ended
_PACES = (1.0, 60.0)  # least and most seconds after which another try is suggested


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
    KV memory, `rows` the sequences advanced together. `prefix_bytes` of the cache may hold keys of texts read before, for
    prompts of causal models that begin alike (0: none are kept); `identity` names the model there. `available` says how
    many bytes this process may still take; requests that need more are refused for now (None: memory is not looked at).
    One thread at a time.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        cache_bytes: int,
        decoder: Callable[[], TextDecoder] | None = None,
        rows: int = LIMITS.rows,
        queue: int = LIMITS.queue,
        prefix_bytes: int = 0,
        identity: str = "",
        available: Callable[[], int] | None = None,
    ) -> None:
        caps = backbone.capabilities
        if caps.kind not in ("causal", "masked"):
            raise IncompatibleError(
                f"model kind {caps.kind!r} cannot be decoded by this engine",
                hint="load a causal or masked model",
                field="model",
            )
        self.backbone = backbone
        self.trace = Trace()
        self.scheduler = Scheduler(backbone.pool(cache_bytes), rows, queue)
        self.prefix: PrefixStore | None = None
        if prefix_bytes and caps.kind == "causal" and caps.cache_kinds == ("kv",):
            self.prefix = PrefixStore(self.scheduler.pool, prefix_bytes, f"{identity} {backbone.name}")
        self.available = available
        self._decoder = decoder
        self._loop = AutoregressiveLoop(backbone, self.trace)
        self.canvas_loop = CanvasLoop(backbone, self.trace)
        self._step: Callable[[Sequence[Any]], None] = self.canvas_loop.step if caps.kind == "masked" else self._loop.step
        self._request_ids, self._row_ids = count(1), count(1)
        self._open: dict[int, int] = {}  # rows that have not stopped, by request
        self._deadlines: dict[int, tuple[float, float]] = {}  # request -> (time it must have ended, seconds it was given)
        self._failures: list[tuple[int, Exception]] = []  # what was raised in this step, by request
        self._ended_s = 0.0
        self._inboxes: dict[int, deque[Event]] = {}

    @property
    def idle(self) -> bool:
        """True when nothing waits or runs."""
        return self.scheduler.idle

    @property
    def pass_cost(self) -> PassCost:
        """What decoding passes cost on this machine, as measured so far."""
        return self._loop.budget.cost

    def forget(self) -> None:
        """Drop what was learnt of drafters, and kept prompts; what passes cost stays."""
        self._loop.budget.books.clear()
        self.scheduler.pool.shrink()

    def add(self, request: Request, parts: Parts = PLAIN, deadline_s: float | None = None) -> int:
        """Queue a request and return its id; everything that can be refused is refused here, before any work.

        `deadline_s` seconds from now it is aborted, wherever it is. Raises ContextLengthError (prompt or prompt +
        max_tokens over the window), MemoryFitError (never fits), BusyError (not enough free memory now), ConfigError (token
        ids, law, cost of a canvas), QueueFullError.
        """
        if deadline_s is not None and not deadline_s > 0:
            raise out_of_range("deadline_s", deadline_s, "a positive number of seconds")
        ticket, need = self._ticket(request, parts)
        if self.available is not None and self.scheduler.pool.could_ever_fit(ticket.slots, ticket.choices):
            free = self.available() + self.scheduler.pool.idle()
            if need > free:
                raise BusyError(
                    f"the request needs about {need} bytes and {free} are free",
                    hint="try again later, or lower max_tokens or n",
                    retry_after_s=self.scheduler.pace_s,
                )
        ahead = len(self.scheduler.waiting)
        self.scheduler.enqueue(ticket)
        self._open[ticket.request_id] = ticket.choices
        if deadline_s is not None:
            self._deadlines[ticket.request_id] = (ticket.added_s + deadline_s, deadline_s)
        self.trace.emit("queue", ticket.request_id, 0, ticket.added_s, position=ahead, total=len(self.scheduler.running))
        return ticket.request_id

    def need(self, request: Request, parts: Parts = PLAIN) -> int:
        """Estimated bytes that a request takes at most: keys and values of its choices, and its part of one pass.

        Raises what `add` raises for a request that is wrong in itself.
        """
        return self._ticket(request, parts)[1]

    def _ticket(self, request: Request, parts: Parts) -> tuple[Ticket, int]:
        """The request checked and made ready to wait, and the bytes it needs."""
        caps, sampling, prompt = self.backbone.capabilities, request.sampling, request.prompt
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
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        Sampler(sampling, seed, prompt, caps.vocab_size)  # refuses ids outside the vocabulary now, not when admitted
        if caps.kind == "masked" or parts.canvas is not None or request.template is not None:
            return self._canvas_ticket(request, parts, seed)
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
        slack = parts.budget if parts.drafter is not None else 0
        limit = min(room, LIMITS.max_tokens) if sampling.max_tokens is None else sampling.max_tokens
        if sampling.max_tokens is None:  # no limit asked for: as much as the window and the cache hold
            while limit > 1 and not self.scheduler.pool.could_ever_fit(len(prompt) + limit + slack, sampling.n):
                limit //= 2
        request_id, added_s = next(self._request_ids), self.trace.now()

        def start(caches: list[RowCache]) -> list[Row]:
            rows: list[Row] = []
            for choice, cache in enumerate(caches):
                own = choice_seed(seed, choice)
                row = Row(
                    id=next(self._row_ids), request_id=request_id, choice=choice, request=request, cache=cache, law=law,
                    sampler=Sampler(sampling, own, prompt, caps.vocab_size, parts.rules, limit), limit=limit,
                    text=StopText(self._decoder() if self._decoder else None, sampling.stop), added_s=added_s,
                    eos_ids=frozenset() if sampling.ignore_eos else frozenset(caps.eos_ids), started_s=self.trace.now(),
                    method=parts.method, drafter=parts.drafter, budget=parts.budget, measured=parts.measured,
                    lead=rows[0] if rows else None, tokens=list(prompt),
                )  # fmt: skip
                rows.append(row)
            if self.prefix is not None and not (parts.drafter is not None and parts.drafter.needs.prompt):
                rows[0].cached = self.prefix.fill(caches[0], prompt, request.tenant)
            return rows

        slots = len(prompt) + limit + slack
        needs = None if parts.drafter is None else parts.drafter.needs
        chunk = min(len(prompt), LIMITS.prefill_chunk)
        queries = max(chunk, sampling.n * (1 + slack))
        shown = queries if needs is not None and needs.prompt_logits else sampling.n * (1 + slack)
        ticket = Ticket(request_id, request, slots, start, seed, added_s, parts.method)
        return ticket, self._bytes(ticket, queries, shown)

    def _canvas_ticket(self, request: Request, parts: Parts, seed: int) -> tuple[Ticket, int]:
        """As `_ticket`, for a request of a masked model."""
        caps, policy, sampling = self.backbone.capabilities, parts.canvas, request.sampling
        if caps.kind != "masked":
            raise IncompatibleError(
                f"a {caps.kind} model has no canvas to fill", hint="load a masked model", field="method"
            )
        if policy is None or parts.drafter is not None or parts.rules:
            raise IncompatibleError("a masked model needs canvas methods and nothing else", field="method")
        first = policy.open(request, caps)
        size, open_ = len(first.tokens) - first.prompt_len, int(first.masked.sum())
        steps = min(first.planned, open_) if policy.final else first.planned  # each of them commits a token at least
        times = sampling.n * policy.sides
        if times * size * steps > LIMITS.canvas_steps:
            raise ConfigError(
                f"a canvas of {size} tokens in {steps} steps, {times} times, costs {times * size * steps}; "
                f"limits.canvas_steps allows {LIMITS.canvas_steps}",
                hint="lower max_tokens or n, or ask for fewer steps",
                field="max_tokens",
            )
        ends = frozenset() if sampling.ignore_eos or request.template else frozenset(caps.eos_ids)
        request_id, added_s = next(self._request_ids), self.trace.now()

        def start(caches: list[RowCache]) -> list[Canvas]:
            return [
                Canvas(
                    id=next(self._row_ids), request_id=request_id, choice=choice, request=request, policy=policy,
                    state=replace(first, seed=choice_seed(seed, choice)), cache=cache, eos_ids=ends, added_s=added_s,
                    text=StopText(self._decoder() if self._decoder else None, sampling.stop),
                    started_s=self.trace.now(), method=parts.method, shown=first.prompt_len,
                )
                for choice, cache in enumerate(caches)
            ]  # fmt: skip

        most = policy.stepper.most if policy.stepper.most > 1 else 0  # drafted states lie side by side behind the canvas
        slots = len(first.tokens) + most * (len(first.tokens) - first.window[0] + caps.logit_shift)
        queries = times * len(first.tokens) * max(1, most)
        slots = slots if policy.cache.stores else 1
        ticket = Ticket(request_id, request, slots, start, seed, added_s, parts.method)
        return ticket, self._bytes(ticket, queries, times * size * max(1, most))

    def _bytes(self, ticket: Ticket, queries: int, shown: int) -> int:
        """Bytes of a request whose part of a pass has so many query tokens, with logits for `shown` of them."""
        caps = self.backbone.capabilities
        numbers = queries * caps.hidden * _ACTIVATIONS + shown * caps.vocab_size * _LOGITS
        return ticket.choices * self.scheduler.pool.row_bytes(ticket.slots) + 4 * numbers

    def step(self) -> list[Event]:
        """Admit what fits, advance every running row by one pass, and return the events of this step.

        What goes wrong with a request ends that request, with an "error" event; the others go on.
        """
        self.trace.step += 1
        self._failures.clear()
        now_s = self.trace.now()
        for request_id, (at_s, seconds) in list(self._deadlines.items()):
            if now_s >= at_s:
                self._end(request_id, f"the deadline of {seconds:g} seconds has passed")
        for ticket, error in self.scheduler.admit():
            self._failures.append((ticket.request_id, error))
            self._unstarted(ticket, "error", words(error), error)
        if self.scheduler.running:
            with getattr(self.backbone, "alone", nullcontext)():  # a backbone with threads of its own
                self._advance(self.scheduler.running)
            for row in list(self.scheduler.running):
                if row.reason is not None:
                    self._retire(row)
                elif isinstance(row, Row) and not row.kept and row.generated:
                    self._keep(row)  # the prompt is read: others that begin alike need not wait for the end
        events = self.trace.take()
        for event in events:
            if event.request in self._inboxes:
                self._inboxes[event.request].append(event)
        return events

    def _advance(self, rows: Sequence[Any]) -> None:
        """One pass over `rows`. Where it fails as a whole no row has changed, and those at fault end with reason "error".

        Out of memory, what is merely kept goes first, then the largest and newest row. Any other failure: each row has its
        pass alone, which gives it the same tokens, and those that fail again are the ones.
        """
        with contained() as caught:
            self._step(rows)
        if caught.error is None:
            return
        if out_of_memory(caught.error):
            if not self.scheduler.pool.shrink():
                largest = max((row for row in rows if row.reason is None), key=lambda row: (row.size, row.id))
                largest.fail(caught.error)
            return
        for row in list(rows):
            with contained() as alone:
                if row.reason is None and len(rows) > 1:
                    self._step([row])
            if row.reason is None and (alone.error is not None or len(rows) == 1):
                row.fail(alone.error or caught.error)

    def _keep(self, row: Row) -> None:
        """Keep a row's keys for prompts that begin alike, where they are what this backbone alone would compute."""
        row.kept = True
        if self.prefix is not None and row.native and row.generated and row.reason != "error":
            with contained():
                self.prefix.keep(row.cache, row.tokens, row.request.tenant)

    def _retire(self, row: Any) -> None:
        """End a row: wake choices that waited for its prompt, free its memory, tell the trace."""
        if isinstance(row, Row):
            for other in self.scheduler.running:
                if other.lead is row:
                    if row.cache.length >= row.prompt_len - 1:
                        other.cache.copy_from(row.cache)
                        other.cache.truncate(row.prompt_len - 1)
                    other.lead = None
            self._keep(row)
        self.scheduler.retire(row)
        if row.cause is not None and not isinstance(row.cause, RuleError):  # a rule's end is its own request's alone
            self._failures.append((row.request_id, row.cause))
        if isinstance(row, Row) and row.drafter is not None and row.opened:
            with contained():
                row.drafter.close(row.id)
            self._loop.budget.book(row.drafter).acceptance.forget(row.id)
        self._stopped(row.request_id, row.choice, row.added_s, row.output(self.trace.now()), row.error, row.cause)

    def _unstarted(self, ticket: Ticket, reason: FinishReason, error: str, cause: Exception | None = None) -> None:
        """End a request that has no rows yet."""
        usage = Usage(prompt_tokens=len(ticket.request.prompt))
        for choice in range(ticket.choices):
            output = Output("", (), reason, usage, choice_seed(ticket.seed, choice), choice, ticket.method)
            self._stopped(ticket.request_id, choice, ticket.added_s, output, error, cause)

    def _stopped(
        self, request_id: int, choice: int, added_s: float, output: Output, error: str, cause: Exception | None
    ) -> None:
        """Tell the trace that a choice has ended, and close its request with the last one."""
        if error:
            late, ruled = output.finish_reason == "abort", isinstance(cause, RuleError)
            code = "deadline" if late else "rule" if ruled else "engine"
            self.trace.emit("error", request_id, choice, added_s, text=error, code=code)
        self.trace.emit("stop", request_id, choice, added_s, output=output)
        self._open[request_id] -= 1
        if not self._open[request_id]:
            del self._open[request_id]
            self._deadlines.pop(request_id, None)
            now_s = self.trace.now()
            if self._ended_s:
                pace = _PACE * self.scheduler.pace_s + (1 - _PACE) * (now_s - self._ended_s)
                self.scheduler.pace_s = min(max(pace, _PACES[0]), _PACES[1])
            self._ended_s = now_s

    def abort(self, request_id: int) -> bool:
        """End a request between two forwards; True when it was still open. Safe to call at any time, any number of times.

        Its choices stop with finish_reason "abort" and keep what they had; the stop events come with the next step.
        """
        return self._end(request_id, "")

    def _end(self, request_id: int, error: str) -> bool:
        if request_id not in self._open:
            return False
        ticket = self.scheduler.drop(request_id)
        if ticket is not None:
            self._unstarted(ticket, "abort", error)
        for row in [row for row in self.scheduler.running if row.request_id == request_id]:
            row.end("abort", error)
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

        If one cannot be added, none runs; what is raised while they run ends them all. `watch` sees every event.
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
                for cause in [cause for request_id, cause in self._failures if request_id in ids]:
                    raise cause
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
