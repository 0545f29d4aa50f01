"""`hasten train`: make a drafter for a model on this machine, or one of the small models from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli._shared import as_json, open_model, progress_bar

_FOR_MINIS = {"recipe", "steps", "minutes", "tokens", "seed", "form", "start", "out", "work", "no_measure", "threads",
              "json"}  # fmt: skip
_FOR_DPARALLEL = {"recipe", "model", "texts", "steps", "tokens", "seed", "out", "work", "threads", "json"}
_FOR_DRAFTERS = {"recipe", "model", "texts", "answer", "steps", "tokens", "vocab", "loss", "seed", "out", "work", "dtype",
                 "threads", "json"}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("train")(train)


def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            help="What to train. For a model: eagle, fspad, medusa, hidden-transfer, lud, tvdpp, aded, learn2pd. "
            "From nothing: mini-ar; out of it mini-bdlm, then mini-dlm. Of a small diffusion model a surer one: dparallel."
        ),
    ],
    model: Annotated[
        str | None, typer.Argument(help="The model a drafter is for: catalog name, directory, hub id or file.")
    ] = None,
    texts: Annotated[int, typer.Option(help="Drafters: answers of the model to learn from.")] = 1600,
    answer: Annotated[int, typer.Option(help="Drafters: tokens of one answer at most.")] = 160,
    steps: Annotated[int, typer.Option(help="Training steps; the small models have their own number.")] = 1200,
    minutes: Annotated[
        float | None, typer.Option(help="Small models: train for about so long, instead of --steps.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per step; small models: 5120.")] = 2048,
    vocab: Annotated[int, typer.Option(help="Drafters: most frequent tokens that are drafted.")] = 8192,
    loss: Annotated[str, typer.Option(help="Loss that aligns tvdpp: tvdpp, tvd, kld, mixed or none.")] = "tvdpp",
    seed: Annotated[int, typer.Option(help="Seed of prompts, answers and weights.")] = 0,
    form: Annotated[str, typer.Option(help="Loss of mini-dlm: count, linear, uniform, mgdm or complementary.")] = "count",
    start: Annotated[Path | None, typer.Option(help="mini-dlm, mini-bdlm: folder of the model it begins with.")] = None,
    out: Annotated[Path | None, typer.Option(help="File or directory to write (default: in the cache).")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for what lets a cut run go on (default: the cache).")] = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Small models: do not count right answers at the end (ten minutes).")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Drafters: auto, float32 or bfloat16, for the model.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: all).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Train a drafter on text the model writes itself, or one of the small models.

    A drafter takes 10 to 45 minutes for smollm2-135m on two cores, 10 of them for the texts, which are written once; a
    small model, on procedural tasks, 10 to 80. A run that is cut goes on where it was.
    """
    from hasten.errors import ConfigError, unknown_name
    from hasten.train.minis import MINIS, plain_name
    from hasten.train.recipes import RECIPES, Recipe
    from hasten.train.recipes import train as run

    recipe, given = plain_name(recipe), _given(context)
    if recipe not in (*RECIPES, *MINIS, "dparallel"):
        raise unknown_name("recipe", recipe, [*RECIPES, *MINIS, "dparallel"])
    known = _FOR_MINIS if recipe in MINIS else _FOR_DPARALLEL if recipe == "dparallel" else _FOR_DRAFTERS
    for name in sorted(given - known):
        option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
        raise ConfigError(f"{option} does not go with recipe {recipe!r}", hint="hasten train --help", field=name)
    if recipe in MINIS:
        own: dict[str, Any] = {name: value for name, value in (("steps", steps), ("tokens", tokens)) if name in given}
        if no_measure:
            own["counts"] = {}
        _mini(recipe, threads, json, minutes=minutes, seed=seed, form=form, start=start, out=out, work=work, **own)
        return
    if model is None:
        raise ConfigError(f"recipe {recipe!r} needs a model", hint=f"hasten train {recipe} MODEL", field="model")
    if recipe == "dparallel":
        sizes_given = (("texts", texts), ("steps", steps), ("tokens", tokens))
        _dparallel(model, threads, json, out, work, seed=seed, **{k: v for k, v in sizes_given if k in given})
        return
    sizes = Recipe(
        texts=texts,
        answer=answer,
        vocab=vocab,
        steps=steps,
        tokens=tokens,
        held_out=max(1, texts // 25),
        seed=seed,
        loss=loss,
    )
    llm = open_model(model, dtype=dtype, threads=threads)
    with progress_bar() as progress:
        facts = run(recipe, llm, sizes, out=out, work=work, progress=progress)
    if json:
        typer.echo(as_json(facts))
        return
    typer.echo(f"{facts['path']}: {facts['bytes'] / 1e6:.1f} MB in {facts['seconds'] / 60:.0f} min")
    if "acceptance" in facts:
        share, before = facts["acceptance"], facts["pretrained_acceptance"]
        typer.echo(f"sampled tokens accepted, on texts it has not seen: {share:.1%} (before aligning {before:.1%})")
    if "agreement_by_depth" in facts:
        ahead = ", ".join(f"{value:.0%}" for value in facts["agreement_by_depth"])
        typer.echo(f"best token as the model's, on texts it has not seen, 1 token ahead and more: {ahead}")
    weights = f":weights={facts['path']}" if facts.get("loss", "tvdpp") != "tvdpp" else ""
    typer.echo(f"use it: hasten run {model} PROMPT --method {recipe}{weights}")


def _given(context: typer.Context) -> set[str]:
    """The parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _use(threads: int | None) -> None:
    """Compute with so many threads."""
    if threads is not None:
        import torch

        from hasten.errors import out_of_range

        if threads < 1:
            raise out_of_range("threads", threads, "at least 1")
        torch.set_num_threads(threads)


def _dparallel(model: str, threads: int | None, json: bool, out: Path | None, work: Path | None, **sizes: Any) -> None:
    """Make a small masked-diffusion model surer and say what that saves at which threshold."""
    from hasten.train.certainty import Config, distil

    _use(threads)
    with progress_bar() as progress:
        facts = distil(model, Config(**sizes), out=out, work=work, progress=progress)
    if json:
        typer.echo(as_json(facts))
        return
    found = facts["dparallel"]
    typer.echo(f"{facts['path']}: {facts['bytes'] / 1e6:.1f} MB in {facts['minutes']:g} min, tau {found['tau']:g} nats")
    for what in ("one_token_per_step", "before", "after"):
        figures = found[what]
        typer.echo(f"{what.replace('_', ' '):<18} {figures['accuracy']:g} % right, {figures['nfe']:g} forwards per answer")
    typer.echo(f"use it: hasten run {facts['path']} PROMPT --method dparallel")


def _mini(recipe: str, threads: int | None, json: bool, **how: Any) -> None:
    """Train one of the small models and say how good it is."""
    from hasten.train.minis import pretrain

    _use(threads)
    with progress_bar() as progress:
        facts = pretrain(recipe, progress=progress, **how)
    if json:
        typer.echo(as_json(facts))
        return
    typer.echo(
        f"{facts['path']}: {facts['bytes'] / 1e6:.1f} MB, {facts['tokens_seen']:,} tokens in {facts['minutes']:g} min"
    )
    for world, row in facts["exact_match"]["worlds"].items():
        typer.echo(f"{world:<9} " + ", ".join(f"{canvas}: {cell['exact']:g} %" for canvas, cell in row.items()))
    if facts["exact_match"]["worlds"]:
        typer.echo("(answers that are exact, on prompts it has not seen, by size of canvas)")
    typer.echo(f"use it: hasten run {facts['path']} PROMPT")
