"""Offline batches: requests from a file, one per line in OpenAI's batch format, to answers in another file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import FormatError
from hasten.serve.batch.lines import Line, LineError, digest, parse, read, survey
from hasten.serve.batch.results import Results, read_note

if TYPE_CHECKING:
    from hasten.llm import LLM

_SHAPING = ("dtype", "backbone", "activations", "cache", "weights")  # of what `load` is told, what changes answers


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run left behind: lines in all, answered by this run, errors among all answers."""

    lines: int
    answered: int
    errors: int


def run_batch(
    model: str,
    batch: Path,
    out: Path,
    *,
    name: str,
    open_model: Callable[[], LLM],
    load: Mapping[str, Any],
    method: Sequence[str] = ("auto",),
    retry_errors: bool = False,
    ray: bool = False,
    ray_address: str | None = None,
    workers: int = 1,
    threads: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Summary:
    """Answer every line of `batch` that has no answer in `out` yet; answers are appended as they are ready.

    `open_model` loads the model here, when something is left to do; with `ray`, `workers` processes load it themselves
    with the arguments `load` and `threads` threads each, on a cluster started for it or at `ray_address`. `name` is what
    requests may call the model. A line's answer depends on the line, the model and `method` alone. Progress is
    reported as ("answering", answered, lines).
    Raises FormatError and ConfigError for files that cannot be used, HastenError when the engine or the workers fail; what
    was answered until then is kept.
    """
    try:
        note = read_note(out)
        seen = survey(batch, 0 if note is None else note["input"]["bytes"])
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", path=str(batch), field="batch") from None
    run = {"model": model, "method": list(method), **{key: load[key] for key in _SHAPING if key in load}}
    results = Results(out, run, seen, retry=retry_errors)
    try:
        before = len(results.answered)

        def step() -> None:
            if progress is not None:
                progress("answering", len(results.answered), len(seen.ids))

        if before < len(seen.ids):
            lines = pending(batch, frozenset(results.answered))
            if ray:
                from hasten.serve.batch.workers import answer_apart

                spec = {
                    "model": model, "name": name, "method": list(method), "load": {**load, "threads": threads},
                    "workers": workers,
                }  # fmt: skip
                answer_apart(batch, lines, results, step, spec, count=workers, threads=threads, address=ray_address)
            else:
                asyncio.run(_here(open_model(), name, tuple(method), lines, results, step))
        return Summary(len(seen.ids), len(results.answered) - before, results.failed)
    finally:
        results.close()


async def _here(
    llm: LLM, name: str, method: tuple[str, ...], lines: Iterator[Line], results: Results, step: Callable[[], None]
) -> None:
    from hasten.serve.batch.answering import Answering, answer_all

    step()
    async with Answering(llm, name, method) as answering:
        await answer_all(answering, lines, results, step)


def pending(path: Path, answered: frozenset[bytes]) -> Iterator[Line]:
    """The lines of an input whose ids are not among those `answered`."""
    for line in read(path):
        try:
            id = parse(line.number, line.raw).id
        except LineError as error:
            id = error.id
        if digest(id) not in answered:
            yield line
