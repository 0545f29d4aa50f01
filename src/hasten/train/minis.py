"""Recipes of the small models that are shipped with hasten: worlds in, a directory of released form out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hasten.errors import ConfigError, IncompatibleError, out_of_range, unknown_name
from hasten.models.catalog import MINI
from hasten.models.fetch import cache_dir
from hasten.models.tokenizer import read_json
from hasten.train import assess
from hasten.train.mixture import GROUP, USUAL, Mixture
from hasten.train.network import Network, Shape
from hasten.train.objectives import Form, Masking
from hasten.train.pretrain import Config, Run
from hasten.train.released import export, model_type, read

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Mini:
    """A recipe: what it makes, how many steps at which rate, and the model whose weights it begins with ("": fresh).

    `opening` as in `Config`; `canvases` and `late` as in `Mixture`, where they differ; `masking`: the states learnt from in
    the count form, where they are not the usual ones.
    """

    summary: str
    shape: Shape
    steps: int
    lr: float
    start: str = ""
    opening: float = 0.0
    canvases: tuple[float, ...] = USUAL
    late: tuple[float, ...] | None = None
    masking: Masking | None = None


_LONG = (0.4, 0.41, 0.12, 0.05, 0.02)  # long answers somewhat more often than usual: decoding in parallel is for them
_LATE = (0.3, 0.27, 0.2, 0.13, 0.1)  # and at last those of 256 and 512 places, once the tasks are known
MINIS = {
    "mini-dlm": Mini(
        "masked diffusion, every token sees every other (Dream's layout)",
        Shape(shift=True),
        3000,
        2e-3,
        "mini-bdlm",
        opening=0.25,
        canvases=_LONG,
        late=_LATE,
        # where any place may be masked, a digit that stands twice is copied and not worked out: so most states are those of
        # a block in progress with nothing known behind it
        masking=Masking(shaped=0.6),
    ),
    "mini-ar": Mini("left to right (Llama's layout)", Shape(kind="causal"), 2400, 5e-3),
    "mini-bdlm": Mini(
        "masked diffusion in blocks of 8 (Fast-dLLM v2's layout)",
        Shape(kind="block", shift=True),
        600,
        2e-3,
        "mini-ar",
        canvases=_LONG,
    ),
}


def plain_name(name: str) -> str:
    """A recipe's name without a leading `recipes/`."""
    return name.removeprefix("recipes/")


