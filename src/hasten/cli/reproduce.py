"""`hasten reproduce`: try a paper's claim on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli._shared import as_json, progress_bar

if TYPE_CHECKING:
    from hasten.bench.report import Reproduction


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("reproduce")(reproduce)


def reproduce(
    slug: Annotated[str, typer.Argument(help="The work (`hasten methods` lists them), or all.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter runs: under a minute on two cores.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: all).")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for result and plot (default: docs/results in a checkout, for whole runs)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, or one per line for all.")] = False,
) -> None:
    """Run the small-scale experiment of a work: baseline and method side by side. Prints the claim, what was measured
    here, the quality of both sides and where the method does not help; a result that falls short says so."""
    from hasten.bench import plot, report
    from hasten.bench.reproduce import find, slugs

    chosen = slugs() if slug == "all" else (slug,)
    modules = [find(name) for name in chosen]
    if threads is not None:
        import torch

        from hasten.errors import out_of_range

        if not 1 <= threads <= 1024:
            raise out_of_range("threads", threads, "an integer in [1, 1024]")
        torch.set_num_threads(threads)
    folder = out or (None if quick else _results())
    for module in modules:
        with progress_bar() as progress:
            result = module.reproduce(quick, progress)
        written = []
        if folder is not None:
            written = [report.write(result, folder), plot.write(result, module.claim_checked, folder)]
        if json:
            typer.echo(as_json(result.to_dict()))
        else:
            _print(result, module.claim_checked, written)


def _results() -> Path | None:
    """docs/results of the checkout that the working directory lies in; None elsewhere."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "docs" / "generate.py").is_file() and (folder / "src" / "hasten").is_dir():
            return folder / "docs" / "results"
    return None


def _print(result: Reproduction, checked: str, written: list[Path]) -> None:
    """The result for people."""
    extra: Any = result.extra
    verdict = "came out as claimed" if result.direction_holds else "FELL SHORT of the claim"
    typer.echo(f"{result.slug}: {verdict}" + (" (a quick run)" if extra.get("quick") else ""))
    typer.echo(f"claim: {result.claim}")
    typer.echo(f"tried here: {checked}")
    if result.speedup is not None:
        typer.echo(f"speed: {result.speedup}x the baseline's, median (least-greatest) over seeds {list(result.seeds)}")
    measure = extra.get("quality_is", "quality")
    typer.echo(f"{measure}: baseline {result.quality['baseline']}, method {result.quality['method']}")
    if extra.get("bars"):
        typer.echo(f"{str(extra.get('bars_of', 'speed')).replace('_', ' ')}:")
        width = max(len(str(bar["label"])) for bar in extra["bars"])
        for bar in extra["bars"]:
            typer.echo(f"  {bar['label']:{width}}  {bar['median']:.2f} ({bar['min']:.2f}-{bar['max']:.2f})")
    if extra.get("note"):
        typer.echo(f"note: {extra['note']}")
    typer.echo(f"does not help: {result.no_help}")
    machine = result.machine
    typer.echo(f"on {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, in {result.seconds:.0f} s")
    for path in written:
        typer.echo(f"wrote {path}")
