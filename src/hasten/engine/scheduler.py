"""Who runs: a bounded first-come queue, admitted when rows and cache memory allow; rows join and leave between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.engine.cache import CachePool, RowCache
from hasten.errors import HastenError, MemoryFitError, out_of_range


class QueueFullError(HastenError):
    """The waiting queue is full; try again when something has finished."""


@dataclass(slots=True)
class Ticket:
    """A request waiting for rows: `choices` rows of `slots` cache slots each, made by `start` once memory is there."""

    request_id: int
    choices: int
    slots: int
    start: Callable[[list[RowCache]], Sequence[Any]]


class Scheduler:
    """Holds the waiting queue and the running rows of one engine."""

    def __init__(self, pool: CachePool, max_rows: int, max_queue: int) -> None:
        if max_rows < 1:
            raise out_of_range("rows", max_rows, "at least 1")
        self.pool, self.max_rows, self.max_queue = pool, max_rows, max_queue
        self.waiting: deque[Ticket] = deque()
        self.running: list[Any] = []  # rows of the loop that the model needs

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
        if not self.pool.could_ever_fit(ticket.slots * ticket.choices):
            need = self.pool.layout.nbytes(ticket.slots) * ticket.choices
            raise MemoryFitError(
                f"the request needs {need} bytes of cache for {ticket.choices} x {ticket.slots} tokens; the whole cache "
                f"has {self.pool.budget_bytes}",
                hint="lower max_tokens or n, or give the cache more memory",
                field="max_tokens",
            )
        if len(self.waiting) >= self.max_queue:
            raise QueueFullError(f"{len(self.waiting)} requests are waiting already", hint="try again later")
        self.waiting.append(ticket)

    def admit(self) -> Iterator[Any]:
        """Start waiting requests in order while rows and memory last; yields the new rows."""
        while self.waiting and len(self.running) + self.waiting[0].choices <= self.max_rows:
            ticket = self.waiting[0]
            caches: list[RowCache] = []
            try:
                for _ in range(ticket.choices):
                    caches.append(self.pool.open(ticket.slots))
            except MemoryFitError:
                for cache in caches:
                    cache.release()
                return
            self.waiting.popleft()
            for row in ticket.start(caches):
                self.running.append(row)
                yield row

    def retire(self, row: Any) -> None:
        """A row has ended: its memory is free for others."""
        self.running.remove(row)
        row.cache.release()

    def drop(self, request_id: int) -> bool:
        """Take a request out of the waiting queue; True when it was there."""
        for ticket in self.waiting:
            if ticket.request_id == request_id:
                self.waiting.remove(ticket)
                return True
        return False
