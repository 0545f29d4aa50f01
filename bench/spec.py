"""Speculative decoding on smollm2-135m: six task groups, every method and peers in one alternating run.

    python bench/spec.py                                     # about fifteen minutes; writes bench/results/spec.json
    python bench/spec.py --per-group 2 --tokens 32 --methods auto --dtypes bfloat16 --out /tmp/spec.json

Run it with nothing else running. Every prompt is answered by every method in turn, greedy; the order turns from prompt to
prompt. Methods run as users run them: the engine measures what passes cost and verifies the nodes that pay. Peers are
transformers' `generate`, plain and with its own prompt lookup, on the same weights. Reported are tokens per pass, seconds
per pass against plain decoding's, the ratio of plain decoding's time to the method's for decoding alone and for the whole
request (means over prompts, with quartiles), time spent drafting, and texts equal to plain decoding's.
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
from plain import peer

import hasten
from hasten.bench.report import machine
from hasten.bench.suites import spec
from hasten.models import catalog

HERE = Path(__file__).parent
METHODS = ("prompt-lookup", "token-recycling", "auto")
PEERS = {"transformers": {}, "transformers prompt lookup": {"prompt_lookup_num_tokens": 10}}


def quartiles(values: list[float]) -> dict[str, float]:
    """Mean, lower and upper quartile."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"mean": round(statistics.mean(values), 3), "low": round(low, 3), "high": round(high, 3)}


def hasten_run(llm: Any, ids: list[int], method: str, tokens: int) -> dict[str, Any]:
    """One answer by one method, with its figures."""
    start = time.perf_counter()
    out = llm.generate(ids, method=method, max_tokens=tokens, ignore_eos=True)
    seconds = time.perf_counter() - start
    u = out.usage
    return {"tokens": list(out.tokens), "seconds": seconds, "decode": u.decode_s, "passes": u.forwards, "draft": u.draft_s,
            "per_pass": u.tokens_per_forward}  # fmt: skip


def peer_run(model: Any, ids: list[int], options: dict[str, Any], tokens: int) -> dict[str, Any]:
    """One answer of transformers; its decoding time is all but that of an answer of one token."""
    given = torch.tensor([ids])
    common = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(given)}
    start = time.perf_counter()
    model.generate(given, max_new_tokens=1, **common)
    first = time.perf_counter() - start
    start = time.perf_counter()
    out = model.generate(given, max_new_tokens=tokens, min_new_tokens=tokens, **common, **options)
    seconds = time.perf_counter() - start
    return {"tokens": out[0, len(ids) :].tolist(), "seconds": seconds, "decode": seconds - first}


def measure(dtype: str, methods: list[str], per_group: int, tokens: int, peers: bool) -> dict[str, Any]:
    """Group -> method -> figures, plus "all", for one precision."""
    llm = hasten.load("smollm2-135m", dtype=dtype, cache_bytes=600_000_000)
    other = peer(catalog.pull("smollm2-135m"), getattr(torch, dtype)) if peers else None
    prompts = [(group, one) for group, many in spec(per_group).items() for one in many]
    llm.generate("Once upon a time", method="plain", max_tokens=16)
    order = ["plain", *methods, *(PEERS if peers else ())]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    started = time.perf_counter()
    for i, (group, text) in enumerate(prompts):
        ids = llm._chat_ids([{"role": "user", "content": text}])
        done: dict[str, dict[str, Any]] = {}
        turn = i % len(order)
        for name in order[turn:] + order[:turn]:
            run = peer_run(other, ids, PEERS[name], tokens) if name in PEERS else hasten_run(llm, ids, name, tokens)
            done[name] = run
        for name, run in done.items():
            for key in (group, "all"):
                rows.setdefault((key, name), []).append({**run, "plain": done["plain"], "prompt": len(ids)})
        left = (time.perf_counter() - started) / (i + 1) * (len(prompts) - i - 1)
        print(f"{dtype}: {i + 1}/{len(prompts)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    result: dict[str, Any] = {}
    for (group, name), many in rows.items():
        one: dict[str, Any] = {
            "decode_ratio": quartiles([r["plain"]["decode"] / r["decode"] for r in many]),
            "total_ratio": quartiles([r["plain"]["seconds"] / r["seconds"] for r in many]),
            "tokens_per_s": round(statistics.mean((tokens - 1) / r["decode"] for r in many), 1),
            "same_text": f"{sum(r['tokens'] == r['plain']['tokens'] for r in many)} of {len(many)}",
        }
        if "passes" in many[0]:
            cost = [r["decode"] / r["passes"] / (r["plain"]["decode"] / r["plain"]["passes"]) for r in many]
            one["tokens_per_pass"] = round(statistics.mean(r["per_pass"] for r in many), 2)
            one["pass_cost"] = round(statistics.mean(cost), 2)
            one["drafting"] = round(statistics.mean(r["draft"] / r["decode"] for r in many), 4)
        result.setdefault(group, {})[name] = one
    result["pass_ms"] = {str(n): round(s * 1e3, 1) for n, s in sorted(llm.engine.pass_cost.table().items())}
    return result


def main() -> None:
    """Run the comparison and write its result file."""
    about = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    about.add_argument("--methods", nargs="+", default=list(METHODS), help="drafters, with settings; one union: a+b")
    about.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="precisions (default both)")
    about.add_argument("--per-group", type=int, default=5, help="prompts per group, at most 10 (default 5)")
    about.add_argument("--tokens", type=int, default=96, help="new tokens per prompt (default 96)")
    about.add_argument("--no-peers", action="store_true", help="leave transformers out")
    about.add_argument("--out", type=Path, default=HERE / "results" / "spec.json", help="result file")
    args = about.parse_args()
    torch.set_num_threads(2)
    result = {
        "about": "batch 1, greedy, smollm2-135m; ratio = plain decoding's seconds / the method's",
        "tokens": args.tokens,
        "prompts_per_group": args.per_group,
        "machine": machine("transformers"),
        **{kind: measure(kind, args.methods, args.per_group, args.tokens, not args.no_peers) for kind in args.dtypes},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for kind in args.dtypes:
        for group, methods in result[kind].items():
            if group == "pass_ms":
                continue
            for name, f in methods.items():
                per_pass = f"{f['tokens_per_pass']:5.2f} tokens/pass" if "tokens_per_pass" in f else " " * 17
                speed = f"decoding {f['decode_ratio']['mean']:.2f}x  whole {f['total_ratio']['mean']:.2f}x"
                print(f"{kind} {group:10} {name:28} {per_pass} {f['tokens_per_s']:6.1f}/s  {speed}  same {f['same_text']}")


if __name__ == "__main__":
    main()
