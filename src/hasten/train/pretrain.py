"""Pretraining of the small models: Muon for the matrices, AdamW for the rest, averaged weights, exact continuation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.errors import ConfigError, HastenError, IncompatibleError, UnsupportedError, out_of_range, unknown_name
from hasten.train.alphabet import PAD
from hasten.train.loop import Pace, schedule
from hasten.train.mixture import Batch, Mixture, batch
from hasten.train.network import Layer, Network, Norm, Shape
from hasten.train.objectives import FORMS, PLAIN, Form, Masking, block_loss, causal_loss, draw, loss, mask_blocks, opened

Report = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Config:
    """A run: `steps` at learning rate `lr`, `warmup` of them rising; gradients clipped to length `clip`.

    `average` is the decay of the averaged weights, which are those that are kept; `every` steps a checkpoint is written.
    `bfloat16` computes matrices in it; weights and norms stay float32. `opening` is the share of the run in which the
    places behind a query come into its sight, for a diffusion network that begins as a left-to-right one. `form` is that of
    the loss of a diffusion network without blocks.
    """

    steps: int
    lr: float = 4e-3
    warmup: int = 100
    clip: float = 1.0
    decay: float = 0.02
    average: float = 0.999
    every: int = 500
    seed: int = 0
    bfloat16: bool = True
    opening: float = 0.0
    form: Form = "count"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise out_of_range("steps", self.steps, "at least 1")
        if self.lr <= 0:
            raise out_of_range("lr", self.lr, "positive")
        if not 0 <= self.opening <= 1:
            raise out_of_range("opening", self.opening, "in [0, 1]")
        if self.form not in FORMS:
            raise unknown_name("form", self.form, FORMS)


class Run:
    """One training: the network, its averaged weights, optimisers, and how far it has come.

    Batch, masks and rate depend on the step alone. Raises IncompatibleError for a form that goes with no such network or
    masking.
    """

    def __init__(self, shape: Shape, config: Config, mixture: Mixture, masking: Masking | None = None) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UnsupportedError(f"pretraining needs torch 2.9 or later; this is {torch.__version__}", field="torch")
        form, usual = config.form, Masking() if config.form == "count" else PLAIN
        self.config, self.mixture, self.masking = config, mixture, masking or usual
        if form != "count" and (shape.kind != "full" or self.masking != PLAIN):
            other = f"a network of kind {shape.kind!r}" if shape.kind != "full" else "a masking of its own"
            raise IncompatibleError(f"form {form!r} does not go with {other}", hint="leave form at 'count'", field="form")
        self.network = Network(shape, config.seed)
        self.averaged = Network(shape, config.seed)
        named = list(self.network.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and not name.startswith("embed")]
        others = [p for name, p in named if p.ndim != 2 or name.startswith("embed")]
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, lr=config.lr, weight_decay=config.decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.step, self.seen, self.answered, self.seconds = 0, 0, 0, 0.0
        self.facts = f"{json.dumps(asdict(shape), sort_keys=True)} {config} {mixture} {self.masking}"

    def fit(self, path: Path | None = None, report: Report | None = None, until: int | None = None) -> None:
        """Train to the last step (or step `until`), from the checkpoint at `path` on where there is one.

        Raises ConfigError for a checkpoint of another run, HastenError when the loss is not finite for the third time.
        """
        if path is not None and path.exists():
            self.load(path)
        bad, last = 0, min(until or self.config.steps, self.config.steps)
        while self.step < last:
            started = time.perf_counter()
            value = self._one()
            bad = bad + 1 if value is None else 0
            if bad == 3:
                raise HastenError(f"the loss is not finite at steps {self.step - 2} to {self.step}", hint="lower the rate")
            self.seconds += time.perf_counter() - started
            if report is not None:
                report(self.step, value if value is not None else float("nan"))
            if path is not None and (self.step % self.config.every == 0 or self.step == last):
                self.save(path)

    def _one(self) -> float | None:
        """One step; None when its loss was not finite, and nothing was changed."""
        c, given = self.config, batch(self.mixture, self.step, self.config.steps)
        generator = torch.Generator().manual_seed(c.seed * 1_000_003 + self.step)
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = c.lr * schedule(self.step, Pace(c.steps, c.lr, c.warmup, c.clip))
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bfloat16):
            value = objective(self.network, given, generator, self.masking, self.open, c.form)
        self.step += 1
        self.seen += int(given.known.sum())
        self.answered += int(given.answer.sum())
        if not bool(torch.isfinite(value)):
            return None
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), c.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        share = min(c.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - share)
        return float(value.detach())

    @property
    def open(self) -> float:
        """The share of later places that a query sees at this step."""
        return min(1.0, self.step / (self.config.opening * self.config.steps)) if self.config.opening else 1.0

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin with these weights, as far as names and shapes agree; the others stay fresh.

        Norms of queries and keys that the weights do not have begin with the sizes that those have without them.
        """
        for network in (self.network, self.averaged):
            own = network.state_dict()
            network.load_state_dict({**own, **{k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}})
            if self.network.shape.qk_norm and not any("q_norm" in name for name in weights):
                _match_sizes(network, batch(self.mixture, 0, self.config.steps).ids[:8])

    def save(self, path: Path) -> None:
        """Write everything a continuation needs, atomically."""
        state = {f"weight.{name}": value for name, value in self.network.state_dict().items()}
        state |= {f"averaged.{name}": value for name, value in self.averaged.state_dict().items()}
        for i, p, moments in self._moments():
            state |= {f"moment.{i}.{p}.{key}": value for key, value in moments.items()}
        state["progress"] = torch.tensor([self.step, self.seen, self.answered, self.seconds], dtype=torch.float64)
        part = path.with_suffix(".part")
        save_file({name: value.detach().contiguous() for name, value in state.items()}, part, {"config": self.facts})
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same run; raises ConfigError for another's."""
        with safe_open(path, "pt") as file:
            facts = (file.metadata() or {}).get("config")
        if facts != self.facts:
            raise ConfigError(
                f"{path} was made with {facts}, not {self.facts}", hint="remove it to start anew", field="train"
            )
        state = load_file(path)
        self.network.load_state_dict(_under(state, "weight."))
        self.averaged.load_state_dict(_under(state, "averaged."))
        for i, optimiser in enumerate(self.optimisers):
            for p, weight in enumerate(optimiser.param_groups[0]["params"]):
                moments = _under(state, f"moment.{i}.{p}.")
                if moments:
                    optimiser.state[weight] = moments
        step, seen, answered, self.seconds = state["progress"].tolist()
        self.step, self.seen, self.answered = int(step), int(seen), int(answered)

    def _moments(self) -> Iterable[tuple[int, int, dict[str, Any]]]:
        for i, optimiser in enumerate(self.optimisers):
            for p, weight in enumerate(optimiser.param_groups[0]["params"]):
                yield i, p, optimiser.state.get(weight, {})


