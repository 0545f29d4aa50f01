"""LUD, lossless and trusting, against inputs untrained, prompt lookup and plain decoding."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.bench import drafters, trained
from hasten.bench.compare import SEEDS, Comparison, Runner, runner
from hasten.bench.report import Progress, Reproduction, Spread
from hasten.bench.reproduce.fspad import by_seed, present, whole
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.llm import LLM

claim_checked = (
    "Greedy decoding of smollm2-135m: LUD as published (mode=trust, confidence 0.9) takes less time than plain decoding, "
    "and its texts are nearly plain decoding's; verified (mode=lossless) they are the same, with more tokens per pass than "
    "inputs untrained; prompt lookup beside. One training per seed; --quick uses what is there."
)

SIZES = {"texts": 320, "answer": 96, "steps": 480, "tokens": 2048, "vocab": 8192}  # inputs take fewer of both
BETA = 0.9  # of mode=trust
KEPT = 0.97  # least share of tokens equal to plain decoding's for "nearly the same"


def untrained(llm: LLM, path: Path) -> str:
    """A method that drafts with fresh inputs and an adapter that adds nothing, kept at `path`."""
    import torch

    from hasten.models.feature import identity
    from hasten.models.pseudo import TrainedInputs

    model: Any = llm.model
    kept = torch.arange(min(8192, model.capabilities.vocab_size))
    TrainedInputs(model, kept, 3, 8, 16, torch.float32).reset(model).save(path, identity(model, llm.name), {})
    return f"lud:weights={path}"


def with_setting(method: str, setting: str) -> str:
    """`method` with one more setting."""
    return method + ("," if ":" in method else ":") + setting


def tokens_kept(done: Comparison, method: str) -> Spread:
    """Share of tokens before the first that differs from plain decoding's, one value per seed."""

    def share(rows: Any) -> float:
        kept = total = 0
        for row in rows:
            one, plain = row.answers[method].tokens, row.answers["plain"].tokens
            pairs = zip(one, plain, strict=False)
            kept += next((i for i, (a, b) in enumerate(pairs) if a != b), len(plain))
            total += len(plain)
        return kept / total

    return done.over_seeds(share)


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of LUD (2405.15208) on this machine."""
    from hasten.models.fetch import cache_dir

    started = time.perf_counter()
    facts: dict[int, dict[str, dict[str, Any]]] = {}
    if not quick:
        facts = trained.pairs(("lud",), drafters.MODEL, SEEDS, SIZES, cache_dir() / "reproduce" / "lud", progress)
    llm = drafters.open_target(progress)
    if not facts and not present(llm, "lud"):
        raise ConfigError(
            f"no inputs of 'lud' are there for {drafters.MODEL}", hint="hasten train lud MODEL, or leave --quick away"
        )
    own = {seed: f"lud:weights={one['lud']['path']}" for seed, one in facts.items()} or dict.fromkeys(SEEDS, "lud")
    with tempfile.TemporaryDirectory() as place:
        fresh = untrained(llm, Path(place) / "inputs.safetensors")
        trust = {seed: with_setting(with_setting(one, "mode=trust"), f"beta={BETA}") for seed, one in own.items()}
        methods: dict[str, str | Runner] = {
            "lud": by_seed({seed: runner(llm, one) for seed, one in own.items()}),
            "lud, whole span": by_seed({seed: runner(llm, whole(llm, one)) for seed, one in own.items()}),
            "untrained, whole span": runner(llm, whole(llm, fresh)),
            "lud, trust": by_seed({seed: runner(llm, whole(llm, one)) for seed, one in trust.items()}),
        }
        done = drafters.trial(llm, methods, quick, progress)
    kept = tokens_kept(done, "lud, trust")
    more = done.tokens_per_pass("lud, whole span").median > done.tokens_per_pass("untrained, whole span").median
    exact = [name for name in methods if name != "lud, trust"]
    extra: dict[str, Any] = {
        "trust_speedup": done.speedup("lud, trust").to_dict(),
        "trust_tokens_per_pass": done.tokens_per_pass("lud, trust").to_dict(),
        "trust_tokens_before_the_first_difference": kept.to_dict(),
        "over_prompt_lookup": done.speedup("lud", "prompt-lookup").to_dict(),
    }
    if facts:
        depths = zip(*(one["lud"]["agreement_by_depth"] for one in facts.values()), strict=True)
        extra |= {"sizes": SIZES, "held_out_agreement": [Spread.of(values, 4).to_dict() for values in depths]}
    return drafters.conclude(
        "lud",
        done,
        "lud",
        drafters.faster_in_every_seed(done, "lud, trust")
        and kept.median >= KEPT
        and more
        and drafters.all_same(done, exact),
        started,
        bars_of="tokens_per_pass",
        quick=quick,
        quality=(1.0, kept.median, "share of trusted tokens before the first that differs from plain decoding's"),
        **extra,
    )
