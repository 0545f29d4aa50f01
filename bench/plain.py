"""Plain decoding of smollm2-135m against transformers' `generate`: same weights, same machine, alternating rounds.

    python bench/plain.py                # both precisions, about four minutes; writes bench/results/plain.json
    python bench/plain.py --rounds 3 --tokens 32 --out /tmp/plain.json

Run it with nothing else running. transformers runs eagerly (no torch.compile) in both of its attention forms, "sdpa",
its default, and "eager". Reported are medians over rounds with their range, ratios of one round's two times, the greedy
tokens both sides agree on, and the part of a token's time that is spent outside linear layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import hasten
from hasten.bench.peers import transformers_model
from hasten.bench.report import machine
from hasten.models.linear import Linear

HERE = Path(__file__).parent
PROMPT = "Here is a short story about a lighthouse keeper who found a letter in a bottle."


@contextmanager
def linear_time(model: torch.nn.Module, kinds: tuple[type, ...]) -> Iterator[list[float]]:
    """Collects the seconds spent inside the linear layers of `model`, as a list with one entry per call.

    The class is patched, not the instances: hasten's layers are called without torch's call machinery.
    """
    spent: list[float] = []

    def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = forward(*args, **kwargs)
            spent.append(time.perf_counter() - start)
            return out

        return run

    kind = next(type(module) for module in model.modules() if isinstance(module, kinds))
    before = kind.__call__
    kind.__call__ = timed(before)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        kind.__call__ = before  # type: ignore[method-assign]


@torch.inference_mode()
def floor(llm: Any, context: int = 64, repeats: int = 20) -> dict[str, float]:
    """Milliseconds of one token at the least that single torch operators allow, with hasten's own weights.

    "linear_alone": every linear layer, nothing between them. "fewest_operators": the whole computation written out for
    one row without hooks, masks, cache bookkeeping, sampling or text. No engine over these operators can be faster.
    """
    c, model = llm.model.config, llm.model
    groups, dim = (c.kv_heads, c.heads // c.kv_heads), c.head_dim
    slabs = [torch.zeros(2, c.kv_heads, context + 1, dim, dtype=model.dtype) for _ in model.layers]
    cos, sin = model.ropes[0].at(torch.tensor([context]), model.dtype)
    start = torch.randn(1, c.hidden).to(model.dtype)

    def fewest() -> None:
        h = start
        for block, slab in zip(model.layers, slabs, strict=True):
            fused = block.qkv(block.attn_norm(h)).view(1, -1, dim)
            qk = fused[:, : c.heads + c.kv_heads]
            qk = torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin)
            slab[0, :, context], slab[1, :, context] = qk[0, c.heads :], fused[0, c.heads + c.kv_heads :]
            mixed = torch.nn.functional.scaled_dot_product_attention(
                qk[:, : c.heads].view(1, *groups, dim), slab[:1], slab[1:], scale=c.attn_scale
            )
            h = h + block.out(mixed.view(1, -1))
            gate, up = block.gate_up(block.ffn_norm(h)).chunk(2, -1)
            h = h + block.down(torch.nn.functional.silu(gate).mul_(up))
        model.head(model.norm(h)).argmax(-1).item()

    xs = {n: torch.randn(1, n).to(model.dtype) for n in (c.hidden, c.heads * dim, c.ffn)}

    def alone() -> None:
        for block in model.layers:
            block.qkv(xs[c.hidden]), block.out(xs[c.heads * dim]), block.gate_up(xs[c.hidden]), block.down(xs[c.ffn])
        model.head(xs[c.hidden])

    took: dict[str, list[float]] = {"linear_alone_ms": [], "fewest_operators_ms": []}
    for i in range(repeats + 3):
        for name, work in (("linear_alone_ms", alone), ("fewest_operators_ms", fewest)):
            one = seconds(work)
            if i >= 3:
                took[name].append(one)
    return {name: round(statistics.median(values) * 1000, 2) for name, values in took.items()}


def seconds(work: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median, least and greatest."""
    pairs = (("median", statistics.median(values)), ("min", min(values)), ("max", max(values)))
    return {name: round(value, digits) for name, value in pairs}


