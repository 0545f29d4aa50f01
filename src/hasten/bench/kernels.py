"""The native stack measured: bytes per second against the machine's own, what passes over T tokens cost, where the time
goes, and other programs on the same file in the same alternating run.

A round decodes the same number of tokens with every program in turn, the order turning from round to round; figures are
medians over rounds with the least and the greatest, ratios are taken within a round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from hasten.bench.report import Progress, Spread, machine
from hasten.engine.contracts import RowInput
from hasten.engine.masks import CAUSAL, FULL
from hasten.errors import IncompatibleError, MissingExtraError, out_of_range
from hasten.kernels import library
from hasten.kernels.weights import read_bandwidth
from hasten.models.native import NativeStack

if TYPE_CHECKING:
    from hasten.llm import LLM

CONTEXT = 64  # tokens before the first that is timed
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
PREFILL = 256
PEERS = ("llama.cpp", "transformers")
Decoder = Callable[[list[int], int], tuple[float, float, list[int]]]  # (prompt, tokens) -> seconds to read, to decode, ids


def stack_of(llm: LLM) -> NativeStack:
    """The native stack of a loaded model; raises IncompatibleError for models on another backbone."""
    if not isinstance(llm.model, NativeStack):
        raise IncompatibleError(
            f"suite 'kernels' measures the native stack; {llm.name!r} runs on {llm.model.name!r}",
            hint="load a Llama, SmolLM, Qwen or Gemma model without --backbone torch",
            field="suite",
        )
    return llm.model


def weight_bytes(model: NativeStack) -> int:
    """Bytes of weights that one token's pass reads: every matrix but the input embedding, of which it reads one row."""
    own = {name: one for name, one in model.weights.matrices.items() if name != "embed"}
    return sum(one.nbytes for one in own.values())


def pass_seconds(
    model: NativeStack, tokens: int, context: int, repeats: int, *, full: bool = False, logits: str = "all"
) -> float:
    """The fastest of `repeats` passes over `tokens` query tokens behind `context` others; `full`: they see one another."""
    layout = model.pool(1 << 50).layout
    row = model.pool(layout.nbytes(context + tokens + 64)).open(context + tokens)
    row.length = context
    ids = torch.arange(tokens) % model.config.vocab_size
    given = RowInput(ids, torch.arange(context, context + tokens), row, FULL if full else CAUSAL, logits)  # type: ignore[arg-type]
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        model.run([given])
        best = min(best, time.perf_counter() - start)
    row.release()
    return best


def curve(model: NativeStack, context: int = 256, repeats: int = 9) -> dict[str, Any]:
    """t(T), prompt speed, a diffusion block against a whole canvas, and the share of every part of a pass."""
    times = {tokens: pass_seconds(model, tokens, context, repeats) for tokens in SIZES}
    short = pass_seconds(model, 1, CONTEXT, 3 * repeats)
    read = pass_seconds(model, PREFILL, 0, 3, logits="last")
    pairs = []  # side by side, as the machine's pace changes
    for _ in range(5):
        whole_s = pass_seconds(model, PREFILL, 0, 1, full=True, logits="all")
        pairs.append((whole_s, pass_seconds(model, 32, PREFILL - 32, 2, full=True, logits="all")))
    canvas, block = (min(one) for one in zip(*pairs, strict=True))
    parts: dict[str, dict[str, float]] = {}
    for tokens in (1, 8):
        model.measure_parts()
        pass_seconds(model, tokens, context, 20)
        whole = sum(model.parts.values())
        parts[str(tokens)] = {name: round(seconds / whole, 3) for name, seconds in model.parts.items()}
        model.part_seconds = None
    return {
        "pass_ms": {str(n): round(s * 1e3, 3) for n, s in times.items()},
        "ratio_to_one": {str(n): round(s / times[1], 2) for n, s in times.items()},
        "gb_per_s": round(weight_bytes(model) / short / 1e9, 1),
        "short_context_ms": round(short * 1e3, 3),
        "prompt_tokens_per_s": round(PREFILL / read),
        "canvas_256_ms": round(canvas * 1e3, 1),
        "block_32_ms": round(block * 1e3, 1),
        "canvas_over_block": round(median(whole_s / block_s for whole_s, block_s in pairs), 2),
        "share_of_time": parts,
    }


