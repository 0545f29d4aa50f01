"""Logs for people and for machines: one line per entry, control characters escaped, prompts and answers never."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from hasten.errors import out_of_range

LEVELS = ("debug", "info", "warning", "error")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def escaped(text: str, most: int = 2000) -> str:
    """`text` on one line: line ends and other control characters as escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:most])
    return shown + "…" if len(text) > most else shown


class Lines(logging.Formatter):
    """Time, level, message and fields; or the same as a JSON object."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line; an exception's traceback is part of it, escaped."""
        fields: dict[str, Any] = {
            name: value for name, value in vars(record).items() if name not in _OWN and name[0] != "_"
        }
        trouble = self.formatException(record.exc_info) if record.exc_info else ""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        if self._json:
            entry = {"time": when, "level": record.levelname.lower(), "message": escaped(record.getMessage()), **fields}
            if trouble:
                entry["traceback"] = trouble
            return json.dumps(entry, default=str)
        tail = "".join(f" {name}={escaped(str(value), 200)}" for name, value in fields.items())
        lines = f" | {escaped(trouble, 8000)}" if trouble else ""
        return f"{when} {record.levelname.lower():7} {escaped(record.getMessage())}{tail}{lines}"


def configure(level: str, as_json: bool) -> None:
    """Send hasten's and uvicorn's logs to standard error; raises ConfigError for an unknown level."""
    if level not in LEVELS:
        raise out_of_range("log_level", level, ", ".join(LEVELS))
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(Lines(as_json))
    for name in ("hasten", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [out], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel("WARNING" if level == "info" else level.upper())


def say(text: str) -> None:
    """One line for the person who started the server."""
    logging.getLogger("hasten.serve").info(text)
