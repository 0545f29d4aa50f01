"""Drafters trained for a reproduction: recipes of `hasten train`, run as the command, at the size a comparison needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.bench.report import Progress
from hasten.errors import HastenError


def train(recipe: str, model: str, seed: int, sizes: Mapping[str, int | str], out: Path, work: Path) -> dict[str, Any]:
    """Train one drafter and return the facts that the command prints; a drafter that is at `out` already is not retrained.

    `sizes`: the command's options (texts, answer, steps, tokens, vocab). `work` holds the texts, which recipes of one seed
    share, and what lets a cut run go on. Training and measuring stay apart as parts of the package, so the command is the
    way from here to there. Raises HastenError with the command's own message.
    """
    facts = out.with_suffix(".json")
    if out.is_file() and facts.is_file():
        known = json.loads(facts.read_text(encoding="utf-8"))
        if known.get("asked") == {**sizes, "seed": seed, "model": model}:
            return dict(known)
    options = [word for name, value in {**sizes, "seed": seed}.items() for word in (f"--{name}", str(value))]
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hasten", "train", recipe, model, *options]
    command += ["--out", str(out), "--work", str(work), "--dtype", "float32", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    if done.returncode:
        raise HastenError(f"hasten train {recipe} {model} failed: {done.stderr.strip()}", hint="run it by itself")
    result = {**json.loads(done.stdout), "asked": {**sizes, "seed": seed, "model": model}}
    facts.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def pairs(
    recipes: tuple[str, ...], model: str, seeds: tuple[int, ...], sizes: dict[str, int], folder: Path, progress: Progress
) -> dict[int, dict[str, dict[str, Any]]]:
    """seed -> recipe -> facts: every recipe trained alike, from the same texts and steps, for each of the seeds."""
    made: dict[int, dict[str, dict[str, Any]]] = {}
    total, done = len(recipes) * len(seeds), 0
    for seed in seeds:
        for recipe in recipes:
            progress("training drafters", done, total)
            out = folder / f"{recipe}-{seed}.safetensors"
            made.setdefault(seed, {})[recipe] = train(recipe, model, seed, sizes, out, folder / f"work-{seed}")
            done += 1
    progress("training drafters", total, total)
    return made
