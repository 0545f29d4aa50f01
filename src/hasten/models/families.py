"""Released configs and weight names -> ModelConfig and our fused weights, one entry per family.

Reads both spellings of config.json: transformers 4.x (rope_theta, rope_scaling) and 5.x (rope_parameters). Defaults of
absent fields are those of the released configuration classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from hasten.errors import FormatError, UnsupportedError, out_of_range
from hasten.models import masked
from hasten.models.checkpoint import Named
from hasten.models.config import Layer, ModelConfig, Rope
from hasten.models.fields import Fields
from hasten.models.masked import MASKED
from hasten.models.tokenizer import Tokenizer

FAMILIES = ("llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", *MASKED)
_QWEN2 = ("qwen2", "Dream", "Fast_dLLM_Qwen")  # queries, keys and values have biases, the output has none
_LONGEST = {"gemma3_text": 131072, "Fast_dLLM_Qwen": 32768}  # max_position_embeddings where config.json has none
_DROPPED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


def config_from_hf(config: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The stack a released config.json describes; `tokenizer` names the special tokens that the config leaves out.

    Raises UnsupportedError for an unknown model_type or rope scaling, FormatError or ConfigError naming a bad field.
    """
    nested = config.get("text_config")
    kind = config.get("model_type")
    if isinstance(nested, Mapping) and kind in ("gemma3", "mistral3"):
        part = {"model_type": f"{kind}_text", "eos_token_id": config.get("eos_token_id"), **nested}
        return config_from_hf(part, tokenizer)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedError(
            f"model_type {kind!r:.60} is not implemented here; known: {', '.join(FAMILIES)}",
            hint="load it through transformers: pip install 'hasten[hf]'",
            field="model_type",
        )
    f = Fields(config)
    if kind in masked.OWN_NAMES:
        return masked.OWN_NAMES[kind].config(f, tokenizer)
    gemma = kind.startswith("gemma")
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if heads < 1:
        raise out_of_range("num_attention_heads", heads, "at least 1")
    default_dim = {"gemma2": 256, "gemma3_text": 256, "qwen3": 128, "sdar": 128}.get(kind, hidden // heads)
    head_dim = f.integer("head_dim", default_dim)
    layers, ropes = _layers(kind, f)
    activation = config.get("hidden_activation" if gemma else "hidden_act") or config.get("hidden_act")
    activation = activation or ("gelu_pytorch_tanh" if gemma else "silu")
    extra: dict[str, Any] = {}
    if kind in MASKED:
        f.only("use_mrope", False)
        extra = masked.facts(kind, f, f.integer("vocab_size"), tokenizer)
    bias = f.flag("attention_bias", False)
    scale = f.number("query_pre_attn_scalar", 256) if gemma else head_dim
    if scale <= 0:
        raise out_of_range("query_pre_attn_scalar", scale, "positive")
    return ModelConfig(
        family=kind,
        vocab_size=f.integer("vocab_size"),
        hidden=hidden,
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        ffn=f.integer("intermediate_size"),
        max_len=f.integer("max_position_embeddings", _LONGEST.get(kind, 8192)),
        layers=layers,
        ropes=ropes,
        norm_eps=f.number("rms_norm_eps", None if kind == "Dream" else 1e-6),
        qk_norm=kind in ("qwen3", "sdar", "gemma3_text"),
        sandwich_norms=gemma,
        qkv_bias=True if kind in _QWEN2 else bias,
        out_bias=bias if kind not in _QWEN2 else False,
        ffn_bias=f.flag("mlp_bias", False),
        activation=f.activation("hidden_act", activation),
        tied=f.flag("tie_word_embeddings", gemma or kind == "smollm3"),
        embed_scale=hidden**0.5 if gemma else 1.0,
        attn_scale=scale**-0.5,
        attn_softcap=_cap(f, "attn_logit_softcapping", 50.0 if kind == "gemma2" else None),
        logit_softcap=_cap(f, "final_logit_softcapping", 30.0 if kind == "gemma2" else None),
        bos_id=f.one_id("bos_token_id"),
        eos_ids=f.ids("eos_token_id"),
        pad_id=f.one_id("pad_token_id"),
        **extra,
    )


def _cap(f: Fields, name: str, default: float | None) -> float | None:
    """A soft-cap: null in the config means off, absent means the family's default."""
    if name not in f.config:
        return default
    return None if f.config[name] is None else f.number(name)


def _layers(kind: str, f: Fields) -> tuple[tuple[Layer, ...], tuple[Rope, ...]]:
    """Windows and rotary embeddings of every layer."""
    count = f.integer("num_hidden_layers")
    if not 1 <= count <= 1024:
        raise out_of_range("num_hidden_layers", count, "in [1, 1024]")
    parameters = f.section("rope_parameters") or f.section("rope_scaling")
    theta = None if kind == "Dream" else {"smollm3": 2e6}.get(kind, 1e4)
    types = f.config.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != count):
        raise FormatError(f"config: layer_types is not a list of {count} entries", field="layer_types")
    if types is not None and not set(types) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedError("config: layer_types holds kinds other than full and sliding attention", field="layer_types")
    window: int | None = f.integer("sliding_window", 0) or None
    if kind == "gemma3_text":
        window = window or f.integer("sliding_window", 4096)
        pattern = f.integer("sliding_window_pattern", f.integer("_sliding_window_pattern", 6))
        if pattern < 1:
            raise out_of_range("sliding_window_pattern", pattern, "at least 1")
        full = [t == "full_attention" for t in types] if types else [(i + 1) % pattern == 0 for i in range(count)]
        if "full_attention" in parameters or "sliding_attention" in parameters:
            wide = f.rope(Fields(parameters).section("full_attention"), 1e6)
            local = f.rope(Fields(parameters).section("sliding_attention"), 1e4)
        else:
            wide = f.rope(parameters, 1e6)
            local = Rope(theta=f.number("rope_local_base_freq", 1e4))
        return tuple(Layer(None, 0) if one else Layer(window, 1) for one in full), (wide, local)
    ropes = (f.rope(parameters, theta),)
    if kind == "gemma2":
        window = window or 4096
        sliding = [t == "sliding_attention" for t in types] if types else [i % 2 == 0 for i in range(count)]
        return tuple(Layer(window if one else None) for one in sliding), ropes
    if kind in (*_QWEN2, "qwen3", "sdar", "smollm3"):
        if not f.flag("use_sliding_window", False):
            window = None
        first = f.integer("max_window_layers", 28)
        default = [window is not None and (kind == "smollm3" or i >= first) for i in range(count)]
        slides = [t == "sliding_attention" for t in types] if types else default
        uses = _rope_layers(f, count) if kind == "smollm3" else [True] * count
        return tuple(Layer(window if s else None, 0 if u else None) for s, u in zip(slides, uses, strict=True)), ropes
    if kind == "mistral" and "sliding_window" not in f.config:
        window = 4096
    return tuple(Layer(window if kind == "mistral" else None) for _ in range(count)), ropes


