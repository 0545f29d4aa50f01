"""dParallel's training: a masked-diffusion model learns to be certain of its own right answers, many tokens at once.

The model answers prompts one token per step; answers that a world verifies are its labels. One block is half masked, all
after it wholly; the loss is cross-entropy and, for tokens it already gets right, the entropy of its distribution. Out
comes an ordinary model and the entropy threshold that costs at most a point of accuracy on prompts kept for choosing it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import HastenError, IncompatibleError, out_of_range, unknown_name
from hasten.models.catalog import MINI
from hasten.models.fetch import cache_dir, sha256_of
from hasten.models.tokenizer import read_json
from hasten.train import alphabet, loop
from hasten.train.assess import BLOCK, samples, write
from hasten.train.mixture import Batch, collate, row
from hasten.train.network import Network
from hasten.train.released import export, read
from hasten.unmask.dparallel import entropy, folders
from hasten.worlds import WORLDS, Sample, World

Progress = Callable[[str, int, int], None]
Row = tuple[list[int], int]  # ids and the length of the prompt
Cells = Mapping[tuple[str, int], Sequence[Sample]]  # (world, canvas) -> samples

SHARE = (1 - 1e-3) * 0.5 + 1e-3  # of the block that is masked
TAUS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)  # nats
POINT = 1.0  # accuracy, in percent, that the threshold may cost


@dataclass(frozen=True, slots=True)
class Config:
    """A run: `texts` prompts for the model to answer, `steps` updates on `tokens` tokens at rate `lr`, two passes each.

    `block` is the width of a block, `weight` what certainty counts beside cross-entropy (0: teacher forcing alone),
    `temperature` sharpens the distribution whose entropy is learnt; `gate` leaves out tokens that are wrong so far.
    `held` samples per world and canvas choose the threshold.
    """

    texts: int = 1320
    steps: int = 500
    tokens: int = 2048
    lr: float = 1e-4
    block: int = BLOCK
    weight: float = 2.0
    temperature: float = 0.5
    gate: bool = True
    held: int = 10
    seed: int = 0
    canvases: tuple[int, ...] = (32, 64)

    def __post_init__(self) -> None:
        for name, least in (("texts", 1), ("steps", 1), ("tokens", 64), ("block", 1), ("held", 1)):
            if getattr(self, name) < least:
                raise out_of_range(f"train.{name}", getattr(self, name), f"at least {least}")
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise out_of_range(f"train.{name}", getattr(self, name), "positive")
        if not self.weight >= 0:
            raise out_of_range("train.weight", self.weight, "at least 0")


def halves(answer: Tensor, block: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(one, other, behind), bool [B, T]: both halves of a random block of every answer window, and the window after it.

    The halves share nothing and make up the block; a last block may be short. Raises ConfigError for an empty window.
    """
    sizes = answer.sum(1)
    if bool((sizes < 1).any()):
        raise out_of_range("answer", 0, "a window of at least one token in every row")
    blocks = (sizes + block - 1) // block
    chosen = (torch.rand(len(answer), generator=generator) * blocks).long()
    of = (answer.cumsum(1) - 1).div(block, rounding_mode="floor")
    active = answer & (of == chosen[:, None])
    one = active & (torch.rand(answer.shape, generator=generator) < SHARE)
    return one, active & ~one, answer & (of > chosen[:, None])


def certainty(logits: Tensor, labels: Tensor, weight: float, temperature: float, gate: bool = True) -> Tensor:
    """Cross-entropy of logits [N, vocab] and `weight` times the entropy where they are right (no `gate`: everywhere)."""
    count = max(1, len(labels))
    loss = F.cross_entropy(logits, labels, reduction="sum") / count
    if weight == 0:
        return loss
    counted = logits.argmax(-1) == labels if gate else torch.ones_like(labels, dtype=torch.bool)
    probs = (logits / temperature).softmax(-1)
    nats = -(probs * (probs + 1e-12).log()).sum(-1)
    return loss + weight * nats[counted].sum() / counted.sum().clamp(min=1)


def loss(network: Network, given: Batch, config: Config, generator: torch.Generator) -> Tensor:
    """The loss of both halves; each is seen with all behind it masked."""
    one, other, behind = halves(given.answer, config.block, generator)
    total = torch.zeros(())
    for hidden in (one, other):
        states = network(given.ids.masked_fill(hidden | behind, alphabet.MASK), given.known)
        scores = network.logits(states[hidden])
        total = total + certainty(scores, given.ids[hidden], config.weight, config.temperature, config.gate)
    return total


