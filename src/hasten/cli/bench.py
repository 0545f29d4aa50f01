"""`hasten bench`: measure a model on this machine."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli._shared import Threads, as_json, progress_bar

SUITES = ("kernels",)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("bench")(bench)


def bench(
    model: Annotated[str, typer.Argument(help="Catalog name or .gguf file.")],
    suite: Annotated[str, typer.Option(help="What to measure: kernels (the native stack, and other programs).")],
    rounds: Annotated[int, typer.Option(help="Rounds in which all programs decode in turn.")] = 7,
    tokens: Annotated[int, typer.Option(help="Tokens decoded by each program in a round.")] = 128,
    peers: Annotated[
        list[str] | None, typer.Option(help="Programs to compare with (repeatable): llama.cpp, transformers, none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure a model on this machine; run it with nothing else running.

    Speed is stated as ratios taken within one alternating run, with their spread.
    """
    from hasten.bench.kernels import PEERS, measure
    from hasten.errors import unknown_name

    if suite not in SUITES:
        raise unknown_name("suite", suite, SUITES)
    for name in peers or ():
        if name not in (*PEERS, "none"):
            raise unknown_name("peer", name, (*PEERS, "none"))
    wanted = PEERS if peers is None else tuple(name for name in peers if name != "none")
    with progress_bar() as progress:
        result = measure(model, rounds=rounds, tokens=tokens, peers=wanted, progress=progress, threads=threads)
    if out is not None:
        out.write_text(dumps(result, indent=1) + "\n", encoding="utf-8")
    if json:
        typer.echo(as_json(result))
        return
    for line in _lines(result):
        typer.echo(line)


def _lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    out = [
        f"{result['model']}: {result['weight_mb']} MB of weights a token, {result['isa']}, "
        f"{result['machine']['threads']} threads; this machine reads {result['read_gb_per_s']} GB/s"
    ]
    if "loading" in result:
        f = result["loading"]
        out.append(
            f"repacking {f['repack_s']:.2f} s; load to first token, packed before: {f['load_to_first_token_s']:.2f} s"
        )
    for mode in ("hasten exact", "hasten int8"):
        r = result[mode]
        ratios = ", ".join(f"{n}: {v}" for n, v in r["ratio_to_one"].items())
        parts = ", ".join(f"{name} {share:.0%}" for name, share in r["share_of_time"]["1"].items())
        out += [
            f"{mode}: {r['short_context_ms']:.2f} ms a token, {r['gb_per_s']} GB/s ({r['share_of_bandwidth']:.0%} of that)",
            f"  prompts: {r['prompt_tokens_per_s']} tokens/s",
            f"  a pass over T tokens against one: {ratios}",
            f"  of one token's time: {parts}",
            f"  a canvas of 256: {r['canvas_256_ms']} ms; a block of 32 of it, the rest cached: {r['block_32_ms']} ms, "
            f"{r['canvas_over_block']}x less",
        ]
        for name, f in result[f"race, {mode}"].items():
            s, x = f["tokens_per_s"], f["first_over_this"]
            out.append(
                f"  {name}: {s['median']:.0f} tokens/s ({s['min']:.0f}-{s['max']:.0f})"
                + ("" if name == mode else f", hasten is {x['median']:.2f}x ({x['min']:.2f}-{x['max']:.2f}) as fast")
            )
    return out
