"""Released `config.json` fields -> `ModelConfig`, per family; weight names are in models/weights.py.

Both written forms are read: transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters). An absent field takes the
default of the family's own configuration class; a field that would change the arithmetic is honoured or refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hasten.errors import FormatError, UnsupportedError, out_of_range
from hasten.models.config import Activation, Layer, ModelConfig, Rope
from hasten.models.weights import state_from_hf

__all__ = ["ADAPTER_HINT", "FAMILIES", "Family", "config_from_hf", "state_from_hf"]

ADAPTER_HINT = "put 'hf:' before the model's directory or hub id to run it through transformers"

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip
_MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one released family apart: defaults of absent fields, and where windows, biases and norms sit.

    windows: "none", "all" layers, "upper" (from max_window_layers on), "alternate" (every other, the first one too),
    "pattern" (all but every n-th), "nope" (the layers without positions). biases: fields that switch them on, or fixed.
    """

    name: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    windows: Literal["none", "all", "upper", "alternate", "pattern", "nope"] = "none"
    qkv_bias: str | bool = "attention_bias"
    out_bias: str | bool = "attention_bias"
    ffn_bias: str | bool = False
    qk_norm: bool = False
    gemma: bool = False


_GEMMA = {
    "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}, ffn_bias="mlp_bias"
    ),
    "smollm3": Family(
        "smollm3",
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2_000_000.0, "pad_token_id": 128004,
         "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": True},
        windows="nope", ffn_bias="mlp_bias",
    ),
    "qwen2": Family("qwen2", _QWEN, windows="upper", qkv_bias=True, out_bias=False),
    "qwen3": Family("qwen3", {**_QWEN, "head_dim": 128}, windows="upper", qk_norm=True),
    "mistral": Family(
        "mistral",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "bos_token_id": 1,
         "eos_token_id": 2},
        windows="all", qkv_bias=False, out_bias=False,
    ),
    "gemma2": Family(
        "gemma2",
        {**_GEMMA, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        windows="alternate", gemma=True,
    ),
    # nested text configs of released gemma3 models leave out every field that has its default, sizes included
    "gemma3": Family(
        "gemma3",
        {**_GEMMA, "max_position_embeddings": 131072, "vocab_size": 262208, "hidden_size": 2304,
         "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "rope_theta": 1_000_000.0},
        windows="pattern", qk_norm=True, gemma=True,
    ),
}  # fmt: skip
_MODEL_TYPES = {**{name: name for name in FAMILIES}, "gemma3_text": "gemma3"}
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # outer fields that overrule text_config
_ARCHITECTURES = {
    "llamaforcausallm": "llama", "smollm3forcausallm": "smollm3", "qwen2forcausallm": "qwen2",
    "qwen3forcausallm": "qwen3", "mistralforcausallm": "mistral", "gemma2forcausallm": "gemma2",
    "gemma3forcausallm": "gemma3_text", "gemma3forconditionalgeneration": "gemma3",
}  # fmt: skip


# --- fields ----------------------------------------------------------------------------------------------------------


class _Fields:
    """Typed reading of one JSON object: a bool is not a number, a string is not a number, and errors name the field."""

    def __init__(self, values: Mapping[str, object], defaults: Mapping[str, object], prefix: str = "") -> None:
        self.values, self.defaults, self.prefix = values, defaults, prefix

    def get(self, name: str, default: object = _MISSING) -> Any:
        """The value, else the family's default, else `default`; raises FormatError when there is none."""
        value = self.values.get(name, self.defaults.get(name, default))
        if value is _MISSING:
            raise FormatError(
                f"config.json lacks {self.prefix}{name}", field=name, hint="take config.json from the model's source"
            )
        return value

    def number(self, name: str, default: object = _MISSING) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            raise out_of_range(self.prefix + name, value, "a finite number")
        return value

    def positive(self, name: str, default: object = _MISSING) -> float:
        """A finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise out_of_range(self.prefix + name, value, "a number above 0")
        return value

    def size(self, name: str, default: object = _MISSING) -> int:
        """An integer in [1, 2**24]."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
            raise out_of_range(self.prefix + name, value, "an integer in [1, 16777216]")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false; null counts as absent."""
        value = self.get(name, default)
        value = self.defaults.get(name, default) if value is None else value
        if not isinstance(value, bool):
            raise out_of_range(self.prefix + name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A string; null counts as absent."""
        value = self.get(name, default)
        value = default if value is None else value
        if not isinstance(value, str):
            raise out_of_range(self.prefix + name, value, "a string")
        return value

    def object(self, name: str) -> Mapping[str, object]:
        """A JSON object; absent and null are the empty one."""
        value = self.get(name, None)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise out_of_range(self.prefix + name, value, "an object")
        return value

    def items(self, name: str) -> list[object] | None:
        """A list of at most 1024 items (one per layer), or None."""
        value = self.get(name, None)
        if value is not None and (not isinstance(value, list) or len(value) > 1024):
            raise out_of_range(self.prefix + name, value, "a list with one entry per layer")
        return value

    def optional(self, name: str) -> float | None:
        """A positive number, or None when null or absent without a default."""
        return None if self.get(name, None) is None else self.positive(name)

    def window(self) -> int | None:
        """sliding_window in tokens, or None."""
        return None if self.get("sliding_window", None) is None else self.size("sliding_window")

    def ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id or list of ids as a tuple; a family's default that this vocabulary lacks is dropped."""
        value = self.get(name, None)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        for token in listed:
            if isinstance(token, bool) or not isinstance(token, int) or len(listed) > 1024:
                raise out_of_range(self.prefix + name, value, "a token id or a list of token ids")
        if name not in self.values:
            listed = [token for token in listed if token < vocab_size]
        return tuple(listed)


def _rope(params: Mapping[str, object], config: _Fields, theta: float, max_len: int) -> Rope:
    """One rotary embedding from rope_parameters / rope_scaling, with `theta` where they name no base."""
    f = _Fields(params, {}, "rope_parameters.")
    kind = f.text("rope_type", f.text("type", "default"))
    base = f.positive("rope_theta", theta)
    for source in (f, config):
        if source.get("partial_rotary_factor", None) not in (None, 1):
            raise UnsupportedError(
                "partial_rotary_factor is set, but models of this family rotate whole heads",
                field="partial_rotary_factor",
                hint=ADAPTER_HINT,
            )
    if kind == "default":
        return Rope(theta=base)
    if kind == "linear":
        return Rope(theta=base, kind="linear", factor=f.positive("factor"))
    if kind == "llama3":
        name = "original_max_position_embeddings"
        length = config.size(name) if config.get(name, None) is not None else f.size(name, max_len)
        return Rope(
            base, "llama3", f.positive("factor"), f.positive("low_freq_factor"), f.positive("high_freq_factor"), length
        )
    raise UnsupportedError(
        f"rope type {kind[:40]!r} is not supported; supported: default, linear, llama3", field="rope_type", hint=ADAPTER_HINT
    )


def _ropes(family: Family, f: _Fields, max_len: int) -> tuple[Rope, ...]:
    """The rotary embeddings of a model: one, or (full, sliding) for gemma3."""
    scaling, params = f.object("rope_scaling"), f.object("rope_parameters")
    nested = [key for key in ("full_attention", "sliding_attention") if key in params]
    if family.name != "gemma3":
        if nested:
            raise UnsupportedError(
                f"rope_parameters hold {nested[0]}, but {family.name} has one rotary embedding for all layers",
                field="rope_parameters",
                hint=ADAPTER_HINT,
            )
        return (_rope(scaling or params, f, f.positive("rope_theta", 10_000.0), max_len),)
    if params and not nested:
        raise out_of_range("rope_parameters", dict(params), "an object with full_attention and sliding_attention")
    inner = _Fields(params, {}, "rope_parameters.")
    full = {**inner.object("full_attention"), **scaling}
    local = f.positive("rope_local_base_freq", 10_000.0)
    return (
        _rope(full, f, f.positive("rope_theta"), max_len),
        _rope(inner.object("sliding_attention"), f, local, max_len),
    )


def _layers(family: Family, f: _Fields, count: int) -> tuple[Layer, ...]:
    """Window and rotary embedding of every layer."""
    off = family.windows in ("upper", "nope") and not f.flag("use_sliding_window")
    window = None if off or family.windows == "none" else f.window()
    rotated = [True] * count
    if family.windows == "nope":
        every = f.size("no_rope_layer_interval", 4)
        flags = f.items("no_rope_layers")
        if flags is None:
            rotated = [(i + 1) % every != 0 for i in range(count)]
        elif len(flags) < count or any(not isinstance(flag, int) or flag not in (0, 1) for flag in flags):
            raise out_of_range("no_rope_layers", flags, f"a list of at least {count} zeros and ones")
        else:
            rotated = [bool(flag) for flag in flags[:count]]
    if family.windows == "upper":
        first = f.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise out_of_range("max_window_layers", first, "an integer >= 0")
        slides = [i >= first for i in range(count)]
    elif family.windows == "pattern":
        every = f.size("sliding_window_pattern", f.size("_sliding_window_pattern", 6))
        slides = [(i + 1) % every != 0 for i in range(count)]
    elif family.windows == "alternate":
        slides = [i % 2 == 0 for i in range(count)]
    elif family.windows == "nope":
        slides = [not flag for flag in rotated]
    else:
        slides = [family.windows == "all"] * count
    types = f.items("layer_types")
    if types is not None:
        slides = _slides(family, types, count, window, slides)
    elif window is None and family.windows in ("pattern", "alternate"):
        raise out_of_range("sliding_window", None, "a number of tokens for the sliding layers")
    return tuple(
        Layer(window if slide else None, (1 if slide and family.name == "gemma3" else 0) if turn else None)
        for slide, turn in zip(slides, rotated, strict=True)
    )


def _slides(
    family: Family, types: list[object], count: int, window: int | None, implied: list[bool]
) -> list[bool]:
    """Which layers slide, as `layer_types` says; refused where the family's own code would not honour it."""
    if len(types) != count:
        raise out_of_range("layer_types", f"{len(types)} entries", f"one entry per layer, {count} in all")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"layer type {str(kind)[:40]!r} is not supported; supported: full_attention, sliding_attention",
                field="layer_types",
                hint=ADAPTER_HINT,
            )
    slides = [kind == "sliding_attention" for kind in types]
    if family.windows in ("none", "all") and slides != [flag and window is not None for flag in implied]:
        raise UnsupportedError(
            f"layer_types mix windows in a way that {family.name} models do not", field="layer_types", hint=ADAPTER_HINT
        )
    if any(slides) and window is None:
        raise out_of_range("layer_types", "sliding_attention", "full_attention while no sliding window is switched on")
    return slides


