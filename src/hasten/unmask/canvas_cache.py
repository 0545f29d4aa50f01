"""Key caches of canvases (Fast-dLLM prefix and dual, dInfer vicinity): recompute the block, keep the rest."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.engine.contracts import Capabilities, MethodContext
from hasten.engine.parts import CanvasRow, PartRange
from hasten.errors import IncompatibleError, out_of_range
from hasten.policy import Policy
from hasten.types import MethodCard

POLICIES = ("prefix", "dual", "vicinity")

card = MethodCard(
    slug="canvas-cache",
    title="Approximate block-wise key cache (Fast-dLLM, dInfer)",
    paper="2505.22618",
    date="2025-05",
    plugs_into="unmask",
    exactness="lossy",
    claim="LLaDA-8B on GSM8K: prefix or dual cache gives 2x to 3.6x by itself, and 8x to 11x with the threshold.",
    no_help="Short canvases: at one block of canvas there is nothing to keep. Block-causal models have an exact cache.",
    knobs={
        "policy": "prefix (keep what is before the block), dual (and after it) or vicinity (dual, nearby anew)",
        "refresh": "forwards after which all is recomputed inside a block (0: at its start only; 1: always, exact)",
        "around": "vicinity: positions recomputed on both sides of the block",
        "warmup": "vicinity: first forwards of the canvas that keep nothing",
    },
    needs=("masked", "full"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the cache; dInfer's vicinity recomputes 16 positions on both sides after 4 uncached forwards."""

    policy: str = "dual"
    refresh: int = 0
    around: int = 16
    warmup: int = 4

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise out_of_range("canvas-cache.policy", self.policy, ", ".join(POLICIES))
        for name in ("refresh", "around", "warmup"):
            if getattr(self, name) < 0:
                raise out_of_range(f"canvas-cache.{name}", getattr(self, name), "at least 0")


class CanvasCache:
    """Keys of positions outside the computed range stay as the last full forward left them; exact only where refreshed.

    Models with a logit shift recompute the position before the block too, so that its first token is predicted.
    """

    name = "canvas-cache"
    range: PartRange = "block"
    memoryless = True
    lossless = False
    mutates_committed = False
    stores = True

    def __init__(self, config: Config, context: MethodContext) -> None:
        if context.capabilities.block is not None:
            raise IncompatibleError(
                f"method 'canvas-cache' is for full attention; blocks of {context.model!r} have an exact cache already",
                hint="leave it out",
                field="method",
            )
        self.config = config
        self.periodic = config.refresh > 0 or config.policy == "vicinity"

    @property
    def policy(self) -> Policy:
        """This cache."""
        return Policy(cache=self)

    def exact(self, capabilities: Capabilities) -> bool:
        """Only when every forward recomputes everything."""
        return self.config.refresh == 1

    def refresh(self, row: CanvasRow) -> bool:
        """At the start of a block, then every `refresh` forwards; vicinity also while warming up."""
        config = self.config
        warming = config.policy == "vicinity" and row.global_step < config.warmup
        return row.fresh < 0 or warming or (config.refresh > 0 and row.fresh + 1 >= config.refresh)

    def span(self, row: CanvasRow, refresh: bool, shift: int) -> tuple[int, int]:
        """All, or from the block on (prefix), the block (dual), the block and its surroundings (vicinity)."""
        low, high = row.window
        if refresh:
            return 0, row.end
        around = self.config.around if self.config.policy == "vicinity" else 0
        end = row.end if self.config.policy == "prefix" else min(high + around, row.end)
        return max(0, low - max(shift, around)), end

    def length(self, row: CanvasRow, refresh: bool, high: int) -> int:
        """The whole canvas: what is not recomputed stays visible."""
        return row.end


method = CanvasCache
