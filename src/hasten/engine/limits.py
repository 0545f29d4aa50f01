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
    patterns: int = _limit(64, "patterns", "patterns of module names in one quantization_config, of up to 200 characters")
    canvas_steps: int = _limit(262_144, "tokens", "canvas x steps of one request: what it may cost before it begins")
    prefix_share: float = _limit(0.25, "of the cache", "keys of finished prompts kept for the next that begins alike")
    grammar_bytes: int = _limit(1_000_000, "bytes", "one schema, regex or grammar")
    grammar_depth: int = _limit(256, "levels", "nesting of a schema or grammar")
    grammar_symbols: int = _limit(100_000, "symbols", "size of a compiled grammar")
    regex_size: int = _limit(5_000, "places", "characters and classes written in one regex of a grammar")
    schema_properties: int = _limit(2_000, "properties", "properties named by one object of a schema")
    enum_values: int = _limit(10_000, "values", "values of one enum or choice list")
    compile_s: float = _limit(2.0, "seconds", "time to compile one grammar")
    mask_s: float = _limit(0.05, "seconds", "time for the mask of one token; a grammar that needs longer ends its request")
    grammar_cache_bytes: int = _limit(64_000_000, "bytes", "compiled grammars kept, the latest used")
    body_bytes: int = _limit(2_000_000, "bytes", "body of one HTTP request")
    http_header_bytes: int = _limit(16_384, "bytes", "headers of one HTTP request")
    http_headers: int = _limit(64, "headers", "headers of one HTTP request")
    body_s: float = _limit(10.0, "seconds", "time for the body of one HTTP request to arrive")
    connections: int = _limit(512, "connections", "open connections of the server")
    served_tokens: int = _limit(4_096, "tokens", "max_tokens of one request to the server")
    served_queue: int = _limit(128, "requests", "requests waiting at the server; more are answered 429")
    served_inputs: int = _limit(256, "inputs", "prompts or texts in one request to the server")
    images: int = _limit(8, "images", "images in one chat request; its body bounds their bytes")
    image_pixels: int = _limit(16_000_000, "pixels", "width x height of one image, read from its header")
    tools: int = _limit(64, "tools", "tools one chat request may offer")
    deadline_s: float = _limit(600.0, "seconds", "time a request to the server may take, waiting included")
    ping_s: float = _limit(15.0, "seconds", "silence of a stream after which a comment keeps it open")
    drain_s: float = _limit(30.0, "seconds", "time that running requests get when the server is told to stop")
    error_bytes: int = _limit(2_048, "bytes", "body of one error answer")
    key_chars: int = _limit(16, "characters", "least length of an API key")

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
