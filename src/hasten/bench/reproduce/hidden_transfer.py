"""Hidden transfer against maps untrained, Medusa heads from the same texts, prompt lookup and plain decoding."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.bench import drafters, trained
from hasten.bench.compare import SEEDS, Runner, runner
from hasten.bench.report import Progress, Reproduction, Spread
from hasten.bench.reproduce.fspad import by_seed, present, whole
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.llm import LLM

claim_checked = (
    "Greedy decoding of smollm2-135m, all of each draft verified: maps of hidden transfer commit more tokens per pass than "
    "Medusa heads trained on the same texts (three pairs, one per seed; --quick compares what is there) and than maps "
    "untrained; plain decoding, prompt lookup and its speed with the measured budget, in two phases and in one, beside."
)

SIZES = {"texts": 320, "answer": 96, "steps": 480, "tokens": 2048, "vocab": 8192}  # maps take fewer of both


def untrained(llm: LLM, path: Path) -> str:
    """A method that drafts with identity maps from the middle of the stack, kept at `path`."""
    import torch

    from hasten.models.feature import identity
    from hasten.models.pseudo import TransferMaps

    model: Any = llm.model
    kept = torch.arange(min(8192, model.capabilities.vocab_size))
    maps = TransferMaps(model, kept, (len(model.config.layers) // 2,) * 3)
    maps.save(path, identity(model, llm.name), {})
    return f"hidden-transfer:weights={path}"


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of hidden transfer (2404.12022) on this machine."""
    from hasten.models.fetch import cache_dir

    started = time.perf_counter()
    facts: dict[int, dict[str, dict[str, Any]]] = {}
    pair = ("hidden-transfer", "medusa")
    if not quick:
        folder = cache_dir() / "reproduce" / "hidden-transfer"
        facts = trained.pairs(pair, drafters.MODEL, SEEDS, SIZES, folder, progress)
    llm = drafters.open_target(progress)
    made: dict[str, dict[int, str]] = {}
    for slug in pair:
        if facts:
            made[slug] = {seed: f"{slug}:weights={one[slug]['path']}" for seed, one in facts.items()}
        elif present(llm, slug):
            made[slug] = dict.fromkeys(SEEDS, slug)
    if "hidden-transfer" not in made:
        raise ConfigError(
            f"no maps of 'hidden-transfer' are there for {drafters.MODEL}",
            hint="hasten train hidden-transfer MODEL, or leave --quick away",
        )
    with tempfile.TemporaryDirectory() as place:
        made["untrained"] = dict.fromkeys(SEEDS, untrained(llm, Path(place) / "maps.safetensors"))
        own = made["hidden-transfer"]
        fused = {seed: method + ("," if ":" in method else ":") + "mode=fused" for seed, method in own.items()}
        methods: dict[str, str | Runner] = {
            "hidden-transfer": by_seed({seed: runner(llm, method) for seed, method in own.items()}),
            "hidden-transfer, fused": by_seed({seed: runner(llm, method) for seed, method in fused.items()}),
        }
        for name, of_seed in made.items():
            trees = {seed: runner(llm, whole(llm, method)) for seed, method in of_seed.items()}
            methods[f"{name}, whole tree"] = by_seed(trees)
        done = drafters.trial(llm, methods, quick, progress)
    reached = {name: done.tokens_per_pass(f"{name}, whole tree") for name in made}
    extra: dict[str, Any] = {"tokens_per_pass_of_whole_trees": {name: spread.to_dict() for name, spread in reached.items()}}
    if facts:
        extra["sizes"] = SIZES
        for slug in pair:
            depths = zip(*(one[slug]["agreement_by_depth"] for one in facts.values()), strict=True)
            extra[f"held_out_agreement_{slug}"] = [Spread.of(values, 4).to_dict() for values in depths]
    elif "medusa" not in made:
        extra["note"] = (
            "no Medusa heads are there to compare with, so the claim stays open; `hasten train medusa` makes some"
        )
    best = max(spread.median for name, spread in reached.items() if name != "hidden-transfer")
    return drafters.conclude(
        "hidden-transfer",
        done,
        "hidden-transfer",
        "medusa" in made and reached["hidden-transfer"].median > best and drafters.all_same(done, [*methods]),
        started,
        bars_of="tokens_per_pass",
        quick=quick,
        over_prompt_lookup=done.speedup("hidden-transfer", "prompt-lookup").to_dict(),
        **extra,
    )
