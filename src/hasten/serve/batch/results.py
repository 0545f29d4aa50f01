"""The output of a batch: a line per answer, appended whole, and a note beside it that says what the file belongs to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hasten.errors import ConfigError, FormatError
from hasten.serve.batch.lines import Survey, digest

_SYNC_S = 1.0  # what a power cut may cost; a killed process loses nothing that was written


def note_path(out: Path) -> Path:
    """The file beside `out` that says which input, model and settings it belongs to."""
    return out.with_name(out.name + ".run")


def read_note(out: Path) -> dict[str, Any] | None:
    """That file's content; None when there is none. Raises FormatError when it is damaged."""
    try:
        note = json.loads(note_path(out).read_text(encoding="utf-8"))
        if isinstance(note["input"]["bytes"], int) and isinstance(note["input"]["sha256"], str):
            return note
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise FormatError("is damaged", path=note_path(out).name, hint="choose another --out", field="out")


class Results:
    """Appends answers to `out`; `answered` holds the digests of the ids that have one, `failed` counts errors among them.

    Opening repairs: a last line that was cut is dropped. With `retry`, lines that hold errors are too. `run` says what
    shapes the answers (model, settings). Raises ConfigError when `out` belongs to another run or is being written to.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], survey: Survey, *, retry: bool = False) -> None:
        self.out = out
        self.answered: set[bytes] = set()
        self.failed = 0
        self._file = self._open()
        try:
            self._claim(run, survey)
            self._load(retry)
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def _open(self) -> int:
        file = os.open(self.out, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            import fcntl
        except ImportError:  # no such locks here
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise ConfigError(
                f"out = {str(self.out)!r} is being written by another run", hint="wait for its end", field="out"
            ) from None
        return file

    def _claim(self, run: Mapping[str, Any], survey: Survey) -> None:
        """Check that the file is this run's, or make it so."""
        note, size = read_note(self.out), os.fstat(self._file).st_size
        if size:
            way_out = "choose another --out, or remove this one"
            if note is None:
                raise ConfigError(f"out = {str(self.out)!r} holds something else", hint=way_out, field="out")
            for name, value in run.items():
                if note.get(name) != value:
                    raise ConfigError(
                        f"out = {str(self.out)!r} was made with {name} = {note.get(name)!r}, not {value!r}",
                        hint=way_out,
                        field="out",
                    )
            if note["input"]["sha256"] not in (survey.sha256, survey.prefix_sha256):
                raise ConfigError(f"out = {str(self.out)!r} belongs to another input", hint=way_out, field="out")
        whole = {**run, "input": {"bytes": survey.size, "sha256": survey.sha256}}
        part = note_path(self.out).with_name(note_path(self.out).name + ".part")
        part.write_text(json.dumps(whole) + "\n", encoding="utf-8")
        part.replace(note_path(self.out))

    def _load(self, retry: bool) -> None:
        """Find what is answered; drop a cut last line, and errors that are to be tried again."""
        end, kept = 0, None
        if retry:
            kept = self.out.with_name(self.out.name + ".part").open("wb")
        try:
            for start, raw, row in self._rows():
                end = start + len(raw)
                wrong = failed(row)
                if kept is not None:
                    if wrong:
                        continue
                    kept.write(raw)
                if digest(row["custom_id"]) in self.answered:
                    raise FormatError(
                        f"{row['custom_id'][:60]!r} is answered twice", path=self.out.name, hint="choose another --out"
                    )
                self.answered.add(digest(row["custom_id"]))
                self.failed += wrong
        finally:
            if kept is not None:
                os.fsync(kept.fileno())
                kept.close()
        if kept is None:
            os.ftruncate(self._file, end)
            return
        Path(kept.name).replace(self.out)
        os.close(self._file)
        self._file = self._open()

    def _rows(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """(start, bytes, content) of the whole lines; raises FormatError for one that is none of ours."""
        start = 0
        with self.out.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                try:
                    row = json.loads(raw)
                    if not isinstance(row["custom_id"], str):
                        raise TypeError
                    failed(row)
                except (ValueError, KeyError, TypeError):
                    if not file.read(1):  # the last line: what a power cut left of it
                        return
                    raise FormatError(
                        f"byte {start} begins a line that is no answer", path=self.out.name, hint="choose another --out"
                    ) from None
                yield start, raw, row
                start += len(raw)

    def add(self, row: Mapping[str, Any]) -> bool:
        """Append one answer in one write; False, and nothing written, when its id has one already."""
        key = digest(row["custom_id"])
        if key in self.answered:
            return False
        # a lone surrogate becomes its JSON escape
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self._file, data) :]
        self.answered.add(key)
        self.failed += failed(row)
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._file)
            self._synced = time.monotonic()
        return True

    def close(self) -> None:
        """Make sure that everything is on the disk."""
        os.fsync(self._file)
        os.close(self._file)


def failed(row: Mapping[str, Any]) -> bool:
    """Whether a line of the output says that its request was not answered."""
    return row["error"] is not None or row["response"]["status_code"] != 200


def row(id: str, status: int, body: Any) -> dict[str, Any]:
    """A line of the output: what the route answered."""
    name = digest(id).hex()
    return {
        "id": f"batch_req_{name}",
        "custom_id": id,
        "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
        "error": None,
    }


def error_row(id: str, code: str, message: str) -> dict[str, Any]:
    """A line of the output: why there was nothing to ask a route."""
    return {
        "id": f"batch_req_{digest(id).hex()}",
        "custom_id": id,
        "response": None,
        "error": {"code": code, "message": message},
    }
