"""FSPAD: an EAGLE layer whose input is gated by the sampled token, with separate outputs for logits and feature."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.draft._features import FeatureTree
from hasten.engine.contracts import MethodContext
from hasten.errors import IncompatibleError, out_of_range
from hasten.models.feature import load_feature_model, weights_path
from hasten.models.stack import DecoderStack
from hasten.types import MethodCard

card = MethodCard(
    slug="fspad",
    title="Boosting Lossless Speculative Decoding via Feature Sampling and Partial Alignment Distillation",
    paper="2408.15562",
    date="2024-08",
    plugs_into="draft",
    exactness="exact",
    claim="Longer accepted runs than EAGLE-2 on all six Spec-Bench tasks, greedy and sampled (Vicuna, LLaMA-3).",
    no_help="Models for which no layer was trained, and text far from what it was trained on.",
    knobs={
        "weights": "file of the trained layer (empty: trained here, or shipped with hasten)",
        "nodes": "most nodes of a draft (1..256); the measured budget verifies what pays",
        "depth": "tokens drafted ahead at most (1..16), one pass of the layer each",
        "width": "nodes that grow per level, and children of each (1..32)",
        "floor": "a path less likely than this grows no further (0 up to 1)",
        "cache_mb": "memory of the layer's own keys and values, in megabytes",
    },
    needs=("causal", "hidden_states", "embeds"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of fspad; the published code's are nodes 60, depth 5, width 10, floor 0."""

    weights: str = ""
    nodes: int = 16
    depth: int = 4
    width: int = 4
    floor: float = 0.05
    cache_mb: int = 256

    def __post_init__(self) -> None:
        for name, top in (("nodes", 256), ("depth", 16), ("width", 32), ("cache_mb", 1 << 20)):
            if not 1 <= getattr(self, name) <= top:
                raise out_of_range(f"fspad.{name}", getattr(self, name), f"an integer in [1, {top}]")
        if not 0.0 <= self.floor < 1.0:
            raise out_of_range("fspad.floor", self.floor, "in [0, 1)")


class Fspad(FeatureTree):
    """Drafts as EAGLE does, with feature sampling at the input and partial alignment at the output."""

    name = "fspad"

    def __init__(self, config: Config, context: MethodContext) -> None:
        target = context.backbone
        if not isinstance(target, DecoderStack):
            raise IncompatibleError(
                f"method 'fspad' needs a model of hasten's own decoder stack; {context.model!r} runs on {target.name!r}",
                hint="choose another method (`hasten methods`)",
                field="method",
            )
        path = weights_path("fspad", target, context.model, config.weights)
        layer = load_feature_model(path, "fspad", target)
        self.config = config
        super().__init__(
            layer,
            target,
            nodes=config.nodes,
            depth=config.depth,
            width=config.width,
            floor=config.floor,
            cache_bytes=config.cache_mb * 1_000_000,
        )


method = Fspad
