"""The `hasten` command: one file per command, imported when it is called."""

from __future__ import annotations

import sys
import traceback
from itertools import takewhile

import typer

from hasten.cli import bench, chat, compress, doctor, eval, methods, pull, reproduce, run, serve, train, tune
from hasten.errors import ConfigError, HastenError

app = typer.Typer(
    name="hasten",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run language models faster, smaller and under control, on the machine you have.",
)
for command in (run, chat, serve, methods, pull, train, compress, bench, tune, reproduce, eval, doctor):
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


def _fail(message: str, hint: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Entry point: errors are one line and a hint; exit code 2 for a wrong request, 1 for anything else that fails."""
    debug = "--debug" in takewhile(lambda argument: argument.startswith("-"), sys.argv[1:])
    try:
        app(prog_name="hasten")  # the same whether called as a script or with python -m
    except Exception as error:  # noqa: BLE001 - whatever fails, a person reads one line; --debug shows the rest
        if debug:
            traceback.print_exc()
        if isinstance(error, HastenError):
            _fail(error.message, error.hint, 2 if isinstance(error, ConfigError) else 1)
        again = "`hasten --debug ...` shows where"
        if isinstance(error, OSError):
            _fail(str(error), again, 1)
        if isinstance(error, MemoryError):
            _fail("out of memory", "use a smaller model, fewer tokens or --dtype bfloat16", 1)
        _fail(f"{type(error).__name__}: {error}", f"this is a fault of hasten, not of your request; {again}", 1)
