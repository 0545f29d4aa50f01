"""Learn2PD and EoTP (2509.25188): a tiny trained filter says which predictions are final, and cuts end the canvas early."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.engine.contracts import MethodContext
from hasten.engine.parts import CanvasRow, PartRange, StopAction, View
from hasten.errors import ConfigError, FormatError, out_of_range
from hasten.models.feature import identity, weights_path
from hasten.policy import Policy
from hasten.types import MethodCard
from hasten.unmask.reference import top

ENDS = ("off", "committed", "filter", "eager")
SCORE = "prob"  # what the filter reads: the raw probability of the candidate

card = MethodCard(
    slug="learn2pd",
    title="Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding",
    paper="2509.25188",
    date="2025-09",
    plugs_into="unmask",
    exactness="lossy",
    claim="LLaDA-8B with canvases of 1024 tokens: up to 22.6x without loss, and 57.5x with a key cache.",
    no_help="Canvases that the answer fills, and models whose confidence says as much: there a threshold does it.",
    knobs={
        "tau": "what the filter must say before a position is committed, in (0, 1]; at 1 it never does",
        "eotp": "cut at the end of text: off, committed (final), filter (trusted by it) or eager (any predicted one)",
        "block": "positions of the blocks the filter was trained on; block-causal models bring their own",
        "weights": "the filter's file (empty: the one trained for the model)",
    },
    needs=("masked",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of Learn2PD; the released code cuts eagerly, which floods of predicted end tokens turn against it."""

    tau: float = 0.96
    eotp: str = "filter"
    block: int = 32
    weights: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise out_of_range("learn2pd.tau", self.tau, "in (0, 1]")
        if self.eotp not in ENDS:
            raise out_of_range("learn2pd.eotp", self.eotp, ", ".join(ENDS))
        if self.block < 1:
            raise out_of_range("learn2pd.block", self.block, "at least 1")


class Filter(nn.Module):
    """Two linear maps with a ReLU between: probabilities [..., B] of a block's candidates -> logits of being final."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.first, self.second = nn.Linear(block, block), nn.Linear(block, block)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., B]."""
        out: Tensor = self.second(self.first(x).relu())
        return out

    def save(self, path: Path, model: str, eos_id: int, about: Mapping[str, Any]) -> None:
        """Write it with what it belongs to: the model's `identity`, block, score and end token, and facts `about` it."""
        facts = {"hasten": "parallel-filter", "target": model, "block": str(self.block), "score": SCORE}
        state = {name: p.detach().float().contiguous() for name, p in self.named_parameters()}
        save_file(state, path, {**facts, "eos_id": str(eos_id), "about": json.dumps(dict(about))})


def load_filter(path: str | Path, block: int, model: str) -> Filter:
    """The filter stored at `path`; raises FormatError for a damaged file, ConfigError for another block or model."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read ({error})", hint="give a file made by `hasten train learn2pd`", field="weights"
        ) from None
    if facts.get("hasten") != "parallel-filter":
        raise FormatError(f"{path} holds no filter", hint="give a file made by `hasten train learn2pd`", field="weights")
    for name, own, knob in (("target", model, "weights"), ("block", str(block), "block"), ("score", SCORE, "weights")):
        if facts.get(name) != own:
            raise ConfigError(
                f"{path} was trained for {name} {facts.get(name)!r}, not {own!r}",
                hint="train one for it: hasten train learn2pd MODEL",
                field=f"learn2pd.{knob}",
            )
    made = Filter(block)
    wanted = {name: tuple(p.shape) for name, p in made.named_parameters()}
    if {key: tuple(value.shape) for key, value in state.items()} != wanted or not all(
        bool(value.isfinite().all()) for value in state.values()
    ):
        raise FormatError(f"{path} does not hold a filter's finite weights", hint="train it again", field="weights")
    made.load_state_dict(state)
    return made.eval().requires_grad_(False)


def confidences(view: View, block: int) -> Tensor:
    """float32 [pieces, block]: raw probabilities of the window's candidates, final ones too; zeros behind the window."""
    logits, x0 = view.logits[view.inside], view.x0[view.inside]
    probs = torch.zeros(-(-len(x0) // block) * block)
    probs[: len(x0)] = (logits.gather(-1, x0[:, None])[:, 0] - logits.logsumexp(-1)).exp()
    return probs.view(-1, block)


class _Part:
    """What both parts declare."""

    name = "learn2pd"
    range: PartRange = "block"
    memoryless = True
    lossless = False
    mutates_committed = False


class FilterSelector(_Part):
    """Selects what the filter says is final, and the quota's surest; wider windows go through it in pieces of its width."""

    def __init__(self, config: Config, trained: Filter) -> None:
        self.tau, self.filter = config.tau, trained

    def final(self, view: View) -> Tensor:
        """bool [P]: open positions of the window that the filter trusts."""
        says = self.filter(confidences(view, self.filter.block)).sigmoid().flatten() > self.tau
        trusted = torch.zeros_like(view.masked)
        trusted[view.inside] = says[: int(view.inside.sum())]
        return trusted & view.masked

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history, bool [P])."""
        return history, self.final(view) | top(view, quota)


class EndOfText(_Part):
    """Cuts the canvas behind an end of text, after the commits of a step; the canvas never grows.

    `filter`: the first end token that the filter trusts. `eager`: else the surest one predicted at any open position.
    `committed`: the first end token with nothing open before it. Requests that go on past end tokens are not cut.
    """

    when: Literal["before", "after"] = "after"

    def __init__(self, mode: str, selector: FilterSelector, ids: Tensor) -> None:
        self.mode, self.selector, self.ids = mode, selector, ids
        if mode == "eager":
            self.range = "all_masked"

    def check(self, view: View, row: CanvasRow, chosen: Tensor) -> tuple[StopAction, int]:
        """("truncate", new end) or ("continue", -1)."""
        at = -1
        if not row.sampling.ignore_eos:
            at = self._written(row) if self.mode == "committed" else self._predicted(view, row)
        return ("truncate", at + 1) if at >= 0 else ("continue", -1)

    def _written(self, row: CanvasRow) -> int:
        final = row.accepted[row.prompt_len : row.end].long().cumprod(0).bool()
        ends = final & torch.isin(row.tokens[row.prompt_len : row.end], self.ids)
        return int(ends.long().argmax()) + row.prompt_len if bool(ends.any()) else -1

    def _predicted(self, view: View, row: CanvasRow) -> int:
        ends = torch.isin(view.x0, self.ids) & view.masked
        trusted = ends & self.selector.final(view)
        if bool(trusted.any()):
            return int(view.positions[trusted][0])
        if self.mode == "eager" and bool(ends.any()):
            return int(view.positions[view.prob.masked_fill(~ends, -torch.inf).argmax()])
        return -1


class Learn2pd:
    """The filter as a selector, and the end-of-text rule."""

    name = "learn2pd"

    def __init__(self, config: Config, context: MethodContext) -> None:
        caps = context.capabilities
        if config.eotp != "off" and not caps.eos_ids:
            raise ConfigError(
                f"model {context.model!r} names no end token to cut at", hint="use learn2pd:eotp=off", field="learn2pd.eotp"
            )
        path = weights_path("learn2pd", context.backbone, context.model, config.weights)
        trained = load_filter(path, caps.block or config.block, identity(context.backbone, context.model))
        selector = FilterSelector(config, trained)
        ends = () if config.eotp == "off" else (EndOfText(config.eotp, selector, torch.tensor(caps.eos_ids)),)
        self.policy = Policy(selectors=(selector,), stops=ends)


method = Learn2pd
