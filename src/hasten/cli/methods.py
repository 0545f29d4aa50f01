"""`hasten methods`: what there is, searchable."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hasten.cli._shared import as_json

_SEARCHED = ("slug", "title", "claim", "paper", "plugs_into", "exactness", "state")


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("methods")(methods)


def methods(
    query: Annotated[list[str] | None, typer.Argument(help="Words to look for in names, titles and claims.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the methods of this version and the planned works; a query that fits one shows all about it."""
    from hasten.registry import cards, works

    entries: list[dict[str, Any]] = [{**card.to_dict(), "state": "works"} for card in cards()]
    have = {entry["slug"] for entry in entries}
    entries += [work.to_dict() for work in works() if work.slug not in have]
    words = " ".join(query or []).lower().split()
    found = [e for e in entries if all(word in " ".join(e[key] for key in _SEARCHED).lower() for word in words)]
    found.sort(key=lambda entry: (entry["state"] != "works", entry["slug"]))
    if json:
        typer.echo(as_json(found))
    elif not found:
        typer.echo(f"nothing matches {' '.join(words)!r}; `hasten methods` lists all")
    elif len(found) == 1:
        _page(found[0])
    else:
        _table(found)


def _table(entries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "state", "exactness", "paper", "title")
    for entry in entries:
        table.add_row(entry["slug"], entry["state"], entry["exactness"], entry["paper"] or "-", entry["title"])
    Console().print(table)


def _page(entry: dict[str, Any]) -> None:
    """Every fact that a card or a work states, one per line."""
    for name, value in entry.items():
        if isinstance(value, str):
            text = value
        elif isinstance(value, (tuple, list)):
            text = ", ".join(value)
        else:
            text = "".join(f"\n  {knob}: {meaning}" for knob, meaning in value.items())
        if text:
            typer.echo(f"{name.replace('_', ' ')}: {text}")
