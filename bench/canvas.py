"""Canvas decoding on mini-dlm: presets and baselines side by side at several canvas lengths, every answer verified.

    python bench/canvas.py                                 # some ten minutes; writes bench/results/canvas.json
    python bench/canvas.py --canvas 128 --per-world 2 --out /tmp/canvas.json

Run it with nothing else running. Every task is answered by every arm in turn; the order turns from task to task. Tasks are
unseen samples of the worlds that have answers as long as the canvas. Reported per arm and canvas: answers right in full,
forwards and query tokens per answer, and the wall time of the one-token reference sampler divided by the arm's, each as
median, least and greatest over three seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from hasten.bench.canvases import open_mini, trial
from hasten.bench.report import machine

HERE = Path(__file__).parent
ARMS: dict[str, tuple[str, ...]] = {
    "reference": ("reference",),
    "exact": ("exact",),
    "dual cache": ("reference", "canvas-cache"),
    "threshold": ("threshold",),
    "dual cache + threshold": ("threshold", "canvas-cache"),
    "dual cache + factor": ("factor:f=0.5", "canvas-cache"),
    "fast": ("fast",),
    "few-step": ("few-step",),
}
FULL = ("dual cache", "dual cache + threshold", "dual cache + factor", "few-step")  # arms that are for full attention
WORLDS = {
    64: ("copy", "reverse", "sort", "replace", "records", "sums"),
    128: ("copy", "records", "sums"),
    512: ("copy", "records"),
}


def show(what: str, done: int, total: int) -> None:
    """One line of progress on stderr."""
    print(f"\r{what} {done}/{total} ", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canvas", type=int, nargs="+", default=[64, 128, 512], help="canvas lengths in tokens")
    parser.add_argument("--per-world", type=int, default=4, help="tasks of a world per seed; fewer on long canvases")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="of " + ", ".join(ARMS))
    parser.add_argument("--model", default="mini-dlm", help="a catalog name or a directory")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "canvas.json", help="where to write")
    args = parser.parse_args()
    llm = open_mini(show, args.model)
    blocks = llm.model.capabilities.block is not None  # its cache is exact and always there, its blocks are its own
    names = [name for name in args.arms if name not in (FULL if blocks else ("fast",))]  # "fast" is one of FULL there
    started, canvases = time.perf_counter(), {}
    for canvas in args.canvas:
        worlds = WORLDS[max(size for size in WORLDS if size <= max(canvas, 64))]
        arms = {name: ARMS[name] for name in names}
        done = trial(
            llm,
            arms,
            quick=False,
            progress=show,
            worlds=worlds,
            canvas=canvas,
            per_world=max(1, args.per_world * 64 // canvas),
        )
        canvases[str(canvas)] = done.to_dict()
        print(f"\ncanvas {canvas}, {len(done.rows)} tasks of {', '.join(worlds)}")
        for name in done.arms:
            print(
                f"  {name:24} {done.accuracy(name).median:5.1f} % right, {done.nfe(name).median:6.1f} forwards, "
                f"{done.speedup(name)}x"
            )
    result: dict[str, Any] = {
        "model": args.model,
        "arms": {name: list(ARMS[name]) for name in names},
        "exact_cache": blocks,
        "canvases": canvases,
        "machine": machine(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
