"""TVD++ against its drafter as pretrained and as aligned by other losses, prompt lookup and plain decoding."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.bench import drafters, trained
from hasten.bench.compare import BASELINES, SEEDS, Answer, Comparison, Prompt, Runner, compare, prompts, runner
from hasten.bench.report import Progress, Reproduction, Spread
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.llm import LLM

claim_checked = (
    "smollm2-135m with chains of three drafted tokens, all verified: a small draft model aligned by TVD++ commits more "
    "tokens per pass than the same model as pretrained, sampled at temperature 1 and greedy, and more of its sampled "
    "tokens would be accepted on held-out answers (three trainings, one per seed; --quick compares the weights that are "
    "there); the same alignment by KL divergence and by TVD, prompt lookup and plain decoding beside, and its speed with "
    "the measured budget."
)

# of each drafter; those of a seed share texts and pretraining
SIZES = {"texts": 320, "answer": 96, "steps": 480, "tokens": 1024, "vocab": 8192}
NODES = 3
LOSSES = {"tvdpp": "TVD++", "none": "pretrained", "kld": "KL divergence", "tvd": "TVD"}


def by_seed(runners: Mapping[int, Runner]) -> Runner:
    """Answers each prompt by the runner of its seed."""

    def run(prompt: Prompt, tokens: int) -> Answer:
        return runners[prompt.seed](prompt, tokens)

    return run


def train(folder: Path, progress: Progress) -> dict[str, dict[int, dict[str, Any]]]:
    """loss -> seed -> facts of drafters that share texts and pretraining within a seed."""
    made: dict[str, dict[int, dict[str, Any]]] = {loss: {} for loss in LOSSES}
    total = len(SEEDS) * len(LOSSES)
    for i, seed in enumerate(SEEDS):
        for j, loss in enumerate(LOSSES):
            progress("training drafters", i * len(LOSSES) + j, total)
            out, work = folder / f"{loss}-{seed}.safetensors", folder / f"work-{seed}"
            made[loss][seed] = trained.train("tvdpp", drafters.MODEL, seed, {**SIZES, "loss": loss}, out, work)
    progress("training drafters", total, total)
    return made


def there(llm: LLM) -> dict[str, str]:
    """loss -> method, of the weights that were made for the model here or came with hasten."""
    from hasten.models.feature import weights_path

    found = {}
    for loss in LOSSES:
        slug = "tvdpp" if loss == "tvdpp" else f"tvdpp-{loss}"
        try:
            found[loss] = f"tvdpp:weights={weights_path(slug, llm.model, llm.name)}"
        except ConfigError:  # none was made
            continue
    return found


def whole(llm: LLM, method: str, **sampling: Any) -> Runner:
    """Answers by a method whose drafts are verified whole instead of as far as they pay."""
    import dataclasses

    name = f"{method},nodes={NODES},floor=0"
    return runner(llm, lambda: dataclasses.replace(llm.parts((name,)), measured=False, budget=NODES), **sampling)


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of TVD++ (2403.00858) on this machine."""
    from hasten.models.fetch import cache_dir

    started = time.perf_counter()
    facts: dict[str, dict[int, dict[str, Any]]] = {}
    if not quick:
        facts = train(cache_dir() / "reproduce" / "tvdpp", progress)
    llm = drafters.open_target(progress)
    layers: dict[str, dict[int, str]]
    if facts:
        layers = {
            loss: {seed: f"tvdpp:weights={one['path']}" for seed, one in many.items()} for loss, many in facts.items()
        }
    else:
        layers = {loss: dict.fromkeys(SEEDS, method) for loss, method in there(llm).items()}
    if "tvdpp" not in layers:
        raise ConfigError(
            f"no drafter of 'tvdpp' is there for {drafters.MODEL}", hint="hasten train tvdpp MODEL, or leave --quick away"
        )

    def chains(**sampling: Any) -> dict[str, Runner]:
        return {
            f"{LOSSES[loss]}, whole chain": by_seed({seed: whole(llm, one, **sampling) for seed, one in of_seed.items()})
            for loss, of_seed in layers.items()
        }

    measured = by_seed({seed: runner(llm, one) for seed, one in layers["tvdpp"].items()})
    greedy = drafters.trial(llm, {"tvdpp": measured, **chains()}, quick, progress)
    one = {**{name: runner(llm, name, temperature=1.0) for name in BASELINES}, **chains(temperature=1.0)}
    over = prompts(llm, 1, SEEDS, drafters.QUICK_GROUPS) if quick else prompts(llm, 2, SEEDS)
    sampled = compare(one, over, 32 if quick else 64, progress, llm.forget, "answering prompts, sampled")
    extra: dict[str, Any] = {"nodes": NODES}
    for name, done in (("greedy", greedy), ("sampled", sampled)):
        extra[f"tokens_per_pass_{name}"] = {
            label: done.tokens_per_pass(f"{label}, whole chain").to_dict()
            for loss, label in LOSSES.items()
            if loss in layers
        }
    names = ["tvdpp", *(f"{LOSSES[loss]}, whole chain" for loss in layers)]
    holds = drafters.all_same(greedy, names) and better(greedy, layers) and better(sampled, layers)
    if facts:
        held = {loss: Spread.of([one["acceptance"] for one in many.values()], 4) for loss, many in facts.items()}
        extra["held_out_acceptance"] = {LOSSES[loss]: spread.to_dict() for loss, spread in held.items()}
        extra["sizes"] = SIZES
        holds = holds and held["tvdpp"].median > held["none"].median
    elif "none" not in layers:
        extra["note"] = "no pretrained drafter is there to compare with, so the claim stays open"
    return drafters.conclude(
        "tvdpp",
        greedy,
        "tvdpp",
        holds,
        started,
        bars_of="tokens_per_pass",
        quick=quick,
        over_prompt_lookup=greedy.speedup("tvdpp", "prompt-lookup").to_dict(),
        **extra,
    )


def better(done: Comparison, layers: Mapping[str, Any]) -> bool:
    """Whether TVD++ committed more tokens per pass than the pretrained drafter."""
    if "none" not in layers:
        return False
    ours, before = (done.tokens_per_pass(f"{LOSSES[loss]}, whole chain").median for loss in ("tvdpp", "none"))
    return ours > before