def objective(
    network: Network,
    given: Batch,
    generator: torch.Generator,
    masking: Masking,
    share: float = 1.0,
    form: Form = "count",
) -> Tensor:
    """The loss that belongs to a network's kind: masked diffusion in a `form`, left to right, or block by block.

    A query of masked diffusion sees `share` of the places behind it.
    """
    kind = network.shape.kind
    if kind == "causal":
        return causal_loss(network, given)
    if kind == "block":
        return block_loss(network, given, mask_blocks(given, network.shape.block, generator))
    given, masked, weights = draw(given, form, generator, masking)
    rows, length = given.ids.shape
    seen = opened(rows, length, share, generator) if share < 1 else None
    return loss(network, given, masked, weights, form, seen)


@torch.no_grad()
def _match_sizes(network: Network, ids: Tensor) -> None:
    """Set the norms of queries and keys to the root mean squares of those of a network without norms, layer by layer."""
    plain = Network(replace(network.shape, kind="full"))
    plain.load_state_dict({name: weight for name, weight in network.state_dict().items() if name in plain.state_dict()})

    def measure(norm: Norm | None, matrix: torch.nn.Linear) -> Callable[[torch.nn.Module, Any, Tensor], None]:
        def see(module: torch.nn.Module, given: Any, out: Tensor) -> None:
            if norm is not None:
                norm.weight.fill_(float(matrix(out).square().mean().sqrt()))

        return see

    for one, other in zip(network.layers, plain.layers, strict=True):
        ours, theirs = cast(Layer, one), cast(Layer, other)
        theirs.attn_norm.register_forward_hook(measure(ours.q_norm, theirs.q))
        theirs.attn_norm.register_forward_hook(measure(ours.k_norm, theirs.k))
    plain(ids, ids != PAD)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
