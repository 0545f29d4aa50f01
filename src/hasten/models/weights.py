"""Released weight names -> the fused state of models/config.py.

The plan of a model (which released tensors make which of ours, and their shapes) is a value that can be checked against a
file's header before a byte of weights is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hasten.errors import FormatError, UnsupportedError
from hasten.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

# where the decoder sits: plain, gemma3 with vision as released, the same as transformers 5 writes it, a bare base model
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # recomputed from the config
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
_STORED = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Part:
    """One released tensor and the shape it must have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """One of our tensors: `parts` stacked along dimension 0; `offset` is added in float32 (Gemma norms: 1)."""

    name: str
    parts: tuple[Part, ...]
    offset: float = 0.0


def _layer(config: ModelConfig, prefix: str, i: int) -> Iterator[Weight]:
    """The weights of layer i."""
    c, ours, theirs = config, f"layers.{i}.", f"{prefix}layers.{i}."
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    offset = 1.0 if c.family.startswith("gemma") else 0.0

    def norm(name: str, released: str, size: int) -> Weight:
        return Weight(f"{ours}{name}.weight", (Part(f"{theirs}{released}.weight", (size,)),), offset)

    def linear(name: str, released: dict[str, int], inputs: int, bias: bool) -> Iterator[Weight]:
        parts = [(f"{theirs}{part}", rows) for part, rows in released.items()]
        yield Weight(f"{ours}{name}.weight", tuple(Part(f"{part}.weight", (rows, inputs)) for part, rows in parts))
        if bias:
            yield Weight(f"{ours}{name}.bias", tuple(Part(f"{part}.bias", (rows,)) for part, rows in parts))

    yield norm("attn_norm", "input_layernorm", c.hidden)
    attn, mlp = "self_attn.", "mlp."
    yield from linear("qkv", {attn + "q_proj": q, attn + "k_proj": kv, attn + "v_proj": kv}, c.hidden, c.qkv_bias)
    if c.qk_norm:
        yield norm("q_norm", "self_attn.q_norm", c.head_dim)
        yield norm("k_norm", "self_attn.k_norm", c.head_dim)
    yield from linear("out", {attn + "o_proj": c.hidden}, q, c.out_bias)
    if c.sandwich_norms:
        yield norm("post_attn_norm", "post_attention_layernorm", c.hidden)
        yield norm("ffn_norm", "pre_feedforward_layernorm", c.hidden)
        yield norm("post_ffn_norm", "post_feedforward_layernorm", c.hidden)
    else:
        yield norm("ffn_norm", "post_attention_layernorm", c.hidden)
    yield from linear("gate_up", {mlp + "gate_proj": c.ffn, mlp + "up_proj": c.ffn}, c.hidden, c.ffn_bias)
    yield from linear("down", {mlp + "down_proj": c.hidden}, c.ffn, c.ffn_bias)


def plan(config: ModelConfig, names: Collection[str]) -> list[Weight]:
    """Every weight of `config`, made from the released `names`; raises FormatError listing missing and unexpected ones."""
    c = config
    prefix = next((p for p in _PREFIXES if p + "embed_tokens.weight" in names or p + "norm.weight" in names), "model.")
    offset = 1.0 if c.family.startswith("gemma") else 0.0
    embed = Part(prefix + "embed_tokens.weight", (c.vocab_size, c.hidden))
    head = next((Part(name, embed.shape) for name in _HEADS if name in names), Part(_HEADS[0], embed.shape))
    known = {embed.name}
    if c.tied:
        known.add(head.name)
        if embed.name not in names and head.name in names:
            embed = head  # a tied pair is one tensor, released under either name
    weights = [Weight("embed.weight", (embed,))]
    for i in range(len(c.layers)):
        weights += _layer(c, prefix, i)
    weights.append(Weight("norm.weight", (Part(prefix + "norm.weight", (c.hidden,)),), offset))
    if not c.tied:
        weights.append(Weight("head.weight", (head,)))
    wanted = [part.name for weight in weights for part in weight.parts]
    known.update(wanted)
    missing = [name for name in wanted if name not in names]
    unexpected = [name for name in names if name not in known and not _ignorable(c, name)]
    problems = [f"missing {name}" for name in missing] + [f"unexpected {name[:120]!r}" for name in sorted(unexpected)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise FormatError(
            f"weights do not fit a {c.family} model of {len(c.layers)} layers: {shown}",
            field="weights",
            hint="config.json and weights must come from the same release",
        )
    return weights


def _ignorable(config: ModelConfig, name: str) -> bool:
    return bool(_DERIVED.fullmatch(name)) or (config.family == "gemma3" and bool(_VISION.fullmatch(name)))


def check_part(part: Part, shape: tuple[int, ...], dtype: str) -> None:
    """Raise FormatError for another shape than planned, UnsupportedError for numbers that are not plain floats."""
    if shape != part.shape:
        raise FormatError(f"tensor {part.name} has shape {shape}, not {part.shape}", field="weights")
    if dtype not in _STORED:
        raise UnsupportedError(
            f"tensor {part.name} is stored as {dtype}; stored weights must be {', '.join(_STORED)}",
            field="weights",
            hint="load the original checkpoint or a GGUF of this model",
        )


def tied_head(config: ModelConfig, weights: list[Weight], names: Collection[str]) -> str | None:
    """The released output head of a tied model that stores both copies, which must then be equal; else None."""
    head = next((name for name in _HEADS if name in names), None)
    return head if config.tied and weights[0].parts[0].name != head else None


def state_from_hf(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, done: Callable[[int], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor) pairs, in the dtypes they are stored in, one at a time; `tensors` may read lazily.

    Names are checked before the first tensor is read. `done` is told the stored bytes of each finished tensor.
    Raises FormatError for missing, unexpected or wrongly shaped tensors, UnsupportedError for quantised ones.
    """
    weights = plan(config, tensors.keys())
    return _state(config, weights, tensors, done)


def _state(
    config: ModelConfig, weights: list[Weight], tensors: Mapping[str, Tensor], done: Callable[[int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    import torch

    def read(part: Part) -> Tensor:
        tensor = tensors[part.name]
        check_part(part, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return tensor

    for weight in weights:
        parts = [read(part) for part in weight.parts]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        size = sum(part.nbytes for part in parts)
        del parts
        twin = tied_head(config, weights, tensors.keys()) if weight.name == "embed.weight" else None
        if twin is not None and not torch.equal(value, read(replace(weight.parts[0], name=twin))):
            raise FormatError(
                f"{weight.parts[0].name} and {twin} differ, but config.json says that they are one tensor",
                field="tie_word_embeddings",
                hint="set tie_word_embeddings to false in config.json if the model really has its own head",
            )
        if weight.offset:
            value = value.float() + weight.offset
        yield weight.name, value
        del value
        if done is not None:
            done(size)
