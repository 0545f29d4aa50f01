"""Masked-diffusion families: their special tokens, and the two whose configs and weights have names of their own.

Dream and Fast-dLLM v2 have the names and config of Qwen2, SDAR those of Qwen3 (models/families.py). LLaDA has OLMo's, and
LLaDA-2 its own. `max_len` is what config.json says; for Dream that is 131072, while 2048 is documented.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hasten.errors import UnsupportedError, out_of_range
from hasten.models.checkpoint import Named
from hasten.models.config import Experts, Layer, ModelConfig, Rope
from hasten.models.fields import Fields
from hasten.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Released:
    """What holds for the released models of a family where config.json and the tokenizer say nothing.

    `mask` and `eot` are ids, `turn_end` is the text of the token that ends a turn, `block` the default block size and
    `block_field` what config.json calls it. Blocks are counted from position 0 in every family, through the prompt too.
    """

    mask: int
    turn_end: str
    eot: int | None = None
    shift: int = 0
    block: int | None = None
    block_field: str = "block_size"


MASKED = {
    "llada": Released(126336, "<|eot_id|>", 126348),
    "Dream": Released(151666, "<|im_end|>", 151645, shift=1),
    "sdar": Released(151669, "<|im_end|>", 151645, block=4),
    "llada2_moe": Released(156895, "<|role_end|>", block=32),
    "Fast_dLLM_Qwen": Released(151665, "<|im_end|>", 151645, shift=1, block=32, block_field="bd_size"),
}


def facts(kind: str, f: Fields, vocab: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The fields of ModelConfig that only masked models have.

    The mask token is the config's `mask_token_id`, else the tokenizer's, else the released one. The token that ends a turn
    is the tokenizer's; without a tokenizer the released one, where the vocabulary has it. Raises ConfigError for a
    `max_new_tokens` (of generation_config.json: the length of an answer) below 1.
    """
    released = MASKED[kind]
    mask = f.one_id("mask_token_id")
    if mask is None and tokenizer is not None:
        mask = tokenizer.mask_id
    mask = released.mask if mask is None else mask
    if tokenizer is not None:
        eot = tokenizer.special_id(released.turn_end)
    else:
        eot = released.eot
    block = None if released.block is None else f.integer(released.block_field, released.block)
    canvas = None if f.config.get("max_new_tokens") is None else f.integer("max_new_tokens")
    if canvas is not None and canvas < 1:
        raise out_of_range("max_new_tokens", canvas, "at least 1")
    return {
        "kind": "masked",
        "mask_id": mask,
        "eot_id": eot if eot is not None and eot < vocab and eot != mask else None,
        "logit_shift": released.shift,
        "block": block,
        "canvas": canvas,
    }


# --- LLaDA ---


def _llada_config(f: Fields, tokenizer: Tokenizer | None) -> ModelConfig:
    """Absent fields have the values of the released models, not those of the configuration class (a GPT-2)."""
    for name, allowed in (
        ("block_type", "llama"),
        ("layer_norm_type", "rms"),
        ("layer_norm_with_affine", True),
        ("activation_type", "silu"),
        ("rope", True),
        ("alibi", False),
    ):
        f.only(name, allowed)
    hidden, heads = f.integer("d_model"), f.integer("n_heads")
    if hidden < 1:
        raise out_of_range("d_model", hidden, "at least 1")
    if heads < 1 or hidden % heads:
        raise out_of_range("n_heads", heads, f"a divisor of d_model = {hidden}")
    bias, whole = f.flag("include_bias", False), f.flag("attention_layer_norm", False)
    if f.flag("bias_for_layer_norm", bias):
        raise UnsupportedError(
            "config: norms with a bias (bias_for_layer_norm) are not supported", field="bias_for_layer_norm"
        )
    if whole:
        f.only("attention_layer_norm_with_affine", True)
    vocab = f.integer("vocab_size")
    rows = f.integer("embedding_size", vocab)
    if rows < vocab:
        raise out_of_range("embedding_size", rows, f"at least vocab_size = {vocab}")
    count = f.integer("n_layers")
    if not 1 <= count <= 1024:
        raise out_of_range("n_layers", count, "in [1, 1024]")
    group = f.integer("block_group_size", 1)
    if group < 1 or count % group:
        raise out_of_range("block_group_size", group, f"a divisor of n_layers = {count}")
    tied = f.flag("weight_tying", False)
    if f.config.get("mlp_hidden_size") is None:
        ffn = f.integer("mlp_ratio", 4) * hidden
    else:
        ffn = f.integer("mlp_hidden_size")
    return ModelConfig(
        family="llada",
        vocab_size=vocab,
        hidden=hidden,
        heads=heads,
        kv_heads=f.integer("n_kv_heads", 1 if f.flag("multi_query_attention", False) else heads),
        head_dim=hidden // heads,
        ffn=ffn,
        max_len=f.integer("max_sequence_length"),
        layers=(Layer(),) * count,
        ropes=(Rope(theta=f.number("rope_theta")),),
        norm_eps=f.number("rms_norm_eps", 1e-5),
        qkv_bias=bias or f.flag("include_qkv_bias", False),
        out_bias=bias,
        ffn_bias=bias,
        tied=tied,
        embed_scale=hidden**0.5 if f.flag("input_emb_norm", False) else 1.0,
        bos_id=f.one_id("bos_token_id"),
        eos_ids=f.ids("eos_token_id"),
        pad_id=f.one_id("pad_token_id"),
        qk_norm_whole=whole,
        head_bias=bias and not tied,
        logit_scale=hidden**-0.5 if f.flag("scale_logits", False) else 1.0,
        **facts("llada", f, vocab, tokenizer),
    )


