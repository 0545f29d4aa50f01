"""`hasten chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli._shared import (
    Activations,
    Backbone,
    Cache,
    Dtype,
    Threads,
    Weights,
    as_json,
    check_methods,
    length,
    open_model,
    output_json,
    print_text,
    sampling,
    stats_line,
)

if TYPE_CHECKING:
    from hasten.llm import LLM
    from hasten.types import Output

_HELP = "/reset forgets the conversation, /exit leaves (so does Ctrl-D), Ctrl-C stops an answer, /help prints this."
_COMMAND = re.compile(r"/[a-z]+")
_IMPATIENT_S = 0.5  # two signals within this time are one Ctrl-C


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("chat")(chat)


def chat(
    model: Annotated[str, typer.Argument(help="Catalog name, directory, hub id, .gguf or .safetensors file.")],
    system: Annotated[str, typer.Option(help="A system message to start with.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens per answer at most; by default 512, or the length the model is made for.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the best token; 0.7 varies.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together hold this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeat a conversation exactly.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="How to decode (repeatable; see `methods`).")] = None,
    state: Annotated[
        Path | None, typer.Option(help="File with what drafters have learnt: read if it is there, written at the end.")
    ] = None,
    dtype: Dtype = "auto",
    backbone: Backbone = "auto",
    activations: Activations = "exact",
    cache: Cache = "float32",
    weights: Weights = "stored",
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Load although the memory check refuses.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed after every answer.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
) -> None:
    """Talk to a model; the conversation is kept until /reset."""
    from hasten.errors import HastenError

    fields = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    chosen = method or ["auto"]
    check_methods(chosen)
    llm = open_model(
        model,
        dtype=dtype,
        backbone=backbone,
        activations=activations,
        cache=cache,
        weights=weights,
        threads=threads,
        force=force,
    )
    if state is not None and state.exists():
        llm.load_state(state)
    length(llm, fields, 512)
    start = [{"role": "system", "content": system}] if system else []
    history = list(start)
    terminal, ctrl_c = sys.stdin.isatty(), _CtrlC()
    if terminal:
        signal.signal(signal.SIGINT, ctrl_c)
    for line in _lines(terminal, ctrl_c):
        if line == "/exit":
            break
        if line == "/reset":
            history = list(start)
        elif _COMMAND.fullmatch(line):
            print(_HELP if line == "/help" else f"no such command: {line}. {_HELP}", file=sys.stderr)
        else:
            history.append({"role": "user", "content": line})
            try:
                answer, output = _answer(llm, history, json, {"method": chosen, **fields}, ctrl_c)
            except HastenError as error:
                if not terminal:
                    raise
                history.pop()  # the conversation goes on as if this had not been said
                print(f"error: {error.message}\nhint: {error.hint or '/reset starts again'}", file=sys.stderr)
                continue
            history.append({"role": "assistant", "content": answer})
            if stats and output is not None:
                print(stats_line(output), file=sys.stderr)
    if state is not None:
        llm.save_state(state)


class _CtrlC:
    """Ctrl-C as people mean it: it stops what is being typed or answered, and nothing else, however often it is pressed."""

    def __init__(self) -> None:
        self.heard, self.last_s = False, -math.inf

    def listen(self, behind_answer: bool = False) -> None:
        """From here on there is something to stop, until `heard` is set to False.

        `behind_answer`: not by what was pressed to stop the answer before. readline hears that late, with the next line.
        """
        self.heard = True
        if not behind_answer:
            self.last_s = -math.inf

    def __call__(self, *signal: object) -> None:
        now_s = time.monotonic()
        if self.heard and now_s - self.last_s > _IMPATIENT_S:  # what is stopping is not stopped again
            self.last_s = now_s
            raise KeyboardInterrupt


def _lines(terminal: bool, ctrl_c: _CtrlC) -> Iterator[str]:
    """What the user says, line by line and never empty, until the end of input; Ctrl-C drops the line being typed."""
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - importing it gives input() history and arrow keys
        print(_HELP, file=sys.stderr)
    answered = False
    while True:
        try:
            try:
                ctrl_c.listen(behind_answer=answered)
                answered = False
                line = input("> " if terminal else "").strip()
            finally:
                ctrl_c.heard = False
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(file=sys.stderr)
            continue
        if line:
            yield line
            answered = True


def _answer(
    llm: LLM, history: list[dict[str, str]], json: bool, options: dict[str, Any], ctrl_c: _CtrlC
) -> tuple[str, Output | None]:
    """The answer as it was printed, and its Output; None when Ctrl-C stopped it."""
    parts: list[str] = []
    events: Any = llm.chat_stream(history, **options)
    with closing(events):
        try:
            try:
                ctrl_c.listen()
                for event in events if json else print_text(events):
                    if event.kind == "commit":
                        parts.append(event.text)
                    if event.output is not None:
                        if json:
                            typer.echo(as_json(output_json(llm, event.output)))
                        return "".join(parts), event.output
            finally:
                ctrl_c.heard = False
        except KeyboardInterrupt:
            print(" [stopped]", file=sys.stderr)
    return "".join(parts), None
