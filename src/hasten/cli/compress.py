"""`hasten compress`: round a model's weights and write them as a directory other programs load too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli._shared import as_json, progress_bar


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("compress")(compress)


def compress(
    model: Annotated[str, typer.Argument(help="Catalog name, directory, hub id or file: a model with plain weights.")],
    out: Annotated[Path, typer.Argument(help="The directory to write; it must be new or empty.")],
    weights: Annotated[
        str,
        typer.Option(
            help="int8: hardly a difference. int4: half of that. int4-min: 4 bits with a zero point, a bit finer."
        ),
    ] = "int8",
    group: Annotated[
        str,
        typer.Option(help="Columns that share a scale: 32 (finest), 64, 128, or channel, a whole row (smallest)."),
    ] = "32",
    embeddings: Annotated[
        str,
        typer.Option(help="kept, which every reader takes; or int8: smaller and faster, for hasten and recent vLLM."),
    ] = "kept",
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Round a model's weights to 8 or 4 bits.

    They are written to a directory in the compressed-tensors layout, which hasten, vLLM and transformers load. Rounding to
    nearest takes seconds and needs no data: it is the baseline that better methods are measured against. Measure its price.
    """
    from hasten.models import export

    with progress_bar() as progress:
        facts = export.compress(model, out, weights=weights, group=group, embeddings=embeddings, progress=progress)
    if json:
        typer.echo(as_json(facts))
        return
    share = facts["rounded_parameters"] / facts["parameters"]
    typer.echo(f"{facts['path']}: {facts['bytes_before'] / 1e6:.1f} MB before, {facts['bytes'] / 1e6:.1f} MB now")
    bits, error = facts["bits_per_weight"], facts["error"]
    typer.echo(f"{bits:.2f} bits per weight; {share:.0%} of the weights rounded, with a relative error of {error:.2%}")
    typer.echo(f"use it: hasten run {out} PROMPT")
    typer.echo(f"what it costs: hasten bench {model} --suite perplexity, and the same for {out}")
