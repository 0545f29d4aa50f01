"""`hasten run --batch`: a file of requests to a file of answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli._shared import as_json, check_methods, progress_bar
from hasten.errors import ConfigError, out_of_range

Batch = Annotated[
    Path | None, typer.Option(help="Answer the requests of this JSONL file (OpenAI's batch format, or the short one).")
]
Out = Annotated[Path | None, typer.Option(help="With --batch: the JSONL file of answers; a second run goes on with it.")]
Retry = Annotated[bool, typer.Option("--retry-errors", help="With --batch: ask again what was answered with an error.")]
UseRay = Annotated[bool, typer.Option("--ray", help="With --batch: several processes or machines, through Ray Data.")]
RayAddress = Annotated[
    str | None, typer.Option(help="With --ray: a cluster that runs already (default: one of this machine, for this run).")
]
Workers = Annotated[int | None, typer.Option(help="With --ray: processes, each with the model and its share of threads.")]

_OWN = ("out", "retry_errors", "ray", "ray_address", "workers")
_LOADING = ("dtype", "backbone", "activations", "cache", "weights", "force")
_SHARED = ("model", "batch", "method", "threads", "json", *_LOADING)


def answer_batch(context: typer.Context) -> bool:
    """Run the batch that the command line asks for; False when it asks for none.

    Raises ConfigError for an option that has no meaning here: what a request may say stands in its line.
    """
    given = context.params
    said = [name for name in given if str(context.get_parameter_source(name)).endswith(".COMMANDLINE")]
    if given["batch"] is None:
        for name in said:
            if name in _OWN:
                raise ConfigError(f"--{name.replace('_', '-')} is for --batch", hint="add --batch FILE", field=name)
        return False
    for name in said:
        if name not in (*_OWN, *_SHARED):
            option = "the prompt" if name == "prompt" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} does not go with --batch", hint="say it in the lines of the file", field=name)
    if given["out"] is None:
        raise ConfigError("--batch needs --out", hint="add --out FILE, for the answers", field="out")
    for name in ("ray_address", "workers"):
        if given[name] is not None and not given["ray"]:
            raise ConfigError(f"--{name.replace('_', '-')} is for --ray", hint="add --ray", field=name)
    _run(given)
    return True


def _run(given: dict[str, Any]) -> None:
    import hasten
    from hasten.serve.batch import run_batch
    from hasten.serve.run import named

    method = given["method"] or ["auto"]
    check_methods(method)
    workers = 1 if given["workers"] is None else given["workers"]
    if not 1 <= workers <= 1024:
        raise out_of_range("workers", workers, "an integer in [1, 1024]")
    load = {name: given[name] for name in _LOADING}
    threads = given["threads"]
    with progress_bar() as progress:
        summary = run_batch(
            given["model"],
            given["batch"],
            given["out"],
            name=next(iter(named([given["model"]], {}, {}))),
            open_model=lambda: hasten.load(given["model"], threads=threads, progress=progress, **load),
            load=load,
            method=method,
            retry_errors=given["retry_errors"],
            ray=given["ray"],
            ray_address=given["ray_address"],
            workers=workers,
            threads=threads or max(1, (os.cpu_count() or 1) // workers),
            progress=progress,
        )
    if given["json"]:
        typer.echo(as_json({"lines": summary.lines, "answered": summary.answered, "errors": summary.errors}))
        return
    print(
        f"{summary.answered} answered now, {summary.lines} in all, {summary.errors} of them errors: {given['out']}",
        file=sys.stderr,
    )