def _rope_layers(f: Fields, count: int) -> list[bool]:
    """SmolLM3: which layers rotate (1) and which have no positions (0)."""
    listed = f.config.get("no_rope_layers")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != count or not all(v in (0, 1) for v in listed):
            raise FormatError(f"config: no_rope_layers is not a list of {count} zeros and ones", field="no_rope_layers")
        return [bool(v) for v in listed]
    interval = f.integer("no_rope_layer_interval", 4)
    if interval < 1:
        raise out_of_range("no_rope_layer_interval", interval, "at least 1")
    return [(i + 1) % interval != 0 for i in range(count)]


def state_from_hf(config: ModelConfig, names: Iterable[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our parameter names and tensors from released ones, fused one layer at a time.

    `names` are the stored tensor names, `read(name)` loads one. Raises FormatError naming missing and unexpected tensors.
    """
    stored = Named((name for name in names if not name.endswith(_DROPPED)), read)
    if config.family in masked.OWN_NAMES:
        yield from masked.OWN_NAMES[config.family].state(config, stored)
    else:
        yield from _llama_names(config, stored)
    stored.finish()


def _llama_names(config: ModelConfig, stored: Named) -> Iterator[tuple[str, Tensor]]:
    """Our parameters from the names that Llama's descendants share."""
    take, fuse = stored.take, stored.fuse
    offset = config.family.startswith("gemma")

    def norm(name: str) -> Tensor:
        weight = take(name)
        return weight.float() + 1.0 if offset else weight

    yield "embed.weight", take("embed_tokens.weight")
    yield "norm.weight", norm("norm.weight")
    if config.tied:
        stored.skip("lm_head.weight")  # some checkpoints store the tied head a second time
    else:
        yield "head.weight", take("lm_head.weight")
    for i in range(len(config.layers)):
        a, m, ours = f"layers.{i}.self_attn.", f"layers.{i}.mlp.", f"layers.{i}."
        yield ours + "attn_norm.weight", norm(f"layers.{i}.input_layernorm.weight")
        yield ours + "qkv.weight", fuse(*(f"{a}{p}_proj.weight" for p in "qkv"))
        if config.qkv_bias:
            yield ours + "qkv.bias", fuse(*(f"{a}{p}_proj.bias" for p in "qkv"))
        yield ours + "out.weight", take(a + "o_proj.weight")
        if config.out_bias:
            yield ours + "out.bias", take(a + "o_proj.bias")
        if config.qk_norm:
            yield ours + "q_norm.weight", norm(a + "q_norm.weight")
            yield ours + "k_norm.weight", norm(a + "k_norm.weight")
        yield ours + "gate_up.weight", fuse(m + "gate_proj.weight", m + "up_proj.weight")
        yield ours + "down.weight", take(m + "down_proj.weight")
        if config.ffn_bias:
            yield ours + "gate_up.bias", fuse(m + "gate_proj.bias", m + "up_proj.bias")
            yield ours + "down.bias", take(m + "down_proj.bias")
        after = f"layers.{i}.post_attention_layernorm.weight"
        if config.sandwich_norms:
            yield ours + "post_attn_norm.weight", norm(after)
            yield ours + "ffn_norm.weight", norm(f"layers.{i}.pre_feedforward_layernorm.weight")
            yield ours + "post_ffn_norm.weight", norm(f"layers.{i}.post_feedforward_layernorm.weight")
        else:
            yield ours + "ffn_norm.weight", norm(after)