_GROUPED = re.compile(r"transformer\.block_groups\.(\d+)\.(\d+)\.attn_norm\.weight")


def _llada_blocks(config: ModelConfig, stored: Named) -> list[str]:
    """The beginning of the names of every layer; `block_group_size` above 1 puts them into groups."""
    found = sorted((int(m[1]), int(m[2])) for m in map(_GROUPED.fullmatch, stored.names) if m)
    count = len(config.layers)
    if len(found) == count:
        return [f"transformer.block_groups.{group}.{i}." for group, i in found]
    return [f"transformer.blocks.{i}." for i in range(count)]


def _llada_state(config: ModelConfig, stored: Named) -> Iterator[tuple[str, Tensor]]:
    """Our parameters from OLMo's names; the rows with which embeddings are padded beyond the vocabulary are dropped."""
    take, fuse, vocab = stored.take, stored.fuse, config.vocab_size
    yield "embed.weight", take("transformer.wte.weight")[:vocab]
    yield "norm.weight", take("transformer.ln_f.weight")
    if config.tied:
        stored.skip("transformer.ff_out.weight")
    else:
        yield "head.weight", take("transformer.ff_out.weight")[:vocab]
    if config.head_bias:
        yield "head.bias", take("transformer.ff_out.bias")[:vocab]
    for b, i in zip(_llada_blocks(config, stored), range(len(config.layers)), strict=True):
        ours = f"layers.{i}."
        yield ours + "attn_norm.weight", take(b + "attn_norm.weight")
        yield ours + "qkv.weight", fuse(*(f"{b}{p}_proj.weight" for p in "qkv"))
        if config.qkv_bias:
            yield ours + "qkv.bias", fuse(*(f"{b}{p}_proj.bias" for p in "qkv"))
        if config.qk_norm_whole:
            yield ours + "q_norm.weight", take(b + "q_norm.weight")
            yield ours + "k_norm.weight", take(b + "k_norm.weight")
        yield ours + "out.weight", take(b + "attn_out.weight")
        yield ours + "ffn_norm.weight", take(b + "ff_norm.weight")
        yield ours + "gate_up.weight", fuse(b + "ff_proj.weight", b + "up_proj.weight")
        yield ours + "down.weight", take(b + "ff_out.weight")
        if config.out_bias:
            yield ours + "out.bias", take(b + "attn_out.bias")
        if config.ffn_bias:
            yield ours + "gate_up.bias", fuse(b + "ff_proj.bias", b + "up_proj.bias")
            yield ours + "down.bias", take(b + "ff_out.bias")


# --- LLaDA-2: a mixture of experts ---


