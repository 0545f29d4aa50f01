"""What goes wrong in a step stays in it: one place that catches, and the words for what was caught."""

from __future__ import annotations

import logging
from types import TracebackType

from hasten.errors import HastenError

_WORDS = ("not enough memory", "DefaultCPUAllocator", "allocate memory", "out of memory", "no memory for")
_LONGEST = 300  # characters of a foreign error that are passed on


class contained:
    """Run a `with` block whose failure must not end others; it is in `error` afterwards, None when there was none.

    Errors that nobody raised on purpose are logged with their trace.
    """

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> contained:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        if not isinstance(error, HastenError) and not out_of_memory(error):
            logging.getLogger("hasten.engine").error("a row of a pass failed", exc_info=error)
        return True


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: Python's, torch's or the native library's."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, HastenError)) and any(word in str(error) for word in _WORDS)


def words(error: Exception) -> str:
    """What a row says of the error that ended it, on one line."""
    if out_of_memory(error):
        return "there was not enough memory for this request's part of a pass"
    text = str(error) if isinstance(error, HastenError) else f"the pass failed ({type(error).__name__}: {error})"
    return " ".join(text.split())[:_LONGEST]
