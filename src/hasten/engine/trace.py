"""The trace: one stream of events per engine, stamped with step and time; everything that watches reads this."""

from __future__ import annotations

import time
from typing import Any

from hasten.types import Event, EventKind


class Trace:
    """Collects the events of the current step; `take` hands them over.

    Times are seconds on a monotonic clock since the request was added.
    """

    def __init__(self) -> None:
        self.step = 0
        self._events: list[Event] = []

    @staticmethod
    def now() -> float:
        """Seconds on the clock all trace times are read from."""
        return time.perf_counter()

    def emit(self, kind: EventKind, request: int, choice: int, added_s: float, **fields: Any) -> None:
        """Record one event of a request's choice."""
        self._events.append(Event(kind, request, choice=choice, step=self.step, time_s=self.now() - added_s, **fields))

    def take(self) -> list[Event]:
        """All events since the last call, in order."""
        events, self._events = self._events, []
        return events