def compare(dtype: str, rounds: int, tokens: int, note: Callable[[str], None]) -> dict[str, Any]:
    """All figures of one precision."""
    llm = hasten.load("smollm2-135m", dtype=dtype, backbone="torch", cache_bytes=400_000_000)
    theirs = transformers_model(Path(llm.source), getattr(torch, dtype))
    prompt = llm.encode(PROMPT)
    long = (llm.encode(PROMPT + "\n") * 40)[:512]

    def ours(ids: list[int], new: int) -> list[int]:
        return list(llm.generate(ids, max_tokens=new, ignore_eos=True, method="plain").tokens)

    def other(ids: list[int], new: int) -> list[int]:
        row = torch.tensor([ids])
        out = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False, pad_token_id=0)
        return out[0, len(ids) :].tolist()

    def set_attention(kind: str) -> None:
        theirs.set_attn_implementation(kind)

    a, b = ours(prompt, tokens), other(prompt, tokens)
    agree = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), tokens)
    times: dict[str, list[float]] = {name: [] for name in ("hasten", "sdpa", "eager", "prefill", "prefill_sdpa")}
    for i in range(rounds + 1):
        runs: list[tuple[str, Callable[[], Any]]] = [("hasten", lambda: ours(prompt, tokens))]
        runs += [(kind, lambda: other(prompt, tokens)) for kind in ("sdpa", "eager")]
        runs += [("prefill", lambda: ours(long, 1)), ("prefill_sdpa", lambda: other(long, 1))]
        for name, work in runs[:: 1 if i % 2 else -1]:
            set_attention("eager" if name == "eager" else "sdpa")
            took = seconds(work)
            if i:  # the first round warms up
                times[name].append(took)
        note(f"{dtype}: round {i}/{rounds}")
    inside: dict[str, float] = floor(llm)
    set_attention("sdpa")
    for name, model, kinds, work in (
        ("hasten", llm.model, (Linear,), lambda: ours(prompt, tokens)),
        ("transformers", theirs, (torch.nn.Linear,), lambda: other(prompt, tokens)),
    ):
        with linear_time(model, kinds) as spent:
            total = seconds(work)
        inside[f"{name}_linear_ms"] = round(sum(spent) / tokens * 1000, 2)
        inside[f"{name}_outside_ms"] = round((total - sum(spent)) / tokens * 1000, 2)
    return {
        "hasten_tokens_per_s": spread([tokens / t for t in times["hasten"]], 1),
        "transformers_sdpa_tokens_per_s": spread([tokens / t for t in times["sdpa"]], 1),
        "transformers_eager_tokens_per_s": spread([tokens / t for t in times["eager"]], 1),
        "ratio_sdpa": spread([t / h for h, t in zip(times["hasten"], times["sdpa"], strict=True)], 2),
        "ratio_eager": spread([t / h for h, t in zip(times["hasten"], times["eager"], strict=True)], 2),
        "prompt_tokens_per_s": spread([len(long) / t for t in times["prefill"]], 0),
        "prompt_ratio_sdpa": spread([t / h for h, t in zip(times["prefill"], times["prefill_sdpa"], strict=True)], 2),
        "per_token": inside,
        "same_greedy_tokens": f"{agree} of {tokens}",
    }


def main() -> None:
    """Run the comparison and write its result file."""
    about = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    about.add_argument("--rounds", type=int, default=7, help="measured rounds, after one that warms up (default 7)")
    about.add_argument("--tokens", type=int, default=64, help="new tokens per generation (default 64)")
    about.add_argument("--threads", type=int, default=2, help="threads of both sides (default 2)")
    about.add_argument("--out", type=Path, default=HERE / "results" / "plain.json", help="result file")
    args = about.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    live = sys.stderr.isatty()

    def note(text: str) -> None:
        print("\r" + text if live else text, end="  " if live else "\n", file=sys.stderr, flush=True)

    result = {
        "about": "batch 1, greedy; new tokens per second over a generation, prompt included; ratios of alternating runs",
        "tokens": args.tokens,
        "rounds": args.rounds,
        "machine": machine("transformers"),
        **{kind: compare(kind, args.rounds, args.tokens, note) for kind in ("float32", "bfloat16")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
