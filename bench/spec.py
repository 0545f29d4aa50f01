"""Speculative decoding on smollm2-135m: six task groups, every method and peers in one alternating run.

    python bench/spec.py                                     # about half an hour; writes bench/results/spec.json
    python bench/spec.py --per-group 2 --tokens 32 --methods auto --setups int8 --out /tmp/spec.json

Run it with nothing else running. Every prompt is answered by every method in turn, greedy; the order turns from prompt to
prompt. Methods run as users run them: the engine measures what passes cost and verifies the nodes that pay. Peers
(`hasten.bench.peers`) are transformers' `generate` on the same weights and llama.cpp on the same file, each plain and with
its own prompt lookup; what is not installed is left out. Reported are tokens per pass, seconds per pass against plain
decoding's, the ratio of plain decoding's time to the method's for decoding alone and for the whole request (means over
prompts, with quartiles), the same against the faster of llama.cpp's two plain runs, time spent drafting, and texts equal
to plain decoding's. A setup is how hasten runs the model: exact (native, as stored), int8 (native, 8-bit activations),
bfloat16 (native, weights rounded to it) or torch (float32).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.bench.compare import Prompt, Row, compare, runner
from hasten.bench.peers import peers
from hasten.bench.report import machine
from hasten.bench.suites import spec
from hasten.models import catalog

HERE = Path(__file__).parent
METHODS = ("prompt-lookup", "token-recycling", "auto")
PEERS = ("transformers", "llama.cpp")
SETUPS: dict[str, dict[str, str]] = {
    "exact": {},
    "int8": {"activations": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "torch": {"backbone": "torch", "dtype": "float32"},
}


def quartiles(values: list[float]) -> dict[str, float]:
    """Mean, lower and upper quartile."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"mean": round(statistics.mean(values), 3), "low": round(low, 3), "high": round(high, 3)}


def figures(rows: Sequence[Row], name: str, tokens: int) -> dict[str, Any]:
    """What one method did on these prompts."""
    many = [(row.answers[name], row.answers["plain"]) for row in rows]
    one: dict[str, Any] = {
        "decode_ratio": quartiles([plain.decode_s / own.decode_s for own, plain in many]),
        "total_ratio": quartiles([plain.seconds / own.seconds for own, plain in many]),
        "tokens_per_s": round(statistics.mean((tokens - 1) / own.decode_s for own, _ in many), 1),
        "same_text": f"{sum(own.tokens == plain.tokens for own, plain in many)} of {len(many)}",
    }
    plain_llama = [peer for peer in rows[0].answers if peer in ("llama.cpp", "llama.cpp flash attention")]
    if plain_llama:
        fastest = [min(row.answers[peer].decode_s for peer in plain_llama) for row in rows]
        one["over_llama"] = quartiles([best / own.decode_s for best, (own, _) in zip(fastest, many, strict=True)])
    if all(own.passes for own, _ in many):
        cost = [own.decode_s / own.passes / (plain.decode_s / plain.passes) for own, plain in many]
        one["tokens_per_pass"] = round(statistics.mean((tokens - 1) / own.passes for own, _ in many), 2)
        one["pass_cost"] = round(statistics.mean(cost), 2)
        one["drafting"] = round(statistics.mean(own.draft_s / own.decode_s for own, _ in many), 4)
    return one


def measure(setup: str, methods: list[str], per_group: int, tokens: int, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Group -> method -> figures, plus "all", for one setup."""
    llm = hasten.load("smollm2-135m", cache_bytes=600_000_000, **SETUPS[setup])
    over = [
        Prompt(0, group, tuple(llm.chat_ids([{"role": "user", "content": text}])))
        for group, many in spec(per_group).items()
        for text in many
    ]
    runners = {name: runner(llm, name.split("+")) for name in ("plain", *methods)}
    runners |= peers(catalog.pull("smollm2-135m"), torch.bfloat16 if setup == "bfloat16" else torch.float32, wanted)
    started = time.perf_counter()

    def note(what: str, done: int, total: int) -> None:
        left = (time.perf_counter() - started) / done * (total - done) if done else float("nan")
        print(f"{setup}: {done}/{total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    rows = compare(runners, over, tokens, note).rows
    result: dict[str, Any] = {}
    for group in (*dict.fromkeys(prompt.group for prompt in over), "all"):
        chosen = [row for row in rows if group in (row.prompt.group, "all")]
        result[group] = {name: figures(chosen, name, tokens) for name in runners}
    result["pass_ms"] = {str(n): round(s * 1e3, 1) for n, s in sorted(llm.engine.pass_cost.table().items())}
    return result


def installed(*names: str) -> list[str]:
    """Those of these distributions that are there, for the record of the machine."""
    from importlib import metadata

    return [name for name in names if any(metadata.distributions(name=name))]


def main() -> None:
    """Run the comparison and write its result file."""
    about = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    about.add_argument("--methods", nargs="+", default=list(METHODS), help="drafters, with settings; one union: a+b")
    about.add_argument("--setups", nargs="+", default=["exact", "int8"], choices=list(SETUPS), help="ways to run the model")
    about.add_argument("--per-group", type=int, default=5, help="prompts per group, at most 10 (default 5)")
    about.add_argument("--tokens", type=int, default=96, help="new tokens per prompt (default 96)")
    about.add_argument(
        "--peers", nargs="*", default=list(PEERS), choices=PEERS, help="programs to compare with (default all)"
    )
    about.add_argument("--out", type=Path, default=HERE / "results" / "spec.json", help="result file")
    args = about.parse_args()
    torch.set_num_threads(2)
    result = {
        "about": "batch 1, greedy, smollm2-135m; ratio = plain decoding's seconds / the method's",
        "tokens": args.tokens,
        "prompts_per_group": args.per_group,
        "setups": args.setups,
        "machine": machine(*installed("transformers", "llama-cpp-python")),
        **{kind: measure(kind, args.methods, args.per_group, args.tokens, tuple(args.peers)) for kind in args.setups},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for kind in args.setups:
        for group, methods in result[kind].items():
            if group == "pass_ms":
                continue
            for name, f in methods.items():
                per_pass = f"{f['tokens_per_pass']:5.2f} tokens/pass" if "tokens_per_pass" in f else " " * 17
                speed = f"decoding {f['decode_ratio']['mean']:.2f}x  whole {f['total_ratio']['mean']:.2f}x"
                print(f"{kind} {group:10} {name:28} {per_pass} {f['tokens_per_s']:6.1f}/s  {speed}  same {f['same_text']}")


if __name__ == "__main__":
    main()
