"""`hasten tune`: the fastest combination of methods for a model on this machine, stored for method "tuned"."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from hasten.errors import ConfigError, HastenError, out_of_range

if TYPE_CHECKING:
    from hasten.bench.trials import Finding, Trial

_MOST_MINUTES = 24 * 60


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("tune")(tune)


def tune(
    model: Annotated[str, typer.Argument(help="Catalog name, directory, hub id, .gguf or .safetensors file.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSONL of your prompts, {"prompt": ..., "answer": ...} a line, answers optional; at least 8.'),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Prompts that come with hasten: worlds (sort, records) or groups (chat, edit); repeatable."),
    ] = None,
    max_quality_loss: Annotated[
        str | None,
        typer.Option(help="Allow lossy methods to lose so much quality, as in 5%; without it only exact ones are tried."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for the search and the confirmation together.")] = 5.0,
    candidates: Annotated[int, typer.Option(help="Combinations to try at most (1 to 256).")] = 24,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most; of the canvas, where one is filled.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the combinations drawn and of the split of the prompts.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue prompts as they are, without the chat template.")] = False,
    no_save: Annotated[bool, typer.Option("--no-save", help="Only print what was found; store no profile.")] = False,
    dtype: Dtype = "auto",
    backbone: Backbone = "auto",
    activations: Activations = "exact",
    cache: Cache = "float32",
    weights: Weights = "stored",
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Find the fastest combination of methods for a model on this machine, and store it for `--method tuned`.

    Searches on one part of the prompts and confirms on another. Run it with nothing else running, and with the threads and
    loading options that will be used afterwards. Answers are greedy.
    """
    from hasten.bench import candidates as combinations
    from hasten.bench import splits
    from hasten.bench import tune as tuning
    from hasten.models import tuned

    loss = share("max_quality_loss", max_quality_loss)
    if not 0 < minutes <= _MOST_MINUTES:
        raise out_of_range("minutes", minutes, f"above 0 and at most {_MOST_MINUTES}")
    if not 1 <= candidates <= combinations.MOST:
        raise out_of_range("candidates", candidates, f"in [1, {combinations.MOST}]")
    if max_tokens < 1:
        raise out_of_range("max_tokens", max_tokens, "at least 1")
    if prompts is not None and suite:
        raise ConfigError("--prompts and --suite were both given", hint="take one of them", field="suite")
    if prompts is not None:
        splits.read_prompts(prompts)  # before a model is loaded
    for name in suite or ():
        splits.check_suite(name)
    llm = open_model(
        model, dtype=dtype, backbone=backbone, activations=activations, cache=cache, weights=weights, threads=threads
    )
    if not no_save:
        tuned.prepare(llm.model, llm.name)
    if prompts is not None:
        parts = splits.from_file(llm, prompts, seed=seed, raw=raw, max_tokens=max_tokens)
    else:
        parts = splits.from_suites(llm, suite or (), seed=seed, raw=raw, max_tokens=max_tokens)
    tried = combinations.space(llm, lossy=loss > 0, seed=seed, most=candidates)
    with progress_bar() as progress:
        found = tuning.search(
            tried,
            parts,
            tuning.runner(llm, max_tokens),
            seconds=60 * minutes,
            max_loss=loss,
            progress=progress,
            fresh=llm.forget,
        )
    path, fault = None, None
    if not no_save:
        settings = {"max_tokens": max_tokens, "seed": seed, "minutes": minutes, "candidates": candidates}
        try:
            path = tuned.write(tuning.profile_of(llm, found, **settings), llm.model, llm.name)
        except OSError as error:  # what was found is printed all the same
            fault = error
    if json:
        typer.echo(
            as_json(
                {
                    "model": llm.name,
                    "machine": tuned.machine(llm.model),
                    **found.to_dict(),
                    "profile": None if path is None else str(path),
                }
            )
        )
    else:
        _print(llm.name, found, tuned.machine(llm.model), max_tokens, path)
    if fault is not None:
        raise HastenError(
            f"the profile could not be stored ({fault.strerror or fault})", hint="name the methods with --method instead"
        )


def _print(name: str, found: Finding, machine: str, max_tokens: int, path: Path | None) -> None:
    """The finding for people."""
    typer.echo(f"{name} on {machine}")
    typer.echo(f"asked: {found.prompts}, up to {max_tokens} tokens an answer; quality: {found.quality_is}")
    _table(found)
    if found.left_out:
        typer.echo(f"could not be tried (--json says why): {', '.join(found.left_out)}")
    typer.echo(f"chosen: {' '.join(f'--method {name}' for name in found.chosen.methods)}")
    typer.echo(f"why: {found.why}")
    if path is not None:
        typer.echo(f"stored: {path}; use it with --method tuned, here with the same threads and loading options")


def share(name: str, text: str | None) -> float:
    """A share in [0, 1) from "5%" or "0.05"; 0 without one. Raises ConfigError naming the option."""
    if text is None:
        return 0.0
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if rest or not 0 <= value < 1:
        raise out_of_range(name, text, "a share below 100%, as in 1% or 0.01")
    return value


def _table(found: Finding) -> None:
    """What was tried: the chosen one first, then by how far it came."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hasten.bench.trials import speedup, timed

    table = Table("combination", "asked", "speed", "quality", "what became of it", box=SIMPLE)
    for column in table.columns:
        column.overflow = "fold"
    for trial in sorted(found.trials, key=lambda one: (one.fate != "", -len(one.held_out), -len(one.dev))):
        pairs = trial.best
        asked = f"{len(pairs)} {'held-out' if trial.held_out else 'dev'}" if pairs else "-"
        speed = f"{speedup(pairs)}x" if timed(pairs) else "-"
        cells = ("\n+ ".join(trial.candidate.methods), asked, speed, _quality(trial), trial.fate or "chosen")
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)


def _quality(trial: Trial) -> str:
    """How many texts are the same, or what both sides reached on average."""
    pairs = trial.best
    if not pairs:
        return "-"
    own = sum(one.quality for one in pairs)
    if trial.candidate.exact:
        return f"{own:.0f} of {len(pairs)} the same"
    lost = sum(one.loss for one in pairs) / len(pairs)
    return f"{own / len(pairs):.1%}, {'lost' if lost >= 0 else 'gained'} {abs(lost):.1%}"