def batch(rows: Sequence[Row], tokens: int, seed: int, step: int) -> Batch:
    """About `tokens` tokens of rows drawn for a step; at least one row."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    taken: list[Row] = []
    total = 0
    for i in torch.randperm(len(rows), generator=generator).tolist():
        if taken and total + len(rows[i][0]) > tokens:
            break
        taken.append(rows[i])
        total += len(rows[i][0])
    return collate(taken)


def fit(
    network: Network,
    rows: Sequence[Row],
    config: Config,
    keep: loop.Keep,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train all weights on the rows; a run that was cut goes on from `keep`."""

    def of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_033 + step)
        with torch.autocast("cpu", torch.bfloat16):
            return loss(network, batch(rows, config.tokens, config.seed, step), config, generator)

    pace = loop.Pace(config.steps, config.lr, min(20, config.steps), 1.0)
    loop.run(list(network.named_parameters()), pace, of, keep, report)


# --- what is learnt from ---


def cells(canvases: Sequence[int], count: int, split: Any, seed: int = 0, worlds: Mapping[str, World] = WORLDS) -> Cells:
    """`count` samples of every world for every canvas that it has answers for."""
    found = {
        (name, canvas): samples(world, canvas, count, split, seed) for name, world in worlds.items() for canvas in canvases
    }
    return {cell: given for cell, given in found.items() if given}


def prompt_of(sample: Sample) -> list[int]:
    """The ids of a sample's prompt."""
    return [alphabet.BOS, *alphabet.encode(sample.prompt)]


def own_answers(network: Network, asked: Cells, path: Path | None = None, report: Progress | None = None) -> list[Row]:
    """What the network answers, one token per step, where a world finds it right; kept in `path` cell by cell."""
    stored: dict[str, list[Row]] = {} if path is None else {k: [(i, n) for i, n in v] for k, v in read_json(path).items()}
    for done, ((name, canvas), given) in enumerate(asked.items(), 1):
        key = f"{name} {canvas}"
        if key not in stored:
            with torch.autocast("cpu", torch.bfloat16):
                written = write(network, [prompt_of(sample) for sample in given], canvas)
            texts = [alphabet.decode(ids) if len(ids) < canvas else "" for ids in written]
            stored[key] = [
                row(replace(sample, answer=text), canvas)
                for sample, text in zip(given, texts, strict=True)
                if text and WORLDS[name].verify(sample.meta, text) == 1
            ]
            if path is not None:
                part = path.with_suffix(".part")
                part.write_text(json.dumps(stored), encoding="utf-8")
                part.replace(path)
        if report is not None:
            report("writing answers", done, len(asked))
    return [one for rows in stored.values() for one in rows]


# --- the threshold ---


@torch.no_grad()
def decode(
    network: Network, prompts: Sequence[Sequence[int]], canvas: int, tau: float, block: int = BLOCK
) -> list[tuple[list[int], int]]:
    """(text ids, forwards) of every prompt, greedily: positions of the block with an entropy up to `tau` at once.

    A row is done when it has an end token with nothing masked before it.
    """
    given = collate([([*prompt, *[alphabet.MASK] * canvas], len(prompt)) for prompt in prompts])
    ids, known, masked = given.ids.clone(), given.known, given.answer.clone()
    first = torch.tensor([len(prompt) for prompt in prompts])
    of = (torch.arange(ids.shape[1])[None] - first[:, None]).div(block, rounding_mode="floor")
    alive, forwards = torch.arange(len(prompts)), torch.zeros(len(prompts), dtype=torch.long)
    while len(alive):
        held, seen = masked[alive], ids[alive]
        at = held.float().argmax(1, keepdim=True)
        open_ = held & (of[alive] == of[alive].gather(1, at))
        scores = network.logits(network(seen, known[alive])[open_])
        nats = torch.full(seen.shape, float("inf"), dtype=torch.float64).masked_scatter_(open_, entropy(scores))
        sure = open_ & (nats <= tau)
        sure.scatter_(1, nats.argmin(1, keepdim=True), True)
        seen = seen.masked_scatter(open_, scores.argmax(-1)).where(sure, seen)
        ids[alive], masked[alive] = seen, held & ~sure
        forwards[alive] += 1
        ends = (seen == alphabet.EOS) & ~masked[alive] & given.answer[alive]
        before = (masked[alive].cumsum(1) == 0) & ends  # an end with nothing masked before it
        alive = alive[masked[alive].any(1) & ~before.any(1)]
    out = []
    for i, start in enumerate(first.tolist()):
        window = ids[i, start : start + canvas].tolist()
        out.append((window[: window.index(alphabet.EOS)] if alphabet.EOS in window else window, int(forwards[i])))
    return out


