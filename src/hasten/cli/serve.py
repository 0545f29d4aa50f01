"""`hasten serve`: models behind the OpenAI API, a page to look at, metrics."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli._shared import Activations, Backbone, Cache, Dtype, Threads, Weights, check_methods
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.llm import LLM


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("serve")(serve)


def serve(
    models: Annotated[
        list[str], typer.Argument(help="Catalog names, directories, hub ids, .gguf or .safetensors files; one or more.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; off this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    alias: Annotated[
        list[str] | None, typer.Option("--model-alias", help="A further name for a model, ALIAS=MODEL (repeatable).")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one per line; HASTEN_KEY in the environment is one more.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A host name under which this server is called (repeatable).")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="How requests decode that do not say (repeatable; see `methods`).")
    ] = None,
    i_know: Annotated[bool, typer.Option("--i-know", help="Listen off this machine without a key.")] = False,
    prefix_cache: Annotated[bool, typer.Option(help="Keep the keys of prompts for later ones that begin alike.")] = True,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object per line.")] = False,
    dtype: Dtype = "auto",
    backbone: Backbone = "auto",
    activations: Activations = "exact",
    cache: Cache = "float32",
    weights: Weights = "stored",
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Load although the memory check refuses.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Serve from several processes, through Ray Serve.")] = False,
    replicas: Annotated[int | None, typer.Option(help="With --ray: how many, each with its share of threads.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="With --ray: a cluster that runs already (default: one of this machine).")
    ] = None,
) -> None:
    """Serve models over the OpenAI API, with a page at / and metrics at /metrics."""
    from hasten.serve.run import named, run
    from hasten.serve.settings import Settings

    chosen = tuple(method or ["auto"])
    check_methods(chosen)
    aliases = dict(_pair(one) for one in alias or ())
    settings = Settings(
        host=host,
        port=port,
        keys=_keys(key_file),
        hosts=tuple(allow_host or ()),
        aliases=aliases,
        method=chosen,
        open_network=i_know,
    )
    options = {
        "dtype": dtype, "backbone": backbone, "activations": activations, "cache": cache, "weights": weights,
        "threads": threads, "force": force, "prefix_cache": prefix_cache,
    }  # fmt: skip
    sources = named(models, aliases, options)
    if not ray:
        for option, value in (("--replicas", replicas), ("--ray-address", ray_address)):
            if value is not None:
                raise ConfigError(f"{option} is for --ray", hint="add --ray", field=option.strip("-"))
        if "tuned" in chosen:
            sources = {name: partial(_with_parts, load, chosen) for name, load in sources.items()}
        run(sources, settings, log_level=log_level, log_json=log_json)
        return
    from hasten.serve.replicas import run_replicas

    del options["threads"]
    run_replicas(
        dict(zip(sources, models, strict=True)),
        settings,
        load=options,
        count=2 if replicas is None else replicas,
        threads=threads,
        address=ray_address,
        log_level=log_level,
        log_json=log_json,
    )


def _with_parts(load: Callable[[], LLM], methods: tuple[str, ...]) -> LLM:
    """The model, once it is known that these methods can be used on it: here, not with every request."""
    llm = load()
    llm.parts(methods)
    return llm


def _pair(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not name or not equals or not model:
        raise ConfigError(f"--model-alias {text!r} is not ALIAS=MODEL", field="alias")
    return name, model


def _keys(path: Path | None) -> tuple[str, ...]:
    """Keys of the environment and of the file; raises ConfigError when the file holds none."""
    keys = [os.environ["HASTEN_KEY"]] if os.environ.get("HASTEN_KEY") else []
    if path is not None:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the key file cannot be read ({error})", field="key_file") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{path} holds no key", hint="one key per line", field="key_file")
        keys += found
    return tuple(dict.fromkeys(keys))
