"""Who runs: a bounded queue, admitted in order when rows and cache memory allow; rows join and leave between steps.

A request that does not fit yet may be passed by later ones that do, but only so often: then all wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hasten.engine.cache import CachePool, RowCache
from hasten.errors import BusyError, MemoryFitError, out_of_range
from hasten.failure import contained, out_of_memory
from hasten.types import Request

_PASSES = 8  # requests that may pass one that waits for more memory or rows than there are
_LOOK = 64  # waiting requests that are looked at in one step


class QueueFullError(BusyError):
    """The waiting queue is full; try again when something has finished, about `retry_after_s` seconds from now."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request waiting for rows: as many as it has choices, of `slots` cache slots each, made by `start` once they fit.

    `passed` counts the requests that were started before it although they came later.
    """

    request_id: int
    request: Request
    slots: int
    start: Callable[[list[RowCache]], Sequence[Any]]
    seed: int
    added_s: float
    method: tuple[str, ...]
    passed: int = 0

    @property
    def choices(self) -> int:
        """Rows it needs."""
        return self.request.sampling.n


class Scheduler:
    """Holds the waiting queue and the running rows of one engine."""

    def __init__(self, pool: CachePool, max_rows: int, max_queue: int) -> None:
        if max_rows < 1:
            raise out_of_range("rows", max_rows, "at least 1")
        self.pool, self.max_rows, self.max_queue = pool, max_rows, max_queue
        self.waiting: deque[Ticket] = deque()
        self.running: list[Any] = []  # rows of the loop that the model needs
        self.pace_s = 1.0  # seconds between two requests that ended, lately

    @property
    def idle(self) -> bool:
        """True when nothing waits or runs."""
        return not self.waiting and not self.running

    def enqueue(self, ticket: Ticket) -> None:
        """Queue a request; refuses what could never run.

        Raises MemoryFitError when its rows exceed the whole cache, ConfigError when they exceed `max_rows`, and
        QueueFullError when too many wait.
        """
        if ticket.choices > self.max_rows:
            raise out_of_range("n", ticket.choices, f"at most the engine's {self.max_rows} rows")
        if not self.pool.could_ever_fit(ticket.slots, ticket.choices):
            need = self.pool.row_bytes(ticket.slots) * ticket.choices
            raise MemoryFitError(
                f"the request needs {need} bytes of cache for {ticket.choices} x {ticket.slots} tokens; the whole cache "
                f"has {self.pool.budget_bytes}",
                hint="lower max_tokens or n, or give the cache more memory",
                field="max_tokens",
            )
        if len(self.waiting) >= self.max_queue:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting already", hint="try again later", retry_after_s=self.pace_s
            )
        self.waiting.append(ticket)

    def admit(self) -> Iterator[tuple[Ticket, Exception]]:
        """Start what fits; yields requests that could not be started although they fit, with the reason."""
        skipped: list[Ticket] = []
        for ticket in list(islice(self.waiting, _LOOK)):
            if len(self.running) >= self.max_rows or any(one.passed >= _PASSES for one in skipped):
                return
            if len(self.running) + ticket.choices > self.max_rows or not self.pool.fits(ticket.slots, ticket.choices):
                skipped.append(ticket)
                continue
            caches: list[RowCache] = []
            with contained() as caught:
                for more in reversed(range(ticket.choices)):
                    caches.append(self.pool.open(ticket.slots, more))
                rows = ticket.start(caches)
            if caught.error is None:
                self.running += rows
                for one in skipped:
                    one.passed += 1
            else:
                for cache in caches:
                    cache.release()
                if out_of_memory(caught.error) and (self.running or self.pool.shrink()):
                    return  # there is more when something has ended
                yield ticket, caught.error
            self.waiting.remove(ticket)

    def retire(self, row: Any) -> None:
        """A row has ended: its memory is free for others."""
        self.running.remove(row)
        row.cache.release()

    def drop(self, request_id: int) -> Ticket | None:
        """Take a request out of the waiting queue; None when it was not there."""
        ticket = next((ticket for ticket in self.waiting if ticket.request_id == request_id), None)
        if ticket is not None:
            self.waiting.remove(ticket)
        return ticket
