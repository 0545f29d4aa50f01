"""What several commands share: loading with a progress bar, JSON output, sampling options as a dict."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.llm import LLM


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) drawn as a bar with an estimate on stderr; silent when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done)

        yield show


def open_model(model: str, dtype: str, threads: int | None, force: bool) -> LLM:
    """The loaded model, with a progress bar for download and loading."""
    import hasten

    with progress_bar() as progress:
        return hasten.load(model, dtype=dtype, threads=threads, force=force, progress=progress)


def as_json(value: Any) -> str:
    """One JSON document."""
    return json.dumps(value, ensure_ascii=False, default=str)


def output_json(llm: LLM, output: Any) -> dict[str, Any]:
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


def stats_line(output: Any) -> str:
    """Speed and cost of one output, for people."""
    u = output.usage
    return (
        f"[{u.completion_tokens} tokens, {u.tokens_per_s:.1f} tokens/s, {u.tokens_per_forward:.2f} tokens per forward, "
        f"prompt {u.prompt_tokens} tokens in {u.prefill_s:.2f} s, seed {output.seed}]"
    )


def sampling(**fields: Any) -> dict[str, Any]:
    """Sampling fields without those that were not given."""
    return {name: value for name, value in fields.items() if value not in (None, [], ())}
