"""`hasten methods`: what there is, searchable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli._shared import as_json

if TYPE_CHECKING:
    from hasten.bench.dllm_survey import Family


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("methods")(methods)


def methods(
    query: Annotated[
        list[str] | None,
        typer.Argument(help="Words to look for anywhere, or field=value, as in state=planned or needs=full."),
    ] = None,
    families: Annotated[
        bool,
        typer.Option("--families", help="Families of diffusion models instead, as in cache=exact or allows=freedave."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the methods of this version and the planned works, best match first. Every word of QUERY must be found, in
    whatever a card says: name, title, paper, date, claim, settings, needs, file, when it does not help. One match, or a
    name in full, shows all about it."""
    from hasten import registry

    words = [word for part in query or [] for word in part.split()]
    if families:
        _families(words, json)
        return
    entries = registry.catalog()
    found = registry.search(entries, words, registry.SEARCHED)
    if json:
        typer.echo(as_json(found))
    elif not found:
        typer.echo(_nothing(words, registry.near(entries, words, registry.SEARCHED), "hasten methods"))
    elif len(found) == 1 or [found[0]["slug"]] == words:
        _page(found[0])
    else:
        for entry in found:
            facts = (entry["state"], entry["exactness"], entry["paper"], entry["date"], entry["file"])
            typer.echo(f"{entry['slug']}  " + "  ".join(fact for fact in facts if fact))
            typer.echo(f"    {entry['title']}\n    {entry['claim']}")


def _nothing(words: Sequence[str], close: Sequence[str], command: str) -> str:
    """What to say when a search found nothing: words that are spelt alike, and how to see all."""
    meant = f"; did you mean {' or '.join(repr(word) for word in close)}?" if close else ";"
    return f"nothing matches {' '.join(words)!r}{meant} `{command}` lists all"


def _page(entry: Mapping[str, Any]) -> None:
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


def _families(words: list[str], json: bool) -> None:
    """The families that fit, as a table, as JSON with their facts, or one of them in full."""
    from hasten.bench import dllm_survey

    found = dllm_survey.families(" ".join(words))
    if json:
        typer.echo(as_json([{**one.to_dict(), "parts": dllm_survey.parts(one.name)} for one in found]))
    elif not found:
        typer.echo(_nothing(words, dllm_survey.near(" ".join(words)), "hasten methods --families"))
    elif len(found) == 1 or [found[0].name] == words:
        _family(found[0])
    else:
        rows = [tuple(name.replace("_", " ") for name in dllm_survey.COLUMNS), *map(dllm_survey.cells, found)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _family(family: Family) -> None:
    """All that is known of one family, each fact with its source, and what each part of hasten says to it."""
    from hasten.bench import dllm_survey

    facts = family.to_dict()
    typer.echo(f"{family.name}: {family.title}, {family.year}" + (f", arXiv {family.paper}" if family.paper else ""))
    for name in ("note", "released", "model_type", "loads", "cache"):
        value = ", ".join(facts[name]) if isinstance(facts[name], list) else facts[name]
        if value:
            typer.echo(f"{name.replace('_', ' ')}: {value}")
    for name, fact in family.facts.items():
        typer.echo(
            f"{name.replace('_', ' ')}: " + ("unknown" if fact is None else f"{dllm_survey.shown(fact)}  [{fact.source}]")
        )
    typer.echo("parts of hasten:")
    for state, slugs, reason in dllm_survey.grouped(family.name):
        typer.echo(f"  {state}: {', '.join(slugs)}" + (f" - {reason}" if reason else ""))
