"""Reproductions: one module per work, named after it, that tries its claim at small scale on this machine.

A module declares two names and imports torch and models only inside functions, so that listing it costs nothing:

    claim_checked: str                                            one sentence: what is tried here, and against what
    def reproduce(quick: bool, progress: Progress) -> Reproduction

`hasten reproduce SLUG` finds it by file name (slug in snake case) and calls `reproduce`. What holds for every one of them:

- Baseline and method run side by side in one process, alternating (`bench.compare` does), on three seeds: `seeds` 0, 1, 2
  draw disjoint prompts, data or weights, and nothing is tuned on them. Plain decoding and prompt lookup are always among
  the baselines of a drafter.
- `quick` takes under a minute on two cores and leaves the model, the methods and the question as they are: it only takes
  fewer and shorter runs. `progress(what, done, total)` is called after each, with the same `total` throughout.
- `direction_holds` is worked out from what was measured, against the claim's direction, never set by hand. What fell
  short stands in `extra` and `no_help` as measured. A method that changes text or weights states both sides' quality.
- The result is returned, not written; the command writes, plots and prints it.

`Reproduction`, `Spread`, `Progress` and `machine` are in `bench.report`.
"""

from __future__ import annotations

import importlib
from importlib import resources
from types import ModuleType

from hasten.errors import UnsupportedError, unknown_name


def slugs() -> tuple[str, ...]:
    """The works with a reproduction in this version, by name."""
    stems = [
        entry.name.removesuffix(".py") for entry in resources.files(__package__).iterdir() if entry.name.endswith(".py")
    ]
    return tuple(sorted(stem.replace("_", "-") for stem in stems if not stem.startswith("_")))


def find(slug: str) -> ModuleType:
    """The reproduction of a work.

    Raises UnsupportedError for a work or method that has none in this version, UnknownNameError for anything else.
    """
    from hasten import registry

    known = slugs()
    if slug in known:
        return importlib.import_module(f"{__package__}.{slug.replace('-', '_')}")
    works = {work.slug: work for work in registry.works()}
    hint = "`hasten methods` lists what there is; these can be reproduced: " + ", ".join(known)
    if slug in works:
        raise UnsupportedError(
            f"the reproduction of {slug!r} ({works[slug].title}) is planned and not in this version",
            hint=hint,
            field="slug",
        )
    if slug in registry.modules():
        raise UnsupportedError(f"{slug!r} is a baseline; only works have a reproduction", hint=hint, field="slug")
    raise unknown_name("work", slug, {*known, *works, *registry.modules(), "all"}, hint)