def _llada2_config(f: Fields, tokenizer: Tokenizer | None) -> ModelConfig:
    for name, allowed in (("score_function", "sigmoid"), ("norm_head", False), ("use_sliding_window", False)):
        f.only(name, allowed)
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if heads < 1:
        raise out_of_range("num_attention_heads", heads, "at least 1")
    vocab, count = f.integer("vocab_size"), f.integer("num_hidden_layers")
    if not 1 <= count <= 1024:
        raise out_of_range("num_hidden_layers", count, "in [1, 1024]")
    experts = None
    if f.config.get("num_experts") is not None:
        width = f.integer("moe_intermediate_size")
        experts = Experts(
            count=f.integer("num_experts"),
            active=f.integer("num_experts_per_tok", 2),
            width=width,
            shared=width * f.integer("num_shared_experts", 0),
            first=f.integer("first_k_dense_replace", 0),
            groups=f.integer("n_group", 8),
            active_groups=f.integer("topk_group", 4),
            scale=f.number("routed_scaling_factor", 2.5),
            normalised=f.flag("norm_topk_prob", True),
            biased=f.flag("moe_router_enable_expert_bias", True),
        )
    return ModelConfig(
        family="llada2_moe",
        vocab_size=vocab,
        hidden=hidden,
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", 0) or heads,
        head_dim=f.integer("head_dim", hidden // heads),
        ffn=f.integer("intermediate_size", experts.width if experts is not None and experts.first == 0 else None),
        max_len=f.integer("max_position_embeddings", 16384),
        layers=(Layer(),) * count,
        ropes=(f.rope(f.section("rope_parameters") or f.section("rope_scaling"), None, 0.5),),
        norm_eps=f.number("rms_norm_eps"),
        qk_norm=f.flag("use_qk_norm", True),
        qkv_bias=f.flag("use_qkv_bias", False),
        out_bias=f.flag("use_bias", True),
        activation=f.activation("hidden_act", f.config.get("hidden_act") or "silu"),
        tied=f.flag("tie_word_embeddings", False),
        bos_id=f.one_id("bos_token_id"),
        eos_ids=f.ids("eos_token_id"),
        pad_id=f.one_id("pad_token_id"),
        experts=experts,
        **facts("llada2_moe", f, vocab, tokenizer),
    )


def _llada2_state(config: ModelConfig, stored: Named) -> Iterator[tuple[str, Tensor]]:
    take, fuse, e = stored.take, stored.fuse, config.experts
    yield "embed.weight", take("word_embeddings.weight")
    yield "norm.weight", take("norm.weight")
    if config.tied:
        stored.skip("lm_head.weight")
    else:
        yield "head.weight", take("lm_head.weight")
    for i in range(len(config.layers)):
        ours, a, m = f"layers.{i}.", f"layers.{i}.attention.", f"layers.{i}.mlp."
        yield ours + "attn_norm.weight", take(ours + "input_layernorm.weight")
        yield ours + "qkv.weight", take(a + "query_key_value.weight")
        if config.qkv_bias:
            yield ours + "qkv.bias", take(a + "query_key_value.bias")
        if config.qk_norm:
            yield ours + "q_norm.weight", take(a + "query_layernorm.weight")
            yield ours + "k_norm.weight", take(a + "key_layernorm.weight")
        yield ours + "out.weight", take(a + "dense.weight")
        if config.out_bias:
            yield ours + "out.bias", take(a + "dense.bias")
        yield ours + "ffn_norm.weight", take(ours + "post_attention_layernorm.weight")
        if e is None or i < e.first:
            yield ours + "gate_up.weight", fuse(m + "gate_proj.weight", m + "up_proj.weight")
            yield ours + "down.weight", take(m + "down_proj.weight")
            continue
        x, one = ours + "experts.", [f"{m}experts.{j}." for j in range(e.count)]
        yield x + "router", take(m + "gate.weight")
        if e.biased:
            yield x + "bias", take(m + "gate.expert_bias")
        yield x + "gate_up", stored.stack([(b + "gate_proj.weight", b + "up_proj.weight") for b in one])
        yield x + "down", stored.stack([(b + "down_proj.weight",) for b in one])
        if e.shared:
            s = m + "shared_experts."
            yield x + "shared.gate_up.weight", fuse(s + "gate_proj.weight", s + "up_proj.weight")
            yield x + "shared.down.weight", take(s + "down_proj.weight")


@dataclass(frozen=True, slots=True)
class OwnNames:
    """A family whose fields and weights are not called as Llama's are."""

    config: Callable[[Fields, Tokenizer | None], ModelConfig]
    state: Callable[[ModelConfig, Named], Iterator[tuple[str, Tensor]]]


OWN_NAMES = {"llada": OwnNames(_llada_config, _llada_state), "llada2_moe": OwnNames(_llada2_config, _llada2_state)}
