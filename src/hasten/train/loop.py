"""The training loop every recipe shares: AdamW, warm-up and cosine, and checkpoints from which a run goes on exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.errors import ConfigError, HastenError

Named = Sequence[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True, slots=True)
class Pace:
    """`steps` steps at learning rate `lr` after `warmup` of them, gradients clipped to length `clip`."""

    steps: int
    lr: float
    warmup: int
    clip: float


@dataclass(slots=True)
class Keep:
    """Where a run is kept: in `path` (None: nowhere) after every `every` steps and the last.

    `facts` say what it belongs to: another run refuses to go on from it. `memory` is kept with it, and filled from it.
    """

    path: Path | None = None
    every: int = 100
    facts: str = ""
    memory: dict[str, Tensor] = field(default_factory=dict)


def run(
    trained: Named, pace: Pace, loss: Callable[[int], Tensor], keep: Keep, after: Callable[[int, float], None] | None = None
) -> None:
    """Minimise `loss(step)` over the parameters; `after(steps done, value)` is called after each step.

    `loss` must depend on nothing but the step and the parameters; a run that was cut then goes on as if it had not been.
    Raises HastenError naming the step (which names the batch) when the loss is not finite, ConfigError when the checkpoint
    belongs to other settings.
    """
    params = [p for _, p in trained]
    optimiser = torch.optim.AdamW(params, lr=pace.lr, betas=(0.9, 0.95), weight_decay=0.01)
    start = _resume(keep, trained, optimiser)
    for step in range(start, pace.steps):
        for group in optimiser.param_groups:
            group["lr"] = pace.lr * schedule(step, pace)
        value = loss(step)
        if not bool(torch.isfinite(value)):
            raise HastenError(f"the loss is not finite at step {step}", hint="lower train.lr")
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params, pace.clip)
        optimiser.step()
        if after is not None:
            after(step + 1, float(value.detach()))
        if keep.path is not None and ((step + 1) % keep.every == 0 or step + 1 == pace.steps):
            _checkpoint(keep.path, step + 1, trained, optimiser, keep)


def schedule(step: int, pace: Pace) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    if step < pace.warmup:
        return (step + 1) / pace.warmup
    share = (step - pace.warmup) / max(1, pace.steps - pace.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))


def _checkpoint(path: Path, step: int, trained: Named, optimiser: torch.optim.Optimizer, keep: Keep) -> None:
    state = {"step": torch.tensor(step), **{f"memory.{name}": value for name, value in keep.memory.items()}}
    for name, p in trained:
        moments = optimiser.state[p]
        state |= {
            f"weight.{name}": p.detach(),
            f"first.{name}": moments["exp_avg"],
            f"second.{name}": moments["exp_avg_sq"],
        }
    part = path.with_suffix(".part")
    save_file(state, part, {"config": keep.facts})
    part.replace(path)


def _resume(keep: Keep, trained: Named, optimiser: torch.optim.Optimizer) -> int:
    if keep.path is None or not keep.path.exists():
        return 0
    with safe_open(keep.path, "pt") as file:
        facts = (file.metadata() or {}).get("config")
    if facts != keep.facts:
        raise ConfigError(
            f"{keep.path} was made with {facts}, not {keep.facts}", hint="remove it to start anew", field="train"
        )
    state = load_file(keep.path)
    step = int(state["step"])
    for name, p in trained:
        p.data.copy_(state[f"weight.{name}"])
        optimiser.state[p] = {
            "step": torch.tensor(float(step)), "exp_avg": state[f"first.{name}"], "exp_avg_sq": state[f"second.{name}"],
        }  # fmt: skip
    keep.memory |= {name.removeprefix("memory."): value for name, value in state.items() if name.startswith("memory.")}
    return step