def measure(network: Network, asked: Cells, tau: float, block: int = BLOCK) -> dict[str, float]:
    """{"accuracy": right answers in percent, "nfe": forwards per answer} at a threshold; below 0: one token per step."""
    right, spent, count = 0, 0, 0
    for (name, canvas), given in asked.items():
        with torch.autocast("cpu", torch.bfloat16):
            done = decode(network, [prompt_of(sample) for sample in given], canvas, tau, block)
        for sample, (ids, forwards) in zip(given, done, strict=True):
            right += WORLDS[name].verify(sample.meta, alphabet.decode(ids)) == 1
            spent, count = spent + forwards, count + 1
    return {"accuracy": round(100 * right / max(1, count), 2), "nfe": round(spent / max(1, count), 2)}


def sweep(
    network: Network, asked: Cells, report: Callable[[int], None], block: int = BLOCK
) -> dict[float, dict[str, float]]:
    """Threshold -> accuracy and forwards."""
    out = {}
    for done, tau in enumerate(TAUS, 1):
        out[tau] = measure(network, asked, tau, block)
        report(done)
    return out


def calibrate(table: Mapping[float, Mapping[str, float]], reference: float) -> float:
    """The largest threshold within a point of the `reference` accuracy; the most accurate one where none is."""
    fitting = [tau for tau, figures in table.items() if figures["accuracy"] >= reference - POINT]
    return max(fitting) if fitting else max(table, key=lambda tau: (table[tau]["accuracy"], -tau))


# --- the recipe ---


def folder_of(model: str) -> Path:
    """The folder of a small model: a path, or the name of one that comes with the package or was trained here."""
    for folder in folders(model):
        if (folder / "config.json").is_file():
            return folder
    raise unknown_name("model", model, {path.parent.name for path in MINI.glob("*/config.json")}, "give a folder")


def distil(
    model: str, config: Config, *, out: Path | None = None, work: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a small masked-diffusion model to be certain and write it to `out`, threshold included; facts about it.

    What a cut run goes on from lies in `work`. Raises UnknownNameError, FormatError, IncompatibleError for a model that
    sees no masks or only blocks, HastenError where it answers nothing right.
    """
    folder, started = folder_of(model), time.perf_counter()
    network, card = read(folder), read_json(folder / "card.json")
    if network.shape.kind != "full":
        raise IncompatibleError(f"recipe 'dparallel' needs a masked-diffusion model that sees all; {model!r} does not",
                                hint="mini-dlm is one", field="model")  # fmt: skip
    base = str(card.get("name", folder.name))
    name = f"{base}-dparallel"
    work = work or cache_dir() / "train" / name
    out = out or cache_dir() / "minis" / name
    work.mkdir(parents=True, exist_ok=True)
    show = progress or (lambda what, done, total: None)
    digest = sha256_of(folder / "model.safetensors")[:12]
    per_cell = max(1, config.texts // (len(WORLDS) * len(config.canvases)))
    asked = cells(config.canvases, per_cell, "train", config.seed)
    held = cells(config.canvases, config.held, "dev", config.seed)
    rows = own_answers(network, asked, work / f"answers-{digest}-{per_cell}-{config.seed}.json", show)
    if not rows:
        raise HastenError(f"{model!r} answers none of its prompts right", hint="train it first")
    total = 2 * len(TAUS) + 1
    show("measuring", 0, total)
    reference = measure(network, held, -1.0, config.block)
    before = sweep(network, held, lambda done: show("measuring", 1 + done, total), config.block)
    show("training", 0, config.steps)
    fit(network, rows, config, loop.Keep(work / "run.checkpoint", 100, f"{digest} {len(rows)} {config}"),
        lambda step, value: show("training", step, config.steps))  # fmt: skip
    after = sweep(network, held, lambda done: show("measuring", 1 + len(TAUS) + done, total), config.block)
    tau, control = calibrate(after, reference["accuracy"]), calibrate(before, reference["accuracy"])
    facts: dict[str, Any] = {
        "name": name,
        "summary": f"{base} trained to be certain of many tokens at once (dParallel)",
        "license": card.get("license", "Apache-2.0"),
        "parameters": sum(p.numel() for p in network.parameters()),
        "shape": asdict(network.shape),
        "started_from": base,
        "training": asdict(config),
        "answers": {"asked": sum(map(len, asked.values())), "right": len(rows)},
        "dparallel": {
            "tau": tau,
            "how": f"dev split, blocks of {config.block}; the largest within {POINT:g} point of one token per step",
            "one_token_per_step": reference,
            "before": {"tau": control, **before[control]},
            "after": {"tau": tau, **after[tau]},
            "by_tau_before": {str(key): value for key, value in before.items()},
            "by_tau_after": {str(key): value for key, value in after.items()},
        },
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    export(network, out, facts)
    return {**facts, "path": str(out), "bytes": (out / "model.safetensors").stat().st_size}
