"""TVD++: a draft model made for its target, aligned with it by a loss that aims at acceptance itself."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.draft._assistant import Chain
from hasten.engine.contracts import MethodContext
from hasten.errors import IncompatibleError, out_of_range
from hasten.models.assistant import Assistant
from hasten.models.feature import weights_path
from hasten.models.small import load_small
from hasten.models.stack import DecoderStack
from hasten.types import MethodCard

card = MethodCard(
    slug="tvdpp",
    title="Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs",
    paper="2403.00858",
    date="2024-03",
    plugs_into="draft",
    exactness="exact",
    claim="Up to 2.3 tokens per pass and 2.4x with a drafter of 115M for Llama 2 Chat 7B, without fine-tuning on the task.",
    no_help="Targets so small that a drafter is comparatively dear, and text far from what it was trained on.",
    knobs={
        "weights": "file of the trained draft model (empty: trained here, or shipped with hasten)",
        "nodes": "tokens drafted ahead (1..32)",
        "sample": "draw drafts at the request's temperature, judged by rejection (true), or draft the best token",
        "temperature": "the draft's temperature (0 up to 2; -1: that of the request)",
        "floor": "a chain of best tokens less likely than this grows no further (0 up to 1)",
        "cache_mb": "memory of the draft model's keys and values, in megabytes",
    },
    needs=("causal", "embeds"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of tvdpp; the paper drafts blocks of 3 and 5."""

    weights: str = ""
    nodes: int = 3
    sample: bool = True
    temperature: float = -1.0
    floor: float = 0.1
    cache_mb: int = 64

    def __post_init__(self) -> None:
        for name, top in (("nodes", 32), ("cache_mb", 1 << 20)):
            if not 1 <= getattr(self, name) <= top:
                raise out_of_range(f"tvdpp.{name}", getattr(self, name), f"an integer in [1, {top}]")
        if self.temperature != -1.0 and not 0.0 <= self.temperature <= 2.0:
            raise out_of_range("tvdpp.temperature", self.temperature, "in [0, 2], or -1")
        if not 0.0 <= self.floor < 1.0:
            raise out_of_range("tvdpp.floor", self.floor, "in [0, 1)")


class Tvdpp(Chain):
    """Chains of the aligned draft model; sampled ones carry q, which is 0 outside the vocabulary it drafts."""

    name = "tvdpp"

    def __init__(self, config: Config, context: MethodContext, assistant: Assistant | None = None) -> None:
        target = context.backbone
        if assistant is None:
            if not isinstance(target, DecoderStack):
                raise IncompatibleError(
                    f"method 'tvdpp' needs a model of hasten's own decoder stack; {context.model!r} runs on "
                    f"{target.name!r}",
                    hint="choose another method (`hasten methods`)",
                    field="method",
                )
            small = load_small(weights_path("tvdpp", target, context.model, config.weights), target)
            assistant = Assistant(small, target.config.vocab_size, config.cache_mb * 1_000_000)
        self.config = config
        super().__init__(assistant, config.nodes, config.sample, config.temperature, config.floor)


method = Tvdpp
