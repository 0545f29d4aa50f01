"""Logs for people and for machines: one line per entry, control characters escaped, prompts and answers never."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from types import TracebackType
from typing import Any

from hasten.errors import out_of_range

LEVELS = ("debug", "info", "warning", "error")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_PLAIN = re.compile(r"[^\s\"'=]+\Z")
_VALUE = 200  # characters of one field that are written


def escaped(text: str, most: int = 2000) -> str:
    """`text` on one line: line ends and other control characters as escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:most])
    return shown + "…" if len(text) > most else shown


class Lines(logging.Formatter):
    """Time, level, message and fields; or the same as a JSON object.

    Of an exception the places and the type are written, its message only with `messages`: it may quote what somebody asked.
    """

    def __init__(self, as_json: bool, messages: bool = False) -> None:
        super().__init__()
        self._json, self._messages = as_json, messages

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message, the fields and the exception hold."""
        given = {name: value for name, value in vars(record).items() if name not in _OWN and name[0] != "_"}
        fields = {name: _plain(value) for name, value in given.items()}
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        level, message = record.levelname.lower(), escaped(record.getMessage())
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self._trouble(record.exc_info[0], record.exc_info[1], record.exc_info[2])
        if self._json:
            return json.dumps({"time": when, "level": level, "logger": record.name, "message": message, **fields})
        return f"{when} {level:7} {message}" + "".join(f" {name}={_shown(value)}" for name, value in fields.items())

    def _trouble(self, kind: type[BaseException], error: BaseException | None, at: TracebackType | None) -> str:
        frames = traceback.extract_tb(at, 30)
        places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
        told = f": {escaped(str(error))}" if self._messages else ""
        return f"{kind.__name__}{told} at {' > '.join(places)}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float)) or value is None else escaped(str(value), _VALUE)


def _shown(value: Any) -> str:
    """A field's value, quoted where its end would not be seen."""
    text = str(value)
    return text if _PLAIN.match(text) else json.dumps(text, ensure_ascii=False)


def configure(level: str, as_json: bool) -> None:
    """Send the logs of this process to standard error, one line each; raises ConfigError for an unknown level.

    Other libraries are heard from warnings on.
    """
    if level not in LEVELS:
        raise out_of_range("log_level", level, ", ".join(LEVELS))
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(Lines(as_json, messages=level == "debug"))
    root = logging.getLogger()
    root.handlers = [out]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("hasten").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel("WARNING" if level == "info" else level.upper())


def say(text: str, level: str = "info") -> None:
    """One line for the person who started the server."""
    logging.getLogger("hasten.serve").log(logging.getLevelName(level.upper()), text)
