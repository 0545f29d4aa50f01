"""DiffusionGemma's sampler: a canvas of random ids, of which every step keeps what is surely known and draws the rest anew.

There is no mask token and nothing is final before its canvas is: what a step keeps, the next one may take back. The
logits of a step, after the temperature of the schedule, are told to the model in the next (self-conditioning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from hasten.engine.contracts import Capabilities, MethodContext
from hasten.engine.parts import FIXED, Advance, CanvasRow, Forward, PartRange, Taken, View
from hasten.engine.sampling import draw, truncate
from hasten.errors import IncompatibleError, out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard
from hasten.unmask._noise import uniforms
from hasten.unmask.reference import BlockCache

RELEASED: Mapping[str, float] = {
    "steps": 48, "bound": 0.1, "t_min": 0.4, "t_max": 0.8, "stability": 1, "confidence": 0.005,
}  # fmt: skip

card = MethodCard(
    slug="diffusion-gemma",
    title="DiffusionGemma's sampler: entropy-bounded denoising of random ids",
    paper="",
    date="2026-06",
    plugs_into="unmask",
    exactness="exact",
    claim="The baseline for DiffusionGemma: a canvas of 256 random ids becomes text in at most 48 forwards.",
    no_help="It is a baseline; short answers pay for a whole canvas.",
    knobs={
        "steps": "forwards for one canvas at most (-1: what the checkpoint says, else 48)",
        "bound": "nats of entropy besides the largest of what one step keeps (-1: the checkpoint's, else 0.1)",
        "t_min": "temperature that the schedule falls towards (-1: the checkpoint's, else 0.4)",
        "t_max": "temperature of the first step (-1: the checkpoint's, else 0.8)",
        "stability": "steps whose best tokens must be those of a step that ends the canvas (-1: the checkpoint's, else 1)",
        "confidence": "mean entropy in nats below which a stable canvas ends (-1: the checkpoint's, else 0.005)",
    },
    needs=("masked", "self_conditioning"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the sampler; -1 is the checkpoint's own value (generation_config.json), else the released default."""

    steps: int = -1
    bound: float = -1.0
    t_min: float = -1.0
    t_max: float = -1.0
    stability: int = -1
    confidence: float = -1.0

    def __post_init__(self) -> None:
        for name, low, high, allowed in (
            ("steps", 1, 10_000, "1 to 10000"),
            ("bound", 0, 1e9, "at least 0"),
            ("t_min", 0, 100, "in [0, 100]"),
            ("t_max", 1e-6, 100, "in [0.000001, 100]"),
            ("stability", 0, 100, "in [0, 100]"),
            ("confidence", 0, 1e9, "at least 0"),
        ):
            value = getattr(self, name)
            if value != -1 and not low <= value <= high:
                raise out_of_range(f"diffusion-gemma.{name}", value, f"{allowed}, or -1")
        if self.t_max != -1 and self.t_max < self.t_min:
            raise out_of_range("diffusion-gemma.t_max", self.t_max, f"at least t_min = {self.t_min}")

    def over(self, given: Mapping[str, float]) -> Config:
        """These settings, with those `given` wherever they are -1, and the released ones where nothing is given."""
        own = {name: value for name, value in asdict(self).items() if value != -1}
        return Config(**{**RELEASED, **given, **own})  # type: ignore[arg-type]


class _Keys(BlockCache):
    """The model's own keys of committed text, which its canvas sees and does not change."""

    name = "diffusion-gemma"

    def exact(self, capabilities: Capabilities) -> bool:
        """Always: text that is final is read once."""
        return True


