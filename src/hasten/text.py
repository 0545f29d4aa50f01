"""From committed tokens to text that can be shown: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Incremental detokenisation of one row (models/tokenizer.py provides it)."""

    def push(self, token: int) -> str:
        """New whole characters after this token ("" while a character is incomplete)."""

    def flush(self) -> str:
        """What is left at the end."""


class StopText:
    """Accumulates a row's text, holds back what could be the start of a stop string, and notices a full one.

    `text` is the visible text so far; `found` the stop string that ended it, or None.
    """

    def __init__(self, decoder: TextDecoder | None, stops: Sequence[str]) -> None:
        self._decoder, self._stops = decoder, tuple(stops)
        self._held = ""
        self._parts: list[str] = []
        self.found: str | None = None

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._parts)

    def push(self, token: int) -> str:
        """Text released by this token; check `found` afterwards."""
        return "" if self._decoder is None else self._release(self._decoder.push(token))

    def finish(self) -> str:
        """Release everything that is left (the row ended for another reason than a stop string)."""
        tail = "" if self._decoder is None or self.found is not None else self._release(self._decoder.flush())
        if self.found is None and self._held:
            tail += self._held
            self._parts.append(self._held)
            self._held = ""
        return tail

    def _release(self, new: str) -> str:
        if not self._stops:
            self._parts.append(new)
            return new
        self._held += new
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            out, self._held = self._held[:at], ""
        else:
            keep = max(self._overlap(stop) for stop in self._stops)
            cut = len(self._held) - keep
            out, self._held = self._held[:cut], self._held[cut:]
        self._parts.append(out)
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
