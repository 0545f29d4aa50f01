"""What goes wrong in a step stays in it: one place that catches, and the words for what was caught."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hasten.errors import HastenError

_WORDS = ("not enough memory", "DefaultCPUAllocator", "allocate memory", "out of memory", "no memory for")
_LONGEST = 300  # characters of a foreign error that are passed on


@dataclass(slots=True)
class Caught:
    """The error that ended a `contained` block, None when it ran to its end."""

    error: Exception | None = None


@contextmanager
def contained() -> Iterator[Caught]:
    """Run a block whose failure must not end others; errors that nobody raised on purpose are logged with their trace."""
    caught = Caught()
    try:
        yield caught
    except Exception as error:
        caught.error = error
        if not isinstance(error, HastenError) and not out_of_memory(error):
            logging.getLogger("hasten.engine").error("a row of a pass failed", exc_info=error)


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