class DiffusionGemma:
    """Planner, schedule and stepper of the sampler: a step is one forward, and its canvas ends with the best tokens.

    The request's temperature is that of the draw, on top of the schedule: 1 is the released sampler, 0 takes the best
    tokens. Entropies, self-conditioning and the end of a canvas follow the schedule alone.
    """

    name = "diffusion-gemma"
    range: PartRange = "block"
    memoryless = False
    lossless = True
    mutates_committed = False
    most = 1

    def __init__(self, config: Config, context: MethodContext) -> None:
        self.config = config.over(getattr(context.backbone, "sampler", {}))
        self._vocab = context.capabilities.vocab_size
        self.whole = context.capabilities.block or context.capabilities.max_len

    @property
    def policy(self) -> Policy:
        """All that such a canvas needs."""
        return Policy(planner=self, schedule=self, stepper=self, cache=_Keys())

    def admit(self, row: CanvasRow) -> None:
        """Raises IncompatibleError for fixed text in the canvas, which the model was not trained to fill around."""
        if bool((row.provenance[row.prompt_len :] == FIXED).any()):
            raise IncompatibleError(
                f"method {self.name!r} writes whole canvases; text behind a slot cannot stay",
                hint="put all fixed text before the first slot",
                field="template",
            )

    def plan(self, view: View | None, row: CanvasRow) -> int:
        """The end of the canvas that starts at row.window[0]."""
        return row.window[0] + self.whole

    def quotas(self, row: CanvasRow) -> tuple[int, ...]:
        """None: a canvas becomes final as one."""
        return ()

    def planned(self, row: CanvasRow) -> int:
        """Steps of one of the model's canvases: none of them computes more than that canvas."""
        return self.config.steps

    def branches(self, row: CanvasRow, seen: Forward | None, advance: Advance) -> Sequence[CanvasRow]:
        """The state itself; before its first step the canvas is filled with random ids."""
        if row.step_in_block:
            return [row]
        return [replace(row, tokens=self._written(row, self._noise(row, stream=1)), before=None)]

    def settle(
        self,
        row: CanvasRow,
        seen: Forward | None,
        branches: Sequence[CanvasRow],
        got: Sequence[Forward],
        advance: Advance,
    ) -> tuple[Sequence[Taken], Forward | None]:
        """The one step: ends the canvas with the best tokens, or keeps what the bound allows and draws the rest anew."""
        state, config = branches[0], self.config
        left = config.steps - state.step_in_block
        logits = got[0].logits
        if state.sampling.logit_bias:
            logits = logits.clone()
            logits[:, list(state.sampling.logit_bias)] += torch.tensor(list(state.sampling.logit_bias.values()))
        logits = logits / (config.t_min + (config.t_max - config.t_min) * left / config.steps)
        probs = logits.softmax(-1)
        entropy, best = torch.special.entr(probs).sum(-1), logits.argmax(-1)
        seen_best: tuple[Tensor, ...] = state.history.get(self.name, ())
        stable = len(seen_best) == config.stability and all(bool((one == best).all()) for one in seen_best)
        if left == 1 or (stable and float(entropy.mean()) < config.confidence):
            return [self._ended(state, best, probs)], None
        order = entropy.sort(stable=True)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept[order.indices[order.values.cumsum(0) - order.values <= config.bound]] = True
        ids = self._noise(state, stream=2)
        ids[kept] = self._drawn(state, logits, best, kept)
        after = replace(
            state,
            tokens=self._written(state, ids),
            step_in_block=state.step_in_block + 1,
            global_step=state.global_step + 1,
            before=logits,
            history={self.name: (*seen_best, best)[-config.stability :] if config.stability else ()},
        )
        return [Taken(after)], None

    def _ended(self, row: CanvasRow, best: Tensor, probs: Tensor) -> Taken:
        """The canvas with its `best` tokens [W] final."""
        low, high = row.window
        scores = probs.gather(-1, best[:, None])[:, 0]
        after = replace(
            row,
            tokens=self._written(row, best),
            accepted=row.accepted.index_fill(0, torch.arange(low, high), True),
            step_in_block=row.step_in_block + 1,
            global_step=row.global_step + 1,
            before=None,
            history={},
        )
        writes = zip(range(low, min(high, row.end)), best.tolist(), scores.tolist(), strict=False)
        return Taken(after, tuple(writes))

    def _drawn(self, row: CanvasRow, logits: Tensor, best: Tensor, kept: Tensor) -> Tensor:
        """Tokens of the `kept` positions at the request's temperature and cut-offs, by inverting their distributions."""
        sampling = row.sampling
        if sampling.temperature == 0:
            return best[kept]
        at = kept.nonzero()[:, 0]
        numbers = uniforms(row.seed, row.global_step, at + row.window[0])[:, 0].tolist()
        tokens = []
        for i, u in zip(at.tolist(), numbers, strict=True):
            probs = ((logits[i] - logits[i].max()) / sampling.temperature).softmax(-1)  # tiny temperatures do not overflow
            tokens.append(draw(truncate(probs, sampling.top_k, sampling.top_p, sampling.min_p), u))
        return torch.tensor(tokens)

    def _noise(self, row: CanvasRow, stream: int) -> Tensor:
        """Ids [W] of the window, each equally likely."""
        positions = torch.arange(*row.window)
        return (uniforms(row.seed, row.global_step, positions, stream=stream)[:, 0] * self._vocab).long()

    @staticmethod
    def _written(row: CanvasRow, ids: Tensor) -> Tensor:
        """The row's tokens with `ids` [W] in the window."""
        return row.tokens.index_copy(0, torch.arange(*row.window), ids)


method = DiffusionGemma