def pretrain(
    name: str,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    tokens: int = 5120,
    seed: int = 0,
    form: Form = "count",
    start: Path | None = None,
    out: Path | None = None,
    work: Path | None = None,
    counts: dict[int, int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the recipe `name`, measure it on test samples and write it to `out`; facts about it, which are its card.

    It runs for `steps` steps of about `tokens` tokens or for about `minutes`, whose speed is measured first. What a cut run
    goes on from lies in `work`. `form` is that of the loss, as in `Config`. `start`: a directory to take first weights from
    where the recipe does. `counts`: how many samples per canvas are measured. Raises UnknownNameError, ConfigError,
    FormatError, and IncompatibleError for a `start` of another layout or a `form` that the recipe's network has not.
    """
    if name not in MINIS:
        raise unknown_name("recipe", name, MINIS)
    if steps is not None and minutes is not None:
        raise ConfigError("steps and minutes are both given", hint="give one of them", field="minutes")
    if minutes is not None and not minutes > 0:
        raise out_of_range("minutes", minutes, "positive")
    recipe, show = MINIS[name], progress or (lambda what, done, total: None)
    work = work or cache_dir() / "train" / name
    out = out or cache_dir() / "minis" / name
    work.mkdir(parents=True, exist_ok=True)
    mixture = Mixture(tokens=tokens, seed=seed, canvases=recipe.canvases, late=recipe.late)
    first = _first(recipe, start)
    if minutes is not None:
        steps = _planned(recipe, minutes, mixture, form, work / "plan.json")
    config = Config(steps or recipe.steps, recipe.lr, seed=seed, every=250, opening=recipe.opening, form=form)
    run = Run(recipe.shape, config, mixture, recipe.masking if form == "count" else None)
    if first is not None:
        run.start_from(dict(first.state_dict()))
    show("training", 0, run.config.steps)
    run.fit(work / "run.checkpoint", lambda step, value: show("training", step, run.config.steps))
    return finish(name, run, out, counts, progress, first is not None)


def finish(
    name: str,
    run: Run,
    out: Path,
    counts: dict[int, int] | None = None,
    progress: Progress | None = None,
    warm: bool = False,
    note: str = "",
) -> dict[str, Any]:
    """Measure the averaged weights of a run and write them with their card, which says `note`.

    `warm`: the run began with the weights of the model its recipe names.
    """
    show = progress or (lambda what, done, total: None)
    started = time.perf_counter()
    network = run.averaged
    facts: dict[str, Any] = {
        "name": name,
        "summary": MINIS[name].summary,
        "license": "Apache-2.0",
        "parameters": sum(p.numel() for p in network.parameters()),
        "shape": asdict(run.network.shape),
        "training": {**asdict(run.config), "mixture": asdict(run.mixture), "masking": asdict(run.masking)},
        "started_from": MINIS[name].start if warm else "fresh weights",
        "steps_done": run.step,
        "tokens_seen": run.seen,
        "answer_tokens_seen": run.answered,
        "minutes": round(run.seconds / 60, 1),
        **({"note": note} if note else {}),
    }
    show("measuring", 0, 1)
    facts["exact_match"] = {
        "how": f"test split, averaged weights, one token per step, the surest first{_order(network)}; percent of samples",
        "worlds": assess.table(network, counts, report=lambda done, total: show("measuring", done, total)),
    }
    facts["calibration"] = {
        "how": "expected calibration error (10 bins) of the greatest probability at masked places, by share masked",
        "levels": assess.calibration(network),
    }
    facts["measuring_minutes"] = round((time.perf_counter() - started) / 60, 1)
    export(network, out, facts)
    return {**facts, "path": str(out), "bytes": (out / "model.safetensors").stat().st_size}


def _order(network: Network) -> str:
    widths = {"full": f" in blocks of {assess.BLOCK}", "causal": " from left to right"}
    return widths.get(network.shape.kind, f" in blocks of {network.shape.block}")


def _first(recipe: Mini, start: Path | None) -> Network | None:
    """The network a recipe begins with: of `start`, else of the model shipped under the recipe's `start`, else none.

    Raises IncompatibleError for one whose states are of other places than those of the recipe's network.
    """
    if not recipe.start:
        if start is not None:
            raise ConfigError("this recipe begins with fresh weights", hint="leave out --start", field="start")
        return None
    shipped = MINI / recipe.start
    if start is None and not shipped.is_dir():
        return None
    network = read(start or shipped)
    if network.shape.foretells != recipe.shape.foretells:
        given, wanted = ("the next" if one.foretells else "their own" for one in (network.shape, recipe.shape))
        raise IncompatibleError(
            f"{start or shipped} has the layout of {model_type(network.shape)}, whose states are of {given} token; this "
            f"recipe makes one of {model_type(recipe.shape)}, whose states are of {wanted}",
            hint=f"give the directory of a {recipe.start} of its present recipe as --start",
            field="start",
        )
    return network


def _planned(recipe: Mini, minutes: float, mixture: Mixture, form: Form, path: Path) -> int:
    """The steps that fit into `minutes` here; measured once per run, so that a cut run goes on with the same plan."""
    facts = {"minutes": minutes, "tokens": mixture.tokens, "seed": mixture.seed, "form": form}
    kept = read_json(path)
    if {key: kept.get(key) for key in facts} == facts and isinstance(kept.get("steps"), int):
        return int(kept["steps"])
    trial = Run(recipe.shape, Config(steps=10 * GROUP, lr=recipe.lr, form=form), mixture)
    trial.fit(until=1)  # what is done once does not count
    started = trial.seconds
    trial.fit(until=GROUP)
    steps = max(1, round(60 * minutes / ((trial.seconds - started) / (GROUP - 1))))
    path.write_text(json.dumps({**facts, "steps": steps}) + "\n", encoding="utf-8")
    return steps
