"""What a decoder stack looks like, independent of the file it came from.

`models/families.py` makes a `ModelConfig` from a released `config.json`, `models/gguf.py` from GGUF metadata;
`models/transformer.py` builds the stack. Parameter names of the stack (shapes in brackets), layer i:

    embed.weight [vocab, hidden]              norm.weight [hidden]      head.weight [vocab, hidden] (+ .bias; none if tied)
    layers.i.attn_norm.weight [hidden]        layers.i.post_attn_norm.weight [hidden]   (sandwich norms only)
    layers.i.qkv.weight [(heads + 2 kv_heads) * head_dim, hidden]   (+ .bias)   rows: all q heads, then k, then v
    layers.i.q_norm.weight, k_norm.weight [head_dim]                            (qk_norm only)
                                          [heads * head_dim], [kv_heads * head_dim]    (qk_norm_whole)
    layers.i.out.weight [hidden, heads * head_dim]   (+ .bias)
    layers.i.ffn_norm.weight [hidden]         layers.i.post_ffn_norm.weight [hidden]    (sandwich norms only)
    layers.i.gate_up.weight [2 ffn, hidden]   (+ .bias)   rows: gate, then up
    layers.i.down.weight [hidden, ffn]        (+ .bias)
    layers.i.experts.*                        in place of gate_up and down where `experts` holds; see models/moe.py

RMS-norm weights are stored as the factor that multiplies the normalised value: a Gemma checkpoint's offset (1 + w) is
added once at load. q and k rows are in the half-rotation layout (GGUF llama files interleave; undone at load).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hasten.errors import ConfigError, out_of_range

Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["plain", "linear", "llama3", "factors"]
Kind = Literal["causal", "masked"]


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotary embedding: base `theta`, optional long-context scaling, and the rotated share of a head's dimensions.

    linear: positions divided by `factor`. llama3: frequencies below `low_freq_factor` wavelengths of `original_len`
    divided by `factor`, above `high_freq_factor` kept, between interpolated. factors: each inverse frequency divided by
    its own entry of `factors` (how GGUF files store llama3 scaling).
    """

    theta: float = 10_000.0
    kind: RopeKind = "plain"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192
    partial: float = 1.0
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_len"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise out_of_range(f"rope.{name}", value, "a positive finite number")
        if not 0 < self.partial <= 1:
            raise out_of_range("rope.partial", self.partial, "in (0, 1]")
        if self.kind not in ("plain", "linear", "llama3", "factors"):
            raise out_of_range("rope.kind", self.kind, "plain, linear, llama3 or factors")
        if not all(math.isfinite(f) and f > 0 for f in self.factors):
            raise out_of_range("rope.factors", self.factors, "positive finite numbers")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise out_of_range("rope.high_freq_factor", self.high_freq_factor, "above low_freq_factor")


@dataclass(frozen=True, slots=True)
class Layer:
    """What distinguishes one layer from the next: its sliding window in tokens (None = all) and its rotary embedding.

    A query sees `window` keys, itself included. `rope` indexes `ModelConfig.ropes`; None = no positions (NoPE layers).
    """

    window: int | None = None
    rope: int | None = 0


