"""`hasten eval`: a model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import os
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli._shared import Backbone, Dtype, Threads, as_json, check_methods, open_model, progress_bar


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="Catalog name, directory, hub id, .gguf or .safetensors file.")],
    task: Annotated[
        list[str] | None, typer.Option(help="A task or group of lm-eval (repeatable), or of --include-path.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own, as YAML.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Examples per task at most (for a first look, not for figures).")
    ] = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples shown before each question (default: the task's).")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    method: Annotated[list[str] | None, typer.Option(help="How answers are decoded (repeatable; see `methods`).")] = None,
    samples: Annotated[int, typer.Option(help="Monte-Carlo samples of a likelihood, for models that fill canvases.")] = 128,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Also whether a canvas model would fill in the answer (some metrics ask).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of sampled answers and of the bound's noise.")] = 0,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="Allow tasks that run code which the model writes.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the names of all tasks and stop.")] = False,
    dtype: Dtype = "auto",
    backbone: Backbone = "auto",
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Score a model on tasks of lm-evaluation-harness, decoding with any method.

    Likelihoods are exact for left-to-right models, and a Monte-Carlo bound for models that fill canvases.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # one bar of ours instead of one per library
    from hasten.bench import harness
    from hasten.errors import ConfigError

    if show:
        for name in harness.tasks(include_path):
            typer.echo(name)
        return
    if not task:
        raise ConfigError("no task is given", hint="--task NAME; --list names all", field="task")
    chosen = method or ["auto"]
    check_methods(chosen)
    llm = open_model(model, dtype=dtype, backbone=backbone, threads=threads)
    with progress_bar() as progress:
        judge = harness.Harness(llm, method=chosen, samples=samples, greedy=greedy, seed=seed, progress=progress)
        result = harness.evaluate(
            judge,
            task,
            include_path=None if include_path is None else str(include_path),
            limit=limit,
            num_fewshot=few_shot,
            chat=chat,
            unsafe_code=unsafe_code,
        )
    if out is not None:
        out.write_text(dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    if json:
        typer.echo(as_json(result))
        return
    for line in _lines(result):
        typer.echo(line)


def _lines(result: dict[str, Any]) -> list[str]:
    """The result for people: a task's metrics, each with its standard error."""
    out = [f"{result['model']}, method {result['method']}, likelihood: {result['likelihood']}"]
    for task, row in result["tasks"].items():
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or metric == "sample_len" or not isinstance(value, (int, float)):
                continue
            error = row.get(f"{metric}_stderr,{kind}")
            spread = f" ± {error:.4f}" if isinstance(error, (int, float)) else ""
            out.append(f"{task:32} {metric:20} {value:.4f}{spread}")
    if result["cut_contexts"]:
        out.append(f"{result['cut_contexts']} contexts were cut on the left to fit the window")
    return out
