"""A batch on several processes or machines: Ray Data feeds lines to actors, each with an engine, and hands answers back.

Answers reach the one writer in small blocks as they are ready. A worker that dies is started again and the blocks it
had not handed over are answered anew; as an answer depends on its line alone, it is the same one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hasten.engine.limits import LIMITS
from hasten.errors import HastenError
from hasten.serve.batch.answering import AHEAD, Answering
from hasten.serve.batch.lines import Line, read
from hasten.serve.batch.results import Results
from hasten.serve.cluster import cluster

_BLOCK = 4  # lines that are handed over together
_TASK_LINES, _TASK_BYTES = 1_024, 4_000_000  # what one reading task covers
_DEATHS = 16  # of one worker, before the run is given up
_RETRIES = 4  # of a block whose worker died


class LineWorker:
    """What an actor of Ray Data runs: one engine, and answers for blocks of lines.

    `spec` holds plain values: `model` and `load` (arguments of hasten.load), `name`, `method`, `workers` (how many share
    the machine's memory).
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        import hasten
        from hasten.models.memory import available_bytes

        cache = int(available_bytes() * LIMITS.cache_share / spec["workers"])
        llm = hasten.load(spec["model"], cache_bytes=cache, **spec["load"])
        self._answering = Answering(llm, spec["name"], tuple(spec["method"]))
        self._entered: Any = None

    async def __call__(self, block: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
        """Answers as JSON text for the lines of a block, in their order."""
        if self._entered is None:
            self._entered = asyncio.ensure_future(self._answering.__aenter__())
        await asyncio.shield(self._entered)
        lines = zip(block["number"], block["line"], strict=True)
        answers = await asyncio.gather(*(self._answering.answer(int(number), bytes(raw)) for number, raw in lines))
        return {"row": [json.dumps(answer) for answer in answers]}


def answer_apart(
    path: Path,
    lines: Iterable[Line],
    results: Results,
    progress: Callable[[], None],
    spec: Mapping[str, Any],
    *,
    count: int,
    threads: int,
    address: str | None,
) -> None:
    """Answer `lines` of the file at `path` with `count` workers of `threads` CPU threads each.

    The file is read on this machine, so others need not see it; the model is loaded where a worker runs. Raises
    MissingExtraError without Ray, HastenError when workers cannot load the model or keep dying.
    """
    runs = list(stretches(lines))
    with cluster(address, count * threads + 1) as ray:  # one for reading
        import ray.data as data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.log_internal_stack_trace = False
        here = ray.util.get_node_ip_address()
        source = data.read_datasource(
            _source(path, runs),
            override_num_blocks=len(runs),
            concurrency=1,
            num_cpus=0,
            resources={f"node:{here}": 0.001},  # read where the file is
        ).repartition(target_num_rows_per_block=_BLOCK)
        pool = data.ActorPoolStrategy(
            size=count,
            max_tasks_in_flight_per_actor=AHEAD // _BLOCK,
            max_concurrent_calls_per_actor=AHEAD // _BLOCK,
        )
        with warnings.catch_warnings():  # Ray 2.60 to 2.63 have no other way to say that a line may not kill for ever
            warnings.simplefilter("ignore", DeprecationWarning)
            answered = source.map_batches(
                LineWorker,
                fn_constructor_args=(dict(spec),),
                batch_size=None,
                compute=pool,
                num_cpus=threads,
                max_restarts=_DEATHS,
                max_task_retries=_RETRIES,
            )
        try:
            for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
                for text in batch["row"]:
                    if results.add(json.loads(text)):
                        progress()
        except (ray.exceptions.RayError, data.exceptions.UserCodeException, data.exceptions.SystemException) as error:
            raise HastenError(
                f"the workers failed: {_cause(error)}", hint="what was answered is kept; the same command goes on"
            ) from error


def stretches(lines: Iterable[Line]) -> Iterable[tuple[int, int, int, int]]:
    """(first byte, byte behind the last, number of the first line, lines) of runs that one task reads."""
    start = end = number = count = 0
    for line in lines:
        if count and (line.start != end or count >= _TASK_LINES or end - start >= _TASK_BYTES):
            yield start, end, number, count
            count = 0
        if not count:
            start, number = line.start, line.number
        end, count = line.end, count + 1
    if count:
        yield start, end, number, count


def read_blocks(path: str, start: int, end: int, number: int) -> Iterable[Any]:
    """The lines of a stretch as Arrow tables of a block each: `number` and `line`, the bytes."""
    import pyarrow

    block: list[Line] = []

    def table() -> Any:
        return pyarrow.table({"number": [line.number for line in block], "line": [line.raw for line in block]})

    for line in read(Path(path), start, end, number):
        block.append(line)
        if len(block) == _BLOCK:
            yield table()
            block = []
    if block:
        yield table()


def _source(path: Path, runs: Sequence[tuple[int, int, int, int]]) -> Any:
    """The file as a source of Ray Data: one reading task for every stretch.

    Not read_json, which makes one table of all lines: what a line leaves out would come back as null.
    """
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Lines(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return sum(end - start for start, end, _, _ in runs)

        def get_read_tasks(self, parallelism: int, *limits: Any, **more: Any) -> list[Any]:
            tasks = []
            for start, end, number, count in runs:
                facts = BlockMetadata(num_rows=count, size_bytes=end - start, input_files=None, exec_stats=None)
                tasks.append(ReadTask(partial(read_blocks, str(path.resolve()), start, end, number), facts))
            return tasks

    return Lines()


def _cause(error: BaseException) -> str:
    """The innermost reason that says something, in a line: Ray's own messages hold tracebacks, which end with it."""
    found: str = type(error).__name__
    inner: BaseException | None = error
    while inner is not None:
        lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
        found = lines[-1] if lines else found
        inner = inner.__cause__
    return re.sub(r"^(\w+\.)+\w+: ", "", found)[:300]
