"""Options that say what an answer looks like, shared by the commands that take them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.errors import ConfigError
from hasten.types import Grammar

Schema = Annotated[str | None, typer.Option(help="The answer is JSON of this schema: a file, or the schema itself.")]
Regex = Annotated[str | None, typer.Option(help="The answer matches this regular expression as a whole.")]
Choice = Annotated[list[str] | None, typer.Option(help="The answer is one of these texts (repeat the option).")]
Lark = Annotated[Path | None, typer.Option("--grammar", help="The answer is a sentence of the Lark grammar in this file.")]


def form(schema: str | None, regex: str | None, choice: list[str] | None, lark: Path | None) -> Grammar | None:
    """The one form that was asked for; raises ConfigError for two, and for files that cannot be read."""
    given = {"schema": schema, "regex": regex, "choice": choice, "grammar": lark}
    names = [name for name, value in given.items() if value is not None and value != []]
    if len(names) > 1:
        raise ConfigError(f"--{names[0]} and --{names[1]} both say what the answer looks like", field=names[1])
    if schema is not None:
        inline = schema.lstrip().startswith("{") or schema.strip() in ("true", "false")
        return Grammar.json_schema(schema if inline else _read(Path(schema), "schema"))
    if regex is not None:
        return Grammar.regex(regex)
    if choice:
        return Grammar.choice(choice)
    return Grammar.lark(_read(lark, "grammar")) if lark is not None else None


def _read(path: Path, field: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        hint = "--schema takes a file, or a schema that begins with {" if field == "schema" else ""
        raise ConfigError(f"{path} cannot be read ({reason})", hint=hint, field=field) from None
