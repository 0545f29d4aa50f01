"""`hasten bench`: measure a model, and methods side by side, on this machine."""

from __future__ import annotations

from json import dumps
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
    open_model,
    progress_bar,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SUITES = ("spec", "canvas", "humaneval", "perplexity", "tasks", "kernels", "parallelbench")
_ALWAYS = {"model", "suite", "out", "threads", "json"}
_LOADING = {"dtype", "backbone", "activations", "cache", "weights"}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("bench")(bench)


def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Catalog name, directory, hub id, .gguf or .safetensors file.")],
    suite: Annotated[
        str,
        typer.Option(
            help="What is asked: spec (task groups, left to right), canvas (procedural worlds), humaneval, tasks "
            "(puzzles), perplexity, parallelbench, kernels (the native stack), or a .jsonl file with prompts of your own."
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Arms to compare: a comma between arms, + between the methods of one, as in "
            "plain,threshold:tau=0.8+canvas-cache. Others are measured against the first (default: the suite's own)."
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            help="Other programs to compare with (repeatable): transformers, llama.cpp; reference samplers of canvases: "
            "llada, dream, fast-dllm; none. Suite kernels takes the first two unless told otherwise, other suites none."
        ),
    ] = None,
    per_group: Annotated[
        int | None, typer.Option(help="Cases of each group (task, world, puzzle) and seed; windows for perplexity.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Only these groups (spec, tasks) or worlds (canvas), by commas.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens of an answer (kernels: decoded in a round, 128).")] = None,
    canvas: Annotated[str | None, typer.Option(help="Suite canvas: lengths, by commas (default 64,128).")] = None,
    seeds: Annotated[str, typer.Option(help="Draws of cases, by commas; figures are medians over them.")] = "0,1,2",
    whole_drafts: Annotated[
        bool,
        typer.Option("--whole-drafts", help="Verify all that is drafted, not only what pays on this machine."),
    ] = False,
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Suite humaneval: run the code that the model writes, in a limited process."),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Suite perplexity: a text file (default: Python's own documentation).")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Suite perplexity: tokens of a window, its second half scored.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Suite perplexity, canvas models: Monte-Carlo samples of the bound.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Suite kernels: rounds in which all programs decode in turn.")] = 7,
    out: Annotated[
        Path | None, typer.Option(help="Write the result to this .json file, and a report with plots to .html beside it.")
    ] = None,
    dtype: Dtype = "auto",
    backbone: Backbone = "auto",
    activations: Activations = "exact",
    cache: Cache = "float32",
    weights: Weights = "stored",
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure methods side by side on your own machine; run it with nothing else running.

    Every case is answered by every arm in turn, the order turning from case to case; quality stands beside speed, and speed
    is a ratio taken within the run, with its spread over seeds. Options that mean nothing to a suite are refused.
    """
    from hasten.errors import ConfigError

    given = {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") not in ("DEFAULT", "DEFAULT_MAP")
    }
    if out is not None and ((out.suffix != ".json" and suite != "kernels") or not out.parent.is_dir()):
        raise ConfigError(
            f"out = {str(out)!r} is not allowed; out must be a .json file in a folder that is there", field="out"
        )
    if suite == "kernels":
        _only(suite, given, {"rounds", "tokens", "peers"})
        result = _kernels(model, rounds, 128 if tokens is None else tokens, peers, threads)
    else:
        asked = {"per_group": per_group, "groups": groups, "tokens": tokens, "canvas": canvas, "run_code": run_code,
                 "text": text and str(text), "window": window, "samples": samples}  # fmt: skip
        loading = {"dtype": dtype, "backbone": backbone, "activations": activations, "cache": cache, "weights": weights}
        result = _suite(
            model, suite, given, asked, {**loading, "threads": threads}, methods, peers or (), _seeds(seeds), whole_drafts
        )
    lines = _kernel_lines(result) if suite == "kernels" else _suite_lines(result)
    if out is not None:
        from hasten.bench.page import page

        out.write_text(dumps(result, indent=1) + "\n", encoding="utf-8")
        shown = _kernel_report(result, lines) if suite == "kernels" else result
        report = out.with_name(f"{out.name.removesuffix('.json')}.html")
        report.write_text(page(shown), encoding="utf-8")
        lines.append(f"wrote {out}, {report}")
    if json:
        typer.echo(as_json(result))
        return
    for line in lines:
        typer.echo(line)


def _only(suite: str, given: set[str], known: set[str]) -> None:
    """Refuse options that were given and mean nothing to the suite."""
    from hasten.errors import IncompatibleError

    for name in sorted(given - known - _ALWAYS):
        option = "--" + name.replace("_", "-")
        listed = ", ".join("--" + one.replace("_", "-") for one in sorted(known))
        raise IncompatibleError(f"{option} means nothing to suite {suite!r}", hint=f"it takes {listed}", field=name)


def _seeds(text: str) -> tuple[int, ...]:
    from hasten.errors import out_of_range

    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words) or len(set(words)) < len(words):
        raise out_of_range("seeds", text, "different whole numbers joined by commas")
    return tuple(map(int, words))


def _suite(
    model: str,
    suite: str,
    given: set[str],
    asked: Mapping[str, Any],
    loading: Mapping[str, Any],
    methods: str | None,
    peers: Sequence[str],
    seeds: tuple[int, ...],
    whole: bool,
) -> dict[str, Any]:
    """The result of any suite but kernels; everything that can be is refused before the model is loaded."""
    from hasten.bench import arms, cases, measure, perplexity
    from hasten.errors import unknown_name

    used = {name: value for name, value in asked.items() if name in given}
    file = suite.endswith(".jsonl")
    if suite not in SUITES and not file:
        raise unknown_name("suite", suite, SUITES, "or name a .jsonl file")
    if suite == "perplexity":
        _only(suite, given, {*perplexity.OPTIONS, "seeds"} | _LOADING)
        perplexity.read(str(asked["text"] or ""))
        llm = open_model(model, **loading)
        with progress_bar() as progress:
            return perplexity.measure(llm, options=used, seeds=seeds, progress=progress)
    if suite == "parallelbench":
        _only(suite, given, {"methods", "per_group", "seeds"} | _LOADING)
        return _parallelbench(model, loading, methods, asked["per_group"], seeds)
    module = cases.find("prompts" if file else suite)
    known = {*module.suite.options, "methods", "peers", "seeds"} - {"file"} | _LOADING
    if "causal" in module.suite.kinds:
        known |= {"whole_drafts"}
    _only(suite, given, known)
    options = {**used, "file": suite} if file else used
    if methods is not None:
        arms.parse(methods)
    arms.check_peers(peers)
    if hasattr(module, "ready"):
        module.ready(measure.settings(module.suite, options))
    llm = open_model(model, **loading)
    with progress_bar() as progress:
        return measure.measure(
            llm,
            module.suite.name,
            methods,
            options=options,
            seeds=seeds,
            peers=peers,
            whole=whole,
            progress=progress,
        )


def _parallelbench(
    model: str, loading: Mapping[str, Any], methods: str | None, per_task: int | None, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """The suite that has a harness of its own, for models that fill canvases."""
    from hasten.bench import arms, cases, parallelbench
    from hasten.errors import out_of_range

    if len(seeds) != 1 and seeds != (0, 1, 2):
        raise out_of_range("seeds", list(seeds), "one number for suite 'parallelbench'")
    chosen = arms.parse(methods or cases.ARMS["masked"])
    llm = open_model(model, **loading)
    with progress_bar() as progress:
        return parallelbench.measure(
            llm, list(chosen.values()), seed=seeds[0], per_task=4 if per_task is None else per_task, progress=progress
        )


def _kernels(model: str, rounds: int, tokens: int, peers: Sequence[str] | None, threads: int | None) -> dict[str, Any]:
    """The native stack measured."""
    from hasten.bench.kernels import PEERS, measure
    from hasten.errors import unknown_name

    for name in peers or ():
        if name not in (*PEERS, "none"):
            raise unknown_name("peer", name, (*PEERS, "none"))
    wanted = PEERS if peers is None else tuple(name for name in peers if name != "none")
    with progress_bar() as progress:
        return measure(model, rounds=rounds, tokens=tokens, peers=wanted, progress=progress, threads=threads)


def _suite_lines(result: Mapping[str, Any]) -> list[str]:
    """A comparison for people: one row per arm, then what was left out and the machine."""
    out: list[str] = []
    if "quality_is" in result:
        out += _arm_lines(result)
    elif "facts" in result:
        out += [f"{name}: {value}" for name, value in result["facts"]]
    else:
        out.append(dumps(result, indent=1, ensure_ascii=False, default=str))
    machine, seeds = result.get("machine"), ", ".join(map(str, result.get("seeds", ())))
    if machine and "seconds" in result:
        out.append(
            f"{result.get('cases', '')} cases over seeds {seeds} on {machine['cpu']}, {machine['threads']} threads, "
            f"torch {machine['torch']}, in {result['seconds']:.0f} s"
        )
    return out


def _arm_lines(result: Mapping[str, Any]) -> list[str]:
    """The table of arms and what it says."""
    from hasten.bench.page import headline

    wide = max(len(name) for name in (*result["arms"], "arm"))
    out = [f"quality: {result['quality_is']}"]
    out.append(f"{'arm':{wide}}  {'quality':>16}  {'speed':>20}  {'s/answer':>9}  {'forwards':>8}  same text")
    for name, one in result["arms"].items():
        quality, speed, (same, of) = one["quality"], one["time"]["speedup"], one["same_text"]
        forwards = f"{one['forwards']['median']:.1f}" if "forwards" in one else "-"
        spread = f"{quality['median']:.1f} ({quality['min']:.0f}-{quality['max']:.0f})"
        ratio = f"{speed['median']:.2f}x ({speed['min']:.2f}-{speed['max']:.2f})"
        seconds = one["time"]["seconds"]["median"]
        out.append(f"{name:{wide}}  {spread:>16}  {ratio:>20}  {seconds:9.3f}  {forwards:>8}  {same} of {of}")
    out.append(headline(result))
    out += [f"{name} is left out: {why}" for name, why in result["left_out"]["peers"].items()]
    if result["left_out"]["cases"]:
        out.append(f"{result['left_out']['cases']} cases are left out, too long for the model's window")
    return out


def _kernel_report(result: Mapping[str, Any], lines: Sequence[str]) -> dict[str, Any]:
    """The kernels' result as the report takes it."""
    pairs = [line.strip().partition(": ") for line in lines]
    return {
        "suite": "kernels",
        "about": "the native stack measured, and other programs on the same file",
        "model": result["model"],
        "facts": [[name, value] for name, _, value in pairs],
        "pass_ms": result["hasten exact"]["pass_ms"],
        "machine": result["machine"],
        "seconds": result["seconds"],
    }


def _kernel_lines(result: dict[str, Any]) -> list[str]:
    """The kernels' result for people."""
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
