"""The `hasten` command: one file per command, imported when it is called."""

from __future__ import annotations

import sys
import traceback

import typer

from hasten.cli import chat, doctor, methods, pull, run
from hasten.errors import ConfigError, HastenError

app = typer.Typer(
    name="hasten",
    no_args_is_help=True,
    add_completion=False,
    help="Run language models faster, smaller and under control, on the machine you have.",
)
for command in (run, chat, methods, pull, doctor):
    command.register(app)


def _version(value: bool) -> None:
    if value:
        from hasten import __version__

        typer.echo(f"hasten {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options before the command's name."""


def main() -> None:
    """Entry point: errors are one line and a hint; exit code 2 for a wrong request, 1 for anything else that fails."""
    try:
        app()
    except HastenError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
