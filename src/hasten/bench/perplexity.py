"""Suite `perplexity`: how well a model, as it was loaded, predicts a text; exact left to right, a bound for masked models.

The text's tokens are cut into windows whose second half is scored given the first. Every seed scores other windows. Bits
per byte compare models whose tokens differ. A bound (arXiv 2502.09992, equation 14) is no likelihood: compare it with
bounds only.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.bench.cases import parts_of
from hasten.bench.compare import SEEDS
from hasten.bench.measure import pass_ms
from hasten.bench.report import Progress, Spread, machine
from hasten.bench.suites import documentation
from hasten.errors import ConfigError, FormatError, IncompatibleError, out_of_range
from hasten.scoring import bound, finish, score

if TYPE_CHECKING:
    from hasten.llm import LLM

OPTIONS: Mapping[str, Any] = {"text": "", "window": 256, "per_group": 4, "samples": 32}
ABOUT = "perplexity of a text under the model as it was loaded"


def read(path: str) -> str:
    """The text of a file, of the standard library's documentation without one; raises FormatError."""
    if not path:
        return documentation()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"it is not UTF-8 (byte {error.start})", path=path, field="text") from None
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", path=path, field="text") from None
    if not text.strip():
        raise FormatError("it holds no text", path=path, field="text")
    return text


def measure(
    llm: LLM, *, options: Mapping[str, Any] | None = None, seeds: Sequence[int] = SEEDS, progress: Progress | None = None
) -> dict[str, Any]:
    """Perplexity, bits per byte and speed of scoring, spreads over seeds; JSON-ready.

    `options`: `text` (a file), `window` tokens, `per_group` windows per seed, `samples` of a masked model's bound. Raises
    ConfigError naming what is out of range, FormatError for a text that cannot be used, IncompatibleError for samples where
    the likelihood is exact.
    """
    started = time.perf_counter()
    given = {name: value for name, value in (options or {}).items() if value is not None}
    asked, caps = {**OPTIONS, **given}, llm.model.capabilities
    exact = caps.kind != "masked"
    if exact and "samples" in given:
        raise IncompatibleError(f"{llm.name!r} has an exact likelihood; samples are of a bound", field="samples")
    if not 8 <= asked["window"] <= caps.max_len - 1:
        raise out_of_range("window", asked["window"], f"in [8, {caps.max_len - 1}]")
    if asked["samples"] < 1:
        raise out_of_range("samples", asked["samples"], "at least 1")
    text = read(asked["text"])
    if llm.tokenizer is None:
        raise ConfigError(f"model {llm.name!r} has no tokenizer, and perplexity is of text", field="model")
    ids = llm.tokenizer.encode(text, bos=False)
    size = asked["window"]
    windows = [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
    random.Random("perplexity").shuffle(windows)  # noqa: S311 - an order of windows, not a secret
    drawn = [parts_of(windows, asked["per_group"], seed, "the text's windows") for seed in seeds]
    if not drawn:
        raise ConfigError("seeds is empty; seeds must hold at least one", field="seeds")
    start = () if caps.bos_id is None else (caps.bos_id,)
    figures: dict[str, list[float]] = {"perplexity": [], "bits_per_byte": [], "tokens_per_s": []}
    for i, (seed, many) in enumerate(zip(seeds, drawn, strict=True)):
        total, tokens, size_bytes, begun = 0.0, 0, 0, time.perf_counter()
        for j, window in enumerate(many):
            if progress is not None:
                progress("scoring", i * len(many) + j, len(seeds) * len(many))
            before, after = [*start, *window[: size // 2]], window[size // 2 :]
            if exact:
                total += sum(score(llm.model, llm.engine.scheduler.pool, [*before, *after], len(before)))
            else:
                total += finish(bound(llm.model, before, after, samples=asked["samples"], seed=seed * 1_000_003 + j))
            tokens += len(after)
            size_bytes += len(llm.decode(after).encode("utf-8"))
        figures["tokens_per_s"].append(tokens / (time.perf_counter() - begun))
        figures["perplexity"].append(math.exp(min(700.0, -total / tokens)))
        figures["bits_per_byte"].append(-total / math.log(2) / max(1, size_bytes))
    if progress is not None:
        progress("scoring", len(seeds) * asked["per_group"], len(seeds) * asked["per_group"])
    spreads = {name: Spread.of(values, 4) for name, values in figures.items()}
    likelihood = "exact" if exact else f"a bound, {asked['samples']} samples"
    return {
        "suite": "perplexity",
        "about": ABOUT,
        "model": {key: value for key, value in llm.info().items() if key != "source"},
        "options": {key: value for key, value in asked.items() if key != "samples" or not exact},
        "seeds": list(seeds),
        "cases": len(seeds) * asked["per_group"],
        "likelihood": likelihood,
        "perplexity": spreads["perplexity"].to_dict(),
        "bits_per_byte": spreads["bits_per_byte"].to_dict(),
        "time": {"tokens_per_s": spreads["tokens_per_s"].to_dict()},
        "facts": [
            ["likelihood", likelihood],
            *([name.replace("_", " "), str(one)] for name, one in spreads.items() if name != "tokens_per_s"),
        ],
        "pass_ms": pass_ms(llm, progress),
        "machine": machine(),
        "seconds": round(time.perf_counter() - started, 1),
    }
