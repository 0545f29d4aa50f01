"""`hasten run`: one prompt in, text out as it is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli._batch import Batch, Out, RayAddress, Retry, UseRay, Workers, answer_batch
from hasten.cli._canvas import watch_canvas
from hasten.cli._grammar import Choice, Lark, Regex, Schema, form
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
    read_stdin,
    sampling,
    stats_line,
)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("run")(run)


def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Catalog name, directory, hub id, .gguf or .safetensors file.")],
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" reads it from standard input.')] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most; by default 256, or the length the model is made for.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the best token; 0.7 varies; above 1 wanders.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together hold this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many of the likeliest tokens (0 = all).")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the best one.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens of the prompt and the answer less likely.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Above 0 makes tokens of the answer less likely, once.")] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Above 0 makes tokens of the answer less likely each time they appear.")
    ] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text (repeatable).")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's own end (for timing).")] = False,
    seed: Annotated[int | None, typer.Option(help="Repeat an answer exactly; every answer reports its seed.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help='How to decode, e.g. "prompt-lookup:nodes=4" (repeatable; see `methods`).')
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="File with what drafters have learnt: read if it is there, written at the end.")
    ] = None,
    schema: Schema = None,
    regex: Regex = None,
    choice: Choice = None,
    grammar: Lark = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the canvas as it fills: final, provisional and masked places.")
    ] = False,
    fill: Annotated[
        bool, typer.Option("--fill", help="Fill each <mask:N> of the prompt with N tokens (models that fill canvases).")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    dtype: Dtype = "auto",
    backbone: Backbone = "auto",
    activations: Activations = "exact",
    cache: Cache = "float32",
    weights: Weights = "stored",
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Load although the memory check refuses.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and cost to standard error.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    batch: Batch = None,
    out: Out = None,
    retry_errors: Retry = False,
    ray: UseRay = False,
    ray_address: RayAddress = None,
    workers: Workers = None,
) -> None:
    """Generate from one prompt, text appears as it is made; or answer a file of requests (--batch)."""
    if answer_batch(context):
        return
    from hasten.errors import ConfigError

    fields = sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, stop=stop, ignore_eos=ignore_eos, seed=seed,
    )  # fmt: skip
    if watch and (json or fill):
        raise ConfigError("--watch shows text as it is made; leave out --json and --fill", field="watch")
    asked = form(schema, regex, choice, grammar)
    if asked is not None and fill:
        raise ConfigError("--fill has no grammar; its text around the slots is its form", field="fill")
    chosen = method or ["auto"]
    check_methods(chosen)
    if prompt is None:
        raise ConfigError("prompt is missing", hint="give a prompt, - for standard input, or --batch FILE", field="prompt")
    text = read_stdin() if prompt == "-" else prompt
    if not text:
        raise ConfigError("prompt is empty; prompt must hold at least one character", field="prompt")
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
    if fill:
        filled = llm.fill(text, method=chosen, **fields)
        typer.echo(as_json(output_json(llm, filled)) if json else filled.text)
        if stats:
            print(stats_line(filled), file=sys.stderr)
        return
    length(llm, fields, 256)
    if asked is not None:
        fields["grammar"] = asked
    if not raw and llm.tokenizer is not None and llm.tokenizer.chat_template is not None:
        events = llm.chat_stream([{"role": "user", "content": text}], method=chosen, **fields)
    else:
        events = llm.stream(text, method=chosen, **fields)
    shown = events if json else watch_canvas(llm, events) if watch else print_text(events)
    for event in shown:
        if event.output is not None:
            if json:
                typer.echo(as_json(output_json(llm, event.output)))
            if stats:
                print(stats_line(event.output), file=sys.stderr)
    if state is not None:
        llm.save_state(state)
