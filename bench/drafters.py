"""Drafters on smollm2-135m: tokens per pass and speed against plain decoding, on six kinds of task, in one alternating run.

    python bench/drafters.py                                 # about four minutes; writes bench/results/drafters.json
    python bench/drafters.py --per-group 2 --tokens 24 --out /tmp/drafters.json --methods token-recycling:nodes=4

Run it with nothing else running. Every prompt is decoded by every method in turn, greedy; the order turns from prompt to
prompt. Reported per group are tokens per target pass, the ratio of plain decoding's time to the method's (medians over
prompts, with quartiles), and prompts whose text is that of plain decoding, all of them in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from plain import machine

import hasten
from hasten.bench.suites import spec

HERE = Path(__file__).parent
METHODS = ("prompt-lookup", "token-recycling", "token-recycling:nodes=12")


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def measure(dtype: str, methods: list[str], per_group: int, tokens: int) -> dict[str, Any]:
    """Group -> method -> figures, plus "all", for one precision."""
    llm = hasten.load("smollm2-135m", dtype=dtype, cache_bytes=600_000_000)
    budget = 80
    prompts = [(group, one) for group, many in spec(per_group).items() for one in many]
    rows: dict[tuple[str, str], list[tuple[float, float, bool]]] = {}
    started = time.perf_counter()
    for i, (group, text) in enumerate(prompts):
        outputs: dict[str, Any] = {}
        took: dict[str, float] = {}
        order = ["plain", *methods]
        for name in order[i % len(order) :] + order[: i % len(order)]:
            parts = llm.parts((name,))
            if parts.drafter is not None:
                parts = type(parts)(parts.drafter, parts.rules, parts.law, budget, parts.method)
            request, _ = llm._request(
                llm._chat_ids([{"role": "user", "content": text}]), "plain", {"max_tokens": tokens, "ignore_eos": True}
            )
            start = time.perf_counter()
            outputs[name] = llm.engine.run([(request, parts)])[0][0]
            took[name] = time.perf_counter() - start
        for name in methods:
            usage = outputs[name].usage
            same = outputs[name].tokens == outputs["plain"].tokens
            row = (usage.tokens_per_forward, took["plain"] / took[name], same)
            for key in (group, "all"):
                rows.setdefault((key, name), []).append(row)
        left = (time.perf_counter() - started) / (i + 1) * (len(prompts) - i - 1)
        print(f"{dtype}: {i + 1}/{len(prompts)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    result: dict[str, Any] = {}
    for (group, name), values in rows.items():
        passes, ratios, same = zip(*values, strict=True)
        result.setdefault(group, {})[name] = {
            "tokens_per_pass": round(statistics.mean(passes), 2),
            "speed_ratio": quartiles(list(ratios)),
            "same_text": f"{sum(same)} of {len(same)}",
        }
    return result


def main() -> None:
    """Run the comparison and write its result file."""
    about = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    about.add_argument("--methods", nargs="+", default=list(METHODS), help="drafters, with settings")
    about.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="precisions (default both)")
    about.add_argument("--per-group", type=int, default=3, help="prompts per group, at most 10 (default 3)")
    about.add_argument("--tokens", type=int, default=48, help="new tokens per prompt (default 48)")
    about.add_argument("--out", type=Path, default=HERE / "results" / "drafters.json", help="result file")
    args = about.parse_args()
    torch.set_num_threads(2)
    result = {
        "about": "batch 1, greedy, smollm2-135m; ratio = plain decoding's seconds / the method's, prompt reading included",
        "tokens": args.tokens,
        "prompts_per_group": args.per_group,
        "machine": machine(),
        **{kind: measure(kind, args.methods, args.per_group, args.tokens) for kind in args.dtypes},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for kind in args.dtypes:
        for group, methods in result[kind].items():
            for name, f in methods.items():
                ratio = f["speed_ratio"]
                print(f"{kind} {group:10} {name:40} {f['tokens_per_pass']:5.2f} tokens/pass  {ratio['median']:.2f}x"
                      f" ({ratio['low']:.2f}-{ratio['high']:.2f})  same text {f['same_text']}")  # fmt: skip


if __name__ == "__main__":
    main()