# --- config ----------------------------------------------------------------------------------------------------------


def _model_type(config: Mapping[str, object]) -> str:
    """The known model type of a config.json; raises UnsupportedError listing the known ones."""
    kind, architectures = config.get("model_type"), config.get("architectures")
    names = [n for n in architectures if isinstance(n, str)] if isinstance(architectures, list) else []
    if kind is None:
        kind = next((_ARCHITECTURES[n.lower()] for n in names if n.lower() in _ARCHITECTURES), None)
    if kind is None and not names:
        raise FormatError("config.json lacks model_type", field="model_type", hint="take it from the model's source")
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        shown = kind if isinstance(kind, str) else names[0] if names else kind
        raise UnsupportedError(
            f"model type {str(shown)[:60]!r} is not one of hasten's own: {', '.join(sorted(_MODEL_TYPES))}",
            field="model_type",
            hint=ADAPTER_HINT,
        )
    if names and not any(n.endswith(("ForCausalLM", "ForConditionalGeneration", "Model")) for n in names):
        raise UnsupportedError(
            f"architecture {names[0][:60]!r} has no language-model head", field="architectures", hint="load a causal model"
        )
    return kind


def _refuse_unsupported(config: Mapping[str, object], family: Family) -> None:
    """Fields that change the arithmetic in ways the stack does not implement."""
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise UnsupportedError(
            f"the weights are quantised ({str(method)[:40]})",
            field="quantization_config",
            hint="load the original checkpoint or a GGUF of this model",
        )
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise UnsupportedError(
            "the model attends in both directions and does not generate text",
            field="use_bidirectional_attention" if config.get("use_bidirectional_attention") else "is_causal",
            hint="load a causal model",
        )
    if family.name == "gemma3" and config.get("attn_logit_softcapping") is not None:
        raise UnsupportedError(
            "attn_logit_softcapping is set, which released gemma3 code ignores", field="attn_logit_softcapping"
        )


