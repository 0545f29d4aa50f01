"""Every bound hasten enforces, in one documented struct; `hasten doctor` prints it and docs/limits.md is made from it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _limit(default: int | float, unit: str, why: str) -> Any:
    return field(default=default, metadata={"unit": unit, "why": why})


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds with default, unit and reason. Change them with `dataclasses.replace`; values must be positive."""

    prompt_chars: int = _limit(8_000_000, "characters", "text of one prompt before it is tokenised")
    max_tokens: int = _limit(131_072, "tokens", "tokens one request may ask for")
    n: int = _limit(8, "choices", "choices per request; bounded before anything is allocated")
    stop_strings: int = _limit(8, "strings", "stop strings per request")
    stop_chars: int = _limit(64, "characters", "length of one stop string")
    logprobs: int = _limit(20, "tokens", "alternatives reported per position")
    logit_bias: int = _limit(1_000, "entries", "logit_bias entries per request")
    messages: int = _limit(256, "messages", "chat messages per request")
    rows: int = _limit(32, "rows", "sequences advanced together in one step")
    queue: int = _limit(1_024, "requests", "requests waiting for a row")
    canvas: int = _limit(256, "tokens", "canvas of a masked model when max_tokens is not given")
    prefill_chunk: int = _limit(512, "tokens", "prompt tokens of one row read per step, so that others keep moving")
    step_tokens: int = _limit(2_048, "tokens", "query tokens of all rows in one target pass")
    draft_budget: int = _limit(31, "nodes", "nodes of one row verified per pass at most; fewer where they do not pay")
    draft_nodes: int = _limit(256, "nodes", "nodes one draft may hold")
    cache_share: float = _limit(0.5, "of free memory", "KV cache memory when no budget is given")
    template_chars: int = _limit(1_000_000, "characters", "output of one chat template")
    template_s: float = _limit(1.0, "seconds", "time to render one chat template")
    header_bytes: int = _limit(100_000_000, "bytes", "metadata of one safetensors or GGUF file")
    tensors: int = _limit(100_000, "tensors", "tensors in one checkpoint")
    tensor_dims: int = _limit(4, "dimensions", "dimensions of one stored tensor")
    string_bytes: int = _limit(64_000_000, "bytes", "one string in GGUF metadata")
    array_items: int = _limit(4_000_000, "items", "one array in GGUF metadata")
    config_bytes: int = _limit(10_000_000, "bytes", "one JSON config file")

    def __post_init__(self) -> None:
        from hasten.errors import out_of_range

        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise out_of_range(f"limits.{f.name}", value, f"a positive number of {f.metadata['unit']}")

    def rows_for_people(self) -> list[tuple[str, int | float, str, str]]:
        """(name, value, unit, reason) of every limit, in declaration order."""
        return [(f.name, getattr(self, f.name), f.metadata["unit"], f.metadata["why"]) for f in fields(self)]


LIMITS = Limits()
