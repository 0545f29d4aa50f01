"""`hasten methods`: what there is, searchable."""

from __future__ import annotations

from typing import Annotated

import typer

from hasten.cli._shared import as_json


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("methods")(methods)


def methods(
    query: Annotated[str, typer.Argument(help="Words to look for in names, titles and claims.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the methods of this version and the planned works."""
    from hasten.registry import cards, works

    found = [{**card.to_dict(), "state": "works"} for card in cards()]
    have = {entry["slug"] for entry in found}
    found += [work.to_dict() for work in works() if work.slug not in have]
    words = query.lower().split()
    found = [entry for entry in found if all(word in as_json(entry).lower() for word in words)]
    found.sort(key=lambda entry: (entry["state"] != "works", entry["slug"]))
    if json:
        typer.echo(as_json(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "state", "exactness", "paper", "title")
    for entry in found:
        table.add_row(entry["slug"], entry["state"], entry["exactness"], entry["paper"] or "-", entry["title"])
    Console().print(table if found else f"nothing matches {query!r}; `hasten methods` lists all")
