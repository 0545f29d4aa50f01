"""`hasten chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hasten.cli._shared import as_json, open_model, output_json, sampling, stats_line

_HELP = "/reset forgets the conversation, /exit leaves (so does Ctrl-D), Ctrl-C stops an answer."


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("chat")(chat)


def chat(
    model: Annotated[str, typer.Argument(help="Catalog name, directory, hub id, .gguf or .safetensors file.")],
    system: Annotated[str, typer.Option(help="A system message to start with.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the best token; 0.7 varies.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together hold this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeat a conversation exactly.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method (repeatable).")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: all).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Load although the memory check refuses.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed after every answer.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
) -> None:
    """Talk to a model; the conversation is kept until /reset."""
    from hasten.types import SamplingParams

    fields = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    SamplingParams(**fields)
    llm = open_model(model, dtype, threads, force)
    start = [{"role": "system", "content": system}] if system else []
    history = list(start)
    terminal = sys.stdin.isatty() and not json
    if terminal:
        print(_HELP)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        if line == "/exit":
            break
        if line == "/reset":
            history = list(start)
        elif line == "/help":
            print(_HELP)
        elif line:
            history.append({"role": "user", "content": line})
            answer, output = "", None
            events = llm.chat_stream(history, method=method or ["auto"], **fields)
            try:
                for event in events:
                    if event.kind == "commit":
                        answer += event.text
                        if not json:
                            print(event.text, end="", flush=True)
                    output = event.output or output
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            finally:
                events.close()  # type: ignore[attr-defined]
            history.append({"role": "assistant", "content": answer})
            if json and output is not None:
                print(as_json(output_json(llm, output)), flush=True)
            elif not json:
                print()
                if stats and output is not None:
                    print(stats_line(output), file=sys.stderr)
