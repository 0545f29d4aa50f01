"""The server under load, and against llama.cpp's server and transformers' `serve`.

    python bench/serve.py --seconds 300 --llama-server PATH      # all, half an hour; writes bench/results/serve.json
    python bench/serve.py load --seconds 20 --out /tmp/serve.json
    python bench/serve.py against --rounds 7 --llama-server PATH

load: 64 clients on mini models, 16 on smollm2-135m, every kind of request mixed: short and long, streamed or not, chats,
completions, canvases, drafted or not, seeds, several choices, clients that hang up. Each answer must equal the one that
the same request got alone. Retries on 429 and 503 as clients do.

against: streamed chats of smollm2-135m, greedy, of as many tokens each, 1 and 8 at once; the servers answer in turn, with
the same client, the same GGUF file (transformers: its weights in float32) and two threads each. llama.cpp runs with flash
attention, 8 slots and continuous batching, with and without its n-gram drafts. Reported: tokens per second of all chats
together and time to the first token, medians over rounds with their range, and ratios of one round's two figures.

Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import wire

from hasten.bench.report import Spread, machine
from hasten.models import catalog

HERE = Path(__file__).parent
WORDS = [
    "light",
    "water",
    "stone",
    "garden",
    "morning",
    "letter",
    "river",
    "window",
    "story",
    "small",
    "green",
    "walks",
    "reads",
    "finds",
    "keeps",
    "under",
    "over",
    "before",
    "after",
    "every",
    "quiet",
    "teacher",
    "machine",
    "answer",
    "question",
    "number",
]


@contextlib.contextmanager
def server(command: Sequence[str], port: int, health: str, seconds: float = 180) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process of its own, from the time it answers 200 at `health` on; its output in the error message."""
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + seconds
            while True:
                with contextlib.suppress(OSError, EOFError):
                    if asyncio.run(wire.get(port, health))[0] == 200:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} does not serve: {log.read()[-1500:].decode('utf-8', 'replace')}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
            process.wait()