@dataclass(frozen=True, slots=True)
class Experts:
    """The feed-forward parts of the layers from `first` on: `count` experts of `width`, of which a token uses `active`.

    A token's experts come from the `active_groups` best of `groups` equal groups (a group counts as its two best). Their
    scores are sigmoids, to which a stored bias is added for the choice alone (`biased`); the weights are the scores, made
    to sum to one (`normalised`), times `scale`. `shared` is the width of an expert that every token uses, 0 for none.
    """

    count: int
    active: int
    width: int
    shared: int = 0
    first: int = 0
    groups: int = 1
    active_groups: int = 1
    scale: float = 1.0
    normalised: bool = True
    biased: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (
            ("count", 1, 1 << 16),
            ("width", 1, 1 << 24),
            ("shared", 0, 1 << 24),
            ("first", 0, 1024),
            ("groups", 1, self.count),
            ("active_groups", 1, self.groups),
        ):
            if not low <= getattr(self, name) <= high:
                raise out_of_range(f"experts.{name}", getattr(self, name), f"in [{low}, {high}]")
        if self.count % self.groups:
            raise out_of_range("experts.groups", self.groups, f"a divisor of count = {self.count}")
        if self.groups > 1 and self.count // self.groups < 2:
            raise out_of_range("experts.groups", self.groups, "groups of at least two experts")
        most = self.count // self.groups * self.active_groups
        if not 1 <= self.active <= most:
            raise out_of_range("experts.active", self.active, f"in [1, {most}]: no more than the chosen groups hold")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise out_of_range("experts.scale", self.scale, "a positive finite number")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and arithmetic of one decoder stack; checked on construction, raises ConfigError naming the field.

    Sizes are in elements, `max_len` in tokens. `attn_scale` multiplies q.k; `attn_softcap` and `logit_softcap` are the
    c of c * tanh(x / c). `embed_scale` multiplies input embeddings (Gemma: sqrt(hidden)), `logit_scale` the logits before
    their cap. `qk_norm` normalises every head of q and k, `qk_norm_whole` all heads together. `eos_ids` end a text.

    Of kind "masked", a model predicts the positions that hold `mask_id`: with `logit_shift` 1 from the state one position
    earlier; within blocks of `block` positions, each of which sees the ones before it, or all at once (None). `eot_id` ends
    a turn of a conversation, `canvas` is the length of an answer (its slots) that the model is made for.
    """

    family: str
    vocab_size: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    max_len: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...] = (Rope(),)
    norm_eps: float = 1e-5
    qk_norm: bool = False
    sandwich_norms: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    activation: Activation = "silu"
    tied: bool = False
    embed_scale: float = 1.0
    attn_scale: float = field(default=0.0)
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    qk_norm_whole: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    experts: Experts | None = None
    kind: Kind = "causal"
    mask_id: int | None = None
    eot_id: int | None = None
    logit_shift: int = 0
    block: int | None = None
    canvas: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "heads", "kv_heads", "head_dim", "ffn", "max_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
                raise out_of_range(name, value, "an integer in [1, 16777216]")
        if not 1 <= len(self.layers) <= 1024:
            raise out_of_range("layers", len(self.layers), "1 to 1024 layers")
        if self.heads % self.kv_heads:
            raise out_of_range("kv_heads", self.kv_heads, f"a divisor of heads = {self.heads}")
        if self.head_dim % 2:
            raise out_of_range("head_dim", self.head_dim, "even")
        if not 0 < self.norm_eps < 1:
            raise out_of_range("norm_eps", self.norm_eps, "in (0, 1)")
        if self.activation not in ("silu", "gelu_tanh"):
            raise out_of_range("activation", self.activation, "silu or gelu_tanh")
        for layer in self.layers:
            if layer.window is not None and layer.window < 1:
                raise out_of_range("window", layer.window, "at least 1 token")
            if layer.rope is not None and not 0 <= layer.rope < len(self.ropes):
                raise out_of_range("rope", layer.rope, f"an index below {len(self.ropes)}")
        if self.attn_scale == 0.0:
            object.__setattr__(self, "attn_scale", self.head_dim**-0.5)
        for name in ("attn_scale", "embed_scale", "logit_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise out_of_range(name, getattr(self, name), "a positive finite number")
        for name in ("attn_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise out_of_range(name, value, "a positive finite number or none")
        for token in self.eos_ids:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"eos_ids holds {token}, outside the vocabulary of {self.vocab_size}", field="eos_ids")
        if self.qk_norm and self.qk_norm_whole:
            raise ConfigError("qk_norm and qk_norm_whole exclude each other", field="qk_norm")
        self._check_kind()

    def _check_kind(self) -> None:
        """What only masked models have: a mask token that is nothing else, a shift, a block."""
        if self.kind not in ("causal", "masked"):
            raise out_of_range("kind", self.kind, "causal or masked")
        if self.kind == "causal":
            for name, none in (("mask_id", None), ("logit_shift", 0), ("block", None)):
                if getattr(self, name) != none:
                    raise ConfigError(f"{name} is for masked models, this one is causal", field=name)
            return
        if self.mask_id is None or not 0 <= self.mask_id < self.vocab_size:
            raise out_of_range("mask_id", self.mask_id, f"a token id below vocab_size = {self.vocab_size} (mask_token_id)")
        if self.mask_id == self.pad_id:
            raise out_of_range("mask_id", self.mask_id, "another token than the pad token (mask_token_id, pad_token_id)")
        if self.mask_id in self.eos_ids:
            raise out_of_range("mask_id", self.mask_id, "another token than those that end a text (mask_token_id)")
        if self.logit_shift not in (0, 1):
            raise out_of_range("logit_shift", self.logit_shift, "0 or 1")
        if self.block is not None and not 1 <= self.block <= self.max_len:
            raise out_of_range("block", self.block, f"in [1, {self.max_len}] (block_size)")

    @property
    def parameters(self) -> int:
        """Number of weights, tied embeddings counted once."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        out = self.heads * self.head_dim * self.hidden
        per_layer = qkv + out + (4 if self.sandwich_norms else 2) * self.hidden
        per_layer += 2 * self.head_dim if self.qk_norm else 0
        per_layer += (self.heads + self.kv_heads) * self.head_dim if self.qk_norm_whole else 0
        per_layer += (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        per_layer += self.hidden if self.out_bias else 0
        dense = 3 * self.ffn * self.hidden + (2 * self.ffn + self.hidden if self.ffn_bias else 0)
        n, e = len(self.layers), self.experts
        mixed = 0 if e is None else max(0, n - e.first)
        total = per_layer * n + dense * (n - mixed)
        if e is not None:
            total += mixed * ((e.count * e.width + e.shared) * 3 * self.hidden + e.count * (self.hidden + e.biased))
        total += self.vocab_size if self.head_bias else 0
        return total + self.vocab_size * self.hidden * (1 if self.tied else 2) + self.hidden

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of key/value cache for `tokens` positions at `itemsize` bytes per number."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * tokens * itemsize


@dataclass(frozen=True, slots=True)
class AdaptedConfig:
    """What is known of an adapted model: its released `family`, number of `parameters`, and `vocab_size`."""

    family: str
    parameters: int
    vocab_size: int
