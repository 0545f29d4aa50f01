"""What several commands share: loading with a progress bar, checks before loading, streaming, JSON output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.llm import LLM
    from hasten.types import Event, Output

# How a model is loaded: options that several commands have.
Dtype = Annotated[str, typer.Option(help="Precision of the weights: auto (as stored), float32 or bfloat16.")]
Backbone = Annotated[str, typer.Option(help="What runs the model: auto, native (hasten's own kernels) or torch.")]
Activations = Annotated[
    str, typer.Option(help="exact, or int8: faster on quantised weights, and a little less precise (native).")
]
Cache = Annotated[str, typer.Option(help="Keys and values in float32, or smaller, less precise: bfloat16, int8 (native).")]
Weights = Annotated[str, typer.Option(help="stored, or rounded when loaded: int8, int4, int4-min (native; lossy).")]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: all).")]


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) drawn on stderr with an estimate, for bytes with the speed too; silent when
    stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Size(DownloadColumn):
        def render(self, task: Task) -> Text:
            return super().render(task) if task.fields["bytes"] else Text()

    class Speed(TransferSpeedColumn):
        def render(self, task: Task) -> Text:
            return super().render(task) if task.fields["bytes"] else Text()

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Size(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None, bytes=what.startswith(("fetching", "extracting")))
            bar.update(tasks[what], completed=done)

        yield show


def check_methods(names: Iterable[str]) -> None:
    """Refuse an unknown or planned method before a model is loaded; raises as `registry.module` does."""
    from hasten.registry import PRESETS, module, parse

    for name in names:
        slug = parse(name)[0]
        if slug not in PRESETS and slug != "tuned":
            module(slug)


def open_model(model: str, **options: Any) -> LLM:
    """The loaded model, with a progress bar for download and loading; options as `hasten.load`."""
    import hasten

    with progress_bar() as progress:
        return hasten.load(model, progress=progress, **options)


def print_text(events: Iterable[Event]) -> Iterator[Event]:
    """The same events; the text they commit is printed as it arrives, and a line end after the last."""
    for event in events:
        if event.kind == "commit":
            print(event.text, end="", flush=True)
        elif event.output is not None:
            print(flush=True)
        yield event


def read_stdin() -> str:
    """All of standard input, without the line end that a shell adds; raises ConfigError when it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input is not UTF-8 text (byte {error.start})", hint="convert it with iconv", field="prompt"
        ) from None


def as_json(value: Any) -> str:
    """One JSON document on one line."""
    return json.dumps(value, ensure_ascii=False, default=str)


def output_json(llm: LLM, output: Output) -> dict[str, Any]:
    """An Output as the object that `--json` prints."""
    usage = {name: getattr(output.usage, name) for name in output.usage.__slots__}
    usage |= {"tokens_per_s": output.usage.tokens_per_s, "tokens_per_forward": output.usage.tokens_per_forward}
    return {
        "text": output.text,
        "tokens": list(output.tokens),
        "finish_reason": output.finish_reason,
        "stop": output.stop,
        "seed": output.seed,
        "choice": output.choice,
        "method": list(output.method),
        "model": llm.name,
        "usage": usage,
    }


def stats_line(output: Output) -> str:
    """Speed and cost of one output, for people."""
    u = output.usage
    drafting = f"{u.draft_s / u.decode_s:.0%} of the time drafting, " if u.drafted_tokens and u.decode_s else ""
    return (
        f"[{u.completion_tokens} tokens, {u.tokens_per_s:.1f} tokens/s, {u.tokens_per_forward:.2f} tokens per forward, "
        f"{drafting}prompt {u.prompt_tokens} tokens in {u.prefill_s:.2f} s, seed {output.seed}]"
    )


def length(llm: LLM, fields: dict[str, Any], otherwise: int) -> None:
    """Fill in max_tokens where it was not given: the length of an answer that the model is made for, or `otherwise`."""
    fields.setdefault("max_tokens", llm.model.capabilities.canvas or otherwise)


def sampling(**fields: Any) -> dict[str, Any]:
    """The sampling fields that were given, every one checked; raises ConfigError naming the field."""
    from hasten.types import SamplingParams

    given = {name: value for name, value in fields.items() if value not in (None, [], ())}
    SamplingParams(**given)
    return given