def hasten_server(port: int, *models: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """`hasten serve` with two threads."""
    command = (
        sys.executable,
        "-m",
        "hasten",
        "serve",
        *models,
        "--port",
        str(port),
        "--threads",
        "2",
        "--log-level",
        "warning",
    )
    return server(command, port, "/ready")


def free_port() -> int:
    """A port nobody listens on."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def resident_mb(process: subprocess.Popen[bytes]) -> float:
    """Memory of a process that is in RAM, in megabytes."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- load ---


def requests(causal: str, masked: str | None, count: int, long: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(kind, path, body) of `count` different requests, `long` tokens at most."""
    r, out = random.Random(11), []
    kinds = ["short chat", "long chat", "drafted chat", "choices", "completion", "long prompt"]
    kinds += ["canvas", "fast canvas"] if masked else []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        words = r.choices(WORDS, k=150 if kind == "long prompt" else r.randint(4, 14))
        body: dict[str, Any] = {
            "model": causal,
            "seed": i,
            "temperature": r.choice((0, 0.7, 1.2)),
            "max_tokens": r.randint(4, 16),
        }
        if kind in ("long chat", "drafted chat", "choices"):
            body["max_tokens"] = r.randint(long // 2, long)
        if kind == "drafted chat":
            body["hasten"] = {
                "method": r.choice(["plain", "prompt-lookup", "token-recycling", ["prompt-lookup", "token-recycling"]])
            }
        if kind == "choices":
            body |= {"n": 2, "top_p": 0.9, "presence_penalty": 0.3}
        if "canvas" in kind:
            body |= {"model": masked, "max_tokens": r.choice((16, 32, 64))}
            body["hasten"] = {"method": ["fast"] if kind == "fast canvas" else ["auto"]}
        if kind in ("completion", "canvas", "fast canvas"):
            path, given = "/v1/completions", {"prompt": " ".join(words[:8])}
        else:
            path, given = "/v1/chat/completions", {"messages": [{"role": "user", "content": " ".join(words)}]}
        out.append((kind, path, {**body, **given}))
    return out


async def load(
    port: int, process: subprocess.Popen[bytes], work: list[tuple[str, str, dict[str, Any]]], clients: int, seconds: float
) -> dict[str, Any]:
    """Ask everything alone, then for `seconds` from many clients at once; what went wrong, and how long it took."""
    alone = []
    for done, (_, path, body) in enumerate(work):
        show("alone", done, len(work))
        reply = await wire.ask(port, path, body)
        if reply.status != 200:
            raise RuntimeError(f"{body}: {reply.status} {reply.error}")
        alone.append(reply)
    counts = dict.fromkeys(("answers", "streamed", "hung_up", "retries", "lost", "mixed_up", "tokens"), 0)
    times: dict[str, list[float]] = {}
    first: list[float] = []
    wrong: list[str] = []
    memory = [round(resident_mb(process), 1)]
    canvases = [at for at, (kind, _, _) in enumerate(work) if "canvas" in kind]  # a quarter of the clients asks for these,
    others = [at for at in range(len(work)) if at not in canvases]  # or all would soon wait for what takes longest
    start = time.perf_counter()

    async def one(client: int) -> None:
        r = random.Random(client)
        while time.perf_counter() - start < seconds:
            at = r.choice(canvases if client % 4 == 0 else others) if canvases else r.randrange(len(work))
            kind, path, body = work[at]
            how, leave = dict(body), 0
            if r.random() < 0.6:
                how |= {"stream": True, "stream_options": {"include_usage": True}}
                leave = r.randint(1, 4) if r.random() < 0.05 else 0
            asked = time.perf_counter()
            while True:
                try:
                    reply = await wire.ask(port, path, how, leave_after=leave)
                except (OSError, EOFError, ValueError, asyncio.IncompleteReadError) as error:
                    reply = wire.Reply(0, error=repr(error))
                if reply.status not in (429, 503):
                    break
                counts["retries"] += 1
                await asyncio.sleep(reply.retry_s * r.uniform(0.5, 1.0))
            if reply.status != 200 or reply.error:
                counts["lost"] += 1
                wrong.append(f"{kind}: {reply.status} {reply.error}"[:200])
            elif leave:
                counts["hung_up"] += 1
            else:
                counts["answers"] += 1
                counts["tokens"] += reply.tokens
                times.setdefault(kind, []).append(time.perf_counter() - asked)
                if "stream" in how:
                    counts["streamed"] += 1
                    first.append(reply.first_s or reply.seconds)
                if not reply.same(alone[at]):
                    counts["mixed_up"] += 1
                    wrong.append(f"{kind} {body}: {reply.texts} instead of {alone[at].texts}"[:400])

    async def watch() -> None:
        while True:
            await asyncio.sleep(max(seconds / 30, 1))
            memory.append(round(resident_mb(process), 1))
            show("seconds", int(time.perf_counter() - start), int(seconds))

    watcher = asyncio.ensure_future(watch())
    await asyncio.gather(*map(one, range(clients)))
    took = time.perf_counter() - start
    watcher.cancel()
    end = time.monotonic() + 10
    while True:
        left = json.loads((await wire.get(port, "/ready"))[1])
        if (left["running"], left["waiting"]) == (0, 0) or time.monotonic() > end:
            break
        await asyncio.sleep(0.05)
    every = [one for group in times.values() for one in group]
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "different_requests": len(work),
        **counts,
        "rows_left": left["running"] + left["waiting"],
        "tokens_per_s": round(counts["tokens"] / took, 1),
        "requests_per_s": round(counts["answers"] / took, 2),
        "latency_s": quantiles(every),
        "latency_s_by_kind": {kind: quantiles(group) for kind, group in sorted(times.items())},
        "first_token_s": quantiles(first),
        "memory_mb": {"start": memory[0], "middle": memory[len(memory) // 2], "end": memory[-1], "most": max(memory)},
        "wrong": wrong[:10],
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and the longest."""
    if not values:
        return {}
    ordered = sorted(values)
    at95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return {"p50": round(statistics.median(ordered), 4), "p95": round(at95, 4), "max": round(ordered[-1], 4)}


def loads(args: argparse.Namespace) -> dict[str, Any]:
    """Both loads, each on a server of its own."""
    found: dict[str, Any] = {}
    if "mini" in args.models:
        with hasten_server(port := free_port(), args.causal, "mini-dlm") as process:
            work = requests(Path(args.causal).name, "mini-dlm", args.different, 96)
            found["mini"] = asyncio.run(load(port, process, work, args.mini_clients, args.seconds))
    if "smollm2" in args.models:
        with hasten_server(port := free_port(), "smollm2-135m") as process:
            work = requests("smollm2-135m", None, args.different // 2, 96)
            found["smollm2"] = asyncio.run(load(port, process, work, args.smollm2_clients, args.seconds))
    return found


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# --- against ---


def transformers_folder(gguf: Path, folder: Path) -> Path:
    """The GGUF file's weights, in float32, and its tokenizer as transformers reads them."""
    import torch

    import hasten
    from hasten.bench.peers import transformers_model

    model = transformers_model(gguf, torch.float32)
    tokenizer = hasten.load(gguf).tokenizer
    (end,) = tokenizer.encode("<|im_end|>", special=True)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer._fast.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**facts, "chat_template": tokenizer.chat_template}))
    return folder


