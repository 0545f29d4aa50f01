"""`hasten pull`: fetch a catalog model."""

from __future__ import annotations

from typing import Annotated

import typer

from hasten.cli._shared import as_json, progress_bar


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("pull")(pull)


def pull(
    name: Annotated[
        str,
        typer.Argument(help="A catalog name; `hasten doctor` lists them. Those that come with hasten are there already."),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Fetch a model once, verified; later calls find it in the cache."""
    from hasten.models import catalog

    with progress_bar() as progress:
        path = catalog.pull(name, progress=progress)
    typer.echo(as_json({"name": name, "path": str(path)}) if json else f"{name}: {path}")