def config_from_hf(config: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelConfig:
    """The ModelConfig of a released config.json; end tokens of `generation` (generation_config.json) are added to its own.

    For gemma3 with vision the text part is read. Raises UnsupportedError (unknown model type, rope type, layer type,
    quantised weights), FormatError (missing field), ConfigError (value outside its range); all name the field.
    """
    kind = _model_type(config)
    family = FAMILIES[_MODEL_TYPES[kind]]
    _refuse_unsupported(config, family)
    values = config
    if kind == "gemma3":
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            raise out_of_range("text_config", inner, "an object")
        _refuse_unsupported(inner, family)
        values = {**inner, **{name: config[name] for name in _SHARED if config.get(name) is not None}}
    f = _Fields(values, family.defaults)
    hidden, heads, vocab_size = f.size("hidden_size"), f.size("num_attention_heads"), f.size("vocab_size")
    count, max_len = f.size("num_hidden_layers"), f.size("max_position_embeddings")
    if count > 1024:
        raise out_of_range("num_hidden_layers", count, "at most 1024")
    kv_heads = heads if f.get("num_key_value_heads", None) is None else f.size("num_key_value_heads")
    if f.get("head_dim", None) is not None:
        head_dim = f.size("head_dim")
    elif hidden % heads:
        raise out_of_range("hidden_size", hidden, f"a multiple of num_attention_heads = {heads}, as head_dim is absent")
    else:
        head_dim = hidden // heads
    act_field = "hidden_activation" if family.gemma else "hidden_act"
    activation = f.text(act_field, "gelu_pytorch_tanh" if family.gemma else "silu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation {activation[:40]!r} is not supported; supported: {', '.join(sorted(_ACTIVATIONS))}",
            field=act_field,
            hint=ADAPTER_HINT,
        )
    more = _Fields(generation or {}, {}, "generation_config.").ids("eos_token_id", vocab_size)
    flags = (family.qkv_bias, family.out_bias, family.ffn_bias)
    qkv_bias, out_bias, ffn_bias = (flag if isinstance(flag, bool) else f.flag(flag) for flag in flags)
    return ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=f.size("intermediate_size"),
        max_len=max_len,
        layers=_layers(family, f, count),
        ropes=_ropes(family, f, max_len),
        norm_eps=f.positive("rms_norm_eps", 1e-6),
        qk_norm=family.qk_norm,
        sandwich_norms=family.gemma,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        ffn_bias=ffn_bias,
        activation=_ACTIVATIONS[activation],
        tied=f.flag("tie_word_embeddings"),
        embed_scale=math.sqrt(hidden) if family.gemma else 1.0,
        attn_scale=f.positive("query_pre_attn_scalar") ** -0.5 if family.gemma else head_dim**-0.5,
        attn_softcap=f.optional("attn_logit_softcapping") if family.gemma else None,
        logit_softcap=f.optional("final_logit_softcapping") if family.gemma else None,
        bos_id=_first(f.ids("bos_token_id", vocab_size), vocab_size, "bos_token_id"),
        eos_ids=tuple(dict.fromkeys((*f.ids("eos_token_id", vocab_size), *more))),
        pad_id=_first(f.ids("pad_token_id", vocab_size), vocab_size, "pad_token_id"),
    )


def _first(ids: tuple[int, ...], vocab_size: int, name: str) -> int | None:
    """A single id; -1 is how some releases write "none"."""
    if not ids or ids == (-1,):
        return None
    if len(ids) > 1 or not 0 <= ids[0] < vocab_size:
        raise out_of_range(name, list(ids), f"one token id in [0, {vocab_size - 1}]")
    return ids[0]