def arms(args: argparse.Namespace, gguf: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> how to start that server, and what its requests add."""
    out: dict[str, dict[str, Any]] = {}
    for name, extra in (("hasten", {}), ("hasten plain", {"method": "plain"})):
        port = out["hasten"]["port"] if "hasten" in out else free_port()
        out[name] = {
            "port": port,
            "health": "/ready",
            "model": "smollm2-135m",
            # a label of its own: both arms ask one server the same prompts, and must not read them from each other's cache
            "extra": {"hasten": {**extra, "ignore_eos": True}, "prompt_cache_key": name},
        }
    how = [sys.executable, "-m", "hasten", "serve", "smollm2-135m", "--threads", "2", "--log-level", "warning"]
    out["hasten"]["command"] = [*how, "--port", str(out["hasten"]["port"])]
    if args.llama_server:
        common = [
            args.llama_server,
            "-m",
            str(gguf),
            "-t",
            "2",
            "-tb",
            "2",
            "-np",
            "8",
            "-c",
            "8192",
            "-fa",
            "on",
            "-cb",
            "--no-ui",
        ]
        drafts = ["--spec-type", "ngram-simple"]
        for name, more in (("llama.cpp", []), ("llama.cpp n-gram drafts", drafts)):
            port = free_port()
            command = [*common, "--port", str(port), *more]
            extra = {"ignore_eos": True, "cache_prompt": True}
            out[name] = {"port": port, "command": command, "health": "/health", "model": "x", "extra": extra}
    if args.transformers:
        place = str(transformers_folder(gguf, _made(folder / "smollm2")))
        for name, more in (("transformers", []), ("transformers continuous batching", ["--continuous-batching"])):
            port = free_port()
            command = [
                args.transformers,
                "serve",
                place,
                "--port",
                str(port),
                "--device",
                "cpu",
                "--dtype",
                "float32",
                *more,
            ]
            options = {
                "generation_config": json.dumps(
                    {"do_sample": False, "min_new_tokens": args.tokens, "max_new_tokens": args.tokens}
                )
            }
            out[name] = {"port": port, "command": command, "health": "/health", "model": place, "extra": options}
    return out


async def crowd(arm: dict[str, Any], prompts: Sequence[str], tokens: int) -> dict[str, float]:
    """So many chats at once: aggregate tokens per second, and the median time to a first token."""

    def body(prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        how = {"temperature": 0, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
        return {"model": arm["model"], "messages": messages, **how, **arm["extra"]}

    start = time.perf_counter()
    replies = await asyncio.gather(*(wire.ask(arm["port"], "/v1/chat/completions", body(one)) for one in prompts))
    seconds = time.perf_counter() - start
    for reply in replies:
        count = reply.tokens or reply.pieces
        if reply.status != 200 or reply.error or abs(count - tokens) > 1:
            raise RuntimeError(f"{reply.status} {reply.error}: {count} tokens instead of {tokens}")
    count = sum(reply.tokens or reply.pieces for reply in replies)
    return {"tokens_per_s": count / seconds, "first_token_s": statistics.median(reply.first_s for reply in replies)}


def against(args: argparse.Namespace) -> dict[str, Any]:
    """The servers in turn, round after round."""
    gguf = catalog.pull("smollm2-135m")
    out: dict[str, Any] = {"tokens": args.tokens, "rounds": args.rounds, "left_out": {}}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = arms(args, gguf, folder)
        for name in list(found):
            if "command" in found[name]:
                out.setdefault("commands", {})[name] = " ".join(Path(part).name for part in found[name]["command"])
                try:
                    stack.enter_context(server(found[name]["command"], found[name]["port"], found[name]["health"]))
                    asyncio.run(crowd(found[name], [f"{name} warms up"], args.tokens))
                except (RuntimeError, OSError, EOFError, asyncio.IncompleteReadError) as error:
                    out["left_out"][name] = str(error)[-600:]
                    del found[name]
        measured: dict[str, dict[int, list[dict[str, float]]]] = {name: {n: [] for n in args.at_once} for name in found}
        for number in range(args.rounds):
            for n in args.at_once:
                r = random.Random(f"{number} {n}")
                prompts = [f"Tell me about the {' '.join(r.sample(WORDS, 6))}." for _ in range(n)]
                order = list(found)[number % len(found) :] + list(found)[: number % len(found)]
                for name in order:
                    show(f"round, {name}, {n} at once", number + 1, args.rounds)
                    measured[name][n].append(asyncio.run(crowd(found[name], prompts, args.tokens)))
    for name, by_count in measured.items():
        out[name] = {
            str(n): {
                "tokens_per_s": Spread.of([one["tokens_per_s"] for one in rounds], 2).to_dict(),
                "first_token_s": Spread.of([one["first_token_s"] for one in rounds], 4).to_dict(),
                "hasten_ratio": Spread.of(
                    [
                        own["tokens_per_s"] / one["tokens_per_s"]
                        for own, one in zip(measured["hasten"][n], rounds, strict=True)
                    ]
                ).to_dict(),
            }
            for n, rounds in by_count.items()
        }
    return out


def show(what: str, done: int, total: int) -> None:
    """One line of progress on stderr."""
    print(f"\r{what} {done}/{total}        ", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and write the result file; a part that is not run keeps what the file had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", default=["load", "against"], help="load, against")
    parser.add_argument("--seconds", type=float, default=60, help="length of each load; the promise is about 300")
    parser.add_argument("--models", nargs="+", default=["mini", "smollm2"], help="which loads: mini, smollm2")
    parser.add_argument("--causal", default="mini-ar", help="the left-to-right mini model: a catalog name or directory")
    parser.add_argument("--mini-clients", type=int, default=64)
    parser.add_argument("--smollm2-clients", type=int, default=16)
    parser.add_argument(
        "--different", type=int, default=96, help="different requests on the mini models; half as many on smollm2"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each chat")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="chats at once")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="llama.cpp's server, a path")
    parser.add_argument(
        "--transformers", default=shutil.which("transformers"), help="transformers' command, a path; '' leaves it out"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serve.json", help="where to write")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    started = time.perf_counter()
    for part in args.part:
        found[part] = {"load": loads, "against": against}[part](args)
    found |= {"machine": machine(), "seconds": round(time.perf_counter() - started)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({part: found[part] for part in args.part}, indent=1))


if __name__ == "__main__":
    main()
