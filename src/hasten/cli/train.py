"""`hasten train`: make a drafter for a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli._shared import as_json, open_model, progress_bar


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help="What to train: eagle, fspad, medusa, hidden-transfer, lud, tvdpp, aded.")],
    model: Annotated[str, typer.Argument(help="The model it is for: catalog name, directory, hub id or file.")],
    texts: Annotated[int, typer.Option(help="Answers of the model to learn from.")] = 1600,
    answer: Annotated[int, typer.Option(help="Tokens of one answer at most.")] = 160,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1200,
    tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 2048,
    vocab: Annotated[int, typer.Option(help="Most frequent tokens that are drafted.")] = 8192,
    loss: Annotated[str, typer.Option(help="Loss that aligns tvdpp: tvdpp, tvd, kld, mixed or none.")] = "tvdpp",
    seed: Annotated[int, typer.Option(help="Seed of prompts, answers and weights.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File to write (default: where the method looks for it).")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for what lets a cut run go on (default: the cache).")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16, for the model.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: all).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Train a drafter on text the model writes itself. A run that is cut goes on where it was; about 45 minutes for
    smollm2-135m on two cores."""
    from hasten.errors import unknown_name
    from hasten.train.recipes import RECIPES, Recipe
    from hasten.train.recipes import train as run

    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
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
    typer.echo(f"use it: hasten run {model} PROMPT --method {recipe}")
