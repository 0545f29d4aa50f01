"""Draft model: a smaller model of the same vocabulary writes a chain ahead, and the target checks it."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.draft._assistant import Chain, open_assistant
from hasten.engine.contracts import MethodContext
from hasten.errors import out_of_range
from hasten.models.assistant import Assistant
from hasten.types import MethodCard

card = MethodCard(
    slug="draft-model",
    title="Fast Inference from Transformers via Speculative Decoding",
    paper="2211.17192",
    date="2022-11",
    plugs_into="draft",
    exactness="exact",
    claim="2x to 3x with T5-XXL and a draft model 1/100 of its size.",
    no_help="Targets for which no much smaller model of the same vocabulary exists.",
    knobs={
        "model": "the draft model: catalog name, directory, hub id or file",
        "nodes": "tokens drafted ahead (1..32)",
        "sample": "draw drafts at the request's temperature, judged by rejection (true), or draft the best token",
        "temperature": "the draft's temperature (0 up to 2; -1: that of the request)",
        "cache_mb": "memory of the draft model's keys and values, in megabytes",
    },
    needs=("causal",),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the draft model."""

    model: str = ""
    nodes: int = 4
    sample: bool = True
    temperature: float = -1.0
    cache_mb: int = 256

    def __post_init__(self) -> None:
        for name, top in (("nodes", 32), ("cache_mb", 1 << 20)):
            if not 1 <= getattr(self, name) <= top:
                raise out_of_range(f"draft-model.{name}", getattr(self, name), f"an integer in [1, {top}]")
        if self.temperature != -1.0 and not 0.0 <= self.temperature <= 2.0:
            raise out_of_range("draft-model.temperature", self.temperature, "in [0, 2], or -1")


class DraftModel(Chain):
    """Chains from a draft model; with `sample` they carry the distributions they were drawn from."""

    name = "draft-model"

    def __init__(self, config: Config, context: MethodContext, assistant: Assistant | None = None) -> None:
        self.config = config
        assistant = assistant or open_assistant("draft-model", config.model, config.cache_mb, context)
        super().__init__(assistant, config.nodes, config.sample, config.temperature)


method = DraftModel