def own_decoder(llm: LLM) -> Decoder:
    """hasten as users run it: the engine, plain decoding."""

    def run(prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
        out = llm.generate(prompt, method="plain", max_tokens=tokens, ignore_eos=True)
        return out.usage.prefill_s, out.usage.decode_s, list(out.tokens)

    return run


def peer_decoders(path: Path, wanted: tuple[str, ...] = PEERS) -> dict[str, Decoder]:
    """The peers that are installed, on the same file; the others are named on stderr with the reason."""
    from hasten.bench.compare import Prompt
    from hasten.bench.peers import llama_plain, transformers_peers

    found: dict[str, Any] = {}
    threads = torch.get_num_threads()
    for name in wanted:
        try:
            if name == "llama.cpp":
                found |= llama_plain(path, threads)
            else:
                found["transformers bfloat16"] = transformers_peers(path, torch.bfloat16)["transformers"]
        except MissingExtraError as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)

    def decoder(runner: Any) -> Decoder:
        def run(prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
            answer = runner(Prompt(0, "", tuple(prompt)), tokens)
            return answer.seconds - answer.decode_s, answer.decode_s, list(answer.tokens)

        return run

    return {name: decoder(runner) for name, runner in found.items()}


def race(
    decoders: Mapping[str, Decoder], prompt: list[int], tokens: int, rounds: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Every decoder in turn, `rounds` times: tokens per second, and the first one's speed as a multiple of each other's."""
    if rounds < 1:
        raise out_of_range("rounds", rounds, "at least 1")
    names = list(decoders)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    texts: dict[str, list[int]] = {}
    for name in names:
        decoders[name](prompt, 8)  # what is set up once is not timed
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            _, seconds, texts[name] = decoders[name](prompt, tokens)
            speeds[name].append((tokens - 1) / seconds)
        if progress is not None:
            progress("decoding in turn", i + 1, rounds)
    first = names[0]
    return {
        name: {
            "tokens_per_s": Spread.of(speeds[name], 1).to_dict(),
            "first_over_this": Spread.of([a / b for a, b in zip(speeds[first], speeds[name], strict=True)], 2).to_dict(),
            "same_tokens_as_first": next(
                (i for i, (a, b) in enumerate(zip(texts[first], texts[name], strict=False)) if a != b), len(texts[name])
            ),
        }
        for name in names
    }


def loading(llm: LLM) -> dict[str, float]:
    """Seconds to repack a GGUF file, to load the model again, and from loading to its first token."""
    import hasten
    from hasten.models.gguf import open_gguf
    from hasten.models.packing import from_gguf

    file = open_gguf(llm.source)
    start = time.perf_counter()
    from_gguf(file, file.config())
    repacked = time.perf_counter()
    again = hasten.load(llm.source, cache_bytes=100_000_000)
    loaded = time.perf_counter()
    again.generate([1], max_tokens=1, method="plain")
    return {
        "repack_s": round(repacked - start, 3),
        "load_s": round(loaded - repacked, 3),
        "load_to_first_token_s": round(time.perf_counter() - repacked, 3),
    }


def measure(
    model: str | Path,
    *,
    rounds: int = 7,
    tokens: int = 128,
    peers: tuple[str, ...] = PEERS,
    progress: Progress | None = None,
    **how: Any,
) -> dict[str, Any]:
    """The whole suite for one model: machine, curves for exact and int8 activations, and the race.

    `how`: further options of `hasten.load`. Raises IncompatibleError for models that do not run on the native stack.
    """
    import hasten

    started = time.perf_counter()
    modes, stacks = {}, {}
    for mode in library.ACTIVATIONS:
        modes[f"hasten {mode}"] = hasten.load(model, activations=mode, **how)
        stacks[f"hasten {mode}"] = stack_of(modes[f"hasten {mode}"])
    llm = modes["hasten exact"]
    bandwidth = read_bandwidth()
    result: dict[str, Any] = {
        "model": Path(llm.source).name,
        "layouts": sorted({one.layout for one in stacks["hasten exact"].weights.matrices.values()}),
        "weight_mb": round(weight_bytes(stacks["hasten exact"]) / 1e6, 1),
        "isa": library.level(),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "machine": machine(),
    }
    for i, (name, stack) in enumerate(stacks.items()):
        if progress is not None:
            progress("timing passes", i, len(stacks))
        result[name] = curve(stack)
        result[name]["share_of_bandwidth"] = round(result[name]["gb_per_s"] * 1e9 / bandwidth, 2)
    prompt = [i % 1000 + 100 for i in range(CONTEXT)]
    if llm.tokenizer is not None:
        prompt = llm.encode("Here is a short story about a keeper who found a letter in a bottle. " * 4)[:CONTEXT]
    found: dict[str, Decoder] = {}
    if Path(llm.source).suffix == ".gguf":
        result["loading"] = loading(llm)
        found = peer_decoders(Path(llm.source), peers)
    for mode, other in modes.items():
        own = {mode: own_decoder(other)}
        result[f"race, {mode}"] = race({**own, **found}, prompt, tokens, rounds, progress)
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result
