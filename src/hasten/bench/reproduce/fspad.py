"""FSPAD against an EAGLE layer trained alike, an untrained layer, prompt lookup and plain decoding."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.bench import drafters, trained
from hasten.bench.compare import SEEDS, Answer, Prompt, Runner, runner
from hasten.bench.report import Progress, Reproduction, Spread
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.engine.engine import Parts
    from hasten.llm import LLM

claim_checked = (
    "Greedy decoding of smollm2-135m, all of each draft verified: a FSPAD layer commits more tokens per pass than an EAGLE "
    "layer trained on the same texts for the same steps (three pairs, one per seed; --quick compares the layers that are "
    "there) and than its own layer untrained; plain decoding and prompt lookup beside, and its speed with "
    "the measured budget."
)

SIZES = {"texts": 320, "answer": 96, "steps": 240, "tokens": 1024, "vocab": 8192}  # a pair in about ten minutes
NODES = 8  # of a draft that is verified whole


def by_seed(runners: Mapping[int, Runner]) -> Runner:
    """Answers each prompt by the runner of its seed."""

    def run(prompt: Prompt, tokens: int) -> Answer:
        return runners[prompt.seed](prompt, tokens)

    return run


def untrained(llm: LLM, path: Path) -> str:
    """A method that drafts with a FSPAD layer of random weights, kept at `path`."""
    import torch

    from hasten.models.feature import FeatureModel, identity

    kept = torch.arange(min(8192, llm.model.capabilities.vocab_size))
    layer = FeatureModel("fspad", llm.model, kept, dtype=torch.float32).reset(0)  # type: ignore[arg-type]
    layer.save(path, identity(llm.model, llm.name), {})
    return f"fspad:weights={path},floor=0"


def whole(llm: LLM, method: str) -> Callable[[], Parts]:
    """The parts of a method, with all of its draft verified instead of what pays."""
    return lambda: dataclasses.replace(llm.parts((method,)), measured=False, budget=NODES)


def present(llm: LLM, slug: str) -> bool:
    """Whether a layer of this kind was made for the model here, or came with hasten."""
    from hasten.models.feature import weights_path

    with suppress(ConfigError):
        weights_path(slug, llm.model, llm.name)
        return True
    return False


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of FSPAD (2408.15562) on this machine."""
    from hasten.models.fetch import cache_dir

    started = time.perf_counter()
    facts: dict[int, dict[str, dict[str, Any]]] = {}
    if not quick:
        folder = cache_dir() / "reproduce" / "fspad"
        facts = trained.pairs(("fspad", "eagle"), drafters.MODEL, SEEDS, SIZES, folder, progress)
    llm = drafters.open_target(progress)
    layers: dict[str, dict[int, str]] = {}  # name -> seed -> method
    for slug in ("fspad", "eagle"):
        if facts:
            layers[slug] = {seed: f"{slug}:weights={pair[slug]['path']}" for seed, pair in facts.items()}
        elif present(llm, slug):
            layers[slug] = dict.fromkeys(SEEDS, slug)
    if "fspad" not in layers:
        raise ConfigError(
            f"no layer of 'fspad' is there for {drafters.MODEL}", hint="hasten train fspad MODEL, or leave --quick away"
        )
    with tempfile.TemporaryDirectory() as place:
        layers["untrained"] = dict.fromkeys(SEEDS, untrained(llm, Path(place) / "layer.safetensors"))
        methods: dict[str, str | Runner] = {
            "fspad": by_seed({seed: runner(llm, method) for seed, method in layers["fspad"].items()})
        }
        for name, of_seed in layers.items():
            trees = {seed: runner(llm, whole(llm, method)) for seed, method in of_seed.items()}
            methods[f"{name}, whole tree"] = by_seed(trees)
        done = drafters.trial(llm, methods, quick, progress)
    reached = {name: done.tokens_per_pass(f"{name}, whole tree") for name in layers}
    extra: dict[str, Any] = {"tokens_per_pass_of_whole_trees": {name: spread.to_dict() for name, spread in reached.items()}}
    if facts:
        extra["sizes"] = SIZES
        for slug in ("fspad", "eagle"):
            depths = zip(*(pair[slug]["agreement_by_depth"] for pair in facts.values()), strict=True)
            extra[f"held_out_agreement_{slug}"] = [Spread.of(values, 4).to_dict() for values in depths]
    elif "eagle" not in layers:
        extra["note"] = "no EAGLE layer is there to compare with, so the claim stays open; `hasten train eagle` makes one"
    best = max((spread.median for name, spread in reached.items() if name != "fspad"), default=0.0)
    return drafters.conclude(
        "fspad",
        done,
        "fspad",
        "eagle" in layers and reached["fspad"].median > best and drafters.all_same(done, [*methods]),
        started,
        bars_of="tokens_per_pass",
        quick=quick,
        over_prompt_lookup=done.speedup("fspad", "prompt-lookup").to_dict(),
        **extra,
    )
