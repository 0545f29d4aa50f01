"""Tiny random masked-diffusion checkpoints under their released names, and a plain computation of each family.

The computations use nothing of hasten or transformers: single functions over a dict of tensors, one sequence at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

LLADA: dict[str, Any] = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 64, "n_layers": 4, "n_heads": 4,
    "n_kv_heads": 4, "mlp_hidden_size": 96, "mlp_ratio": 4, "vocab_size": 300, "embedding_size": 300,
    "max_sequence_length": 128, "rope": True, "rope_theta": 500000.0, "rope_full_precision": True, "alibi": False,
    "rms_norm_eps": 1e-5, "layer_norm_type": "rms", "layer_norm_with_affine": True, "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False, "include_bias": False,
    "include_qkv_bias": False, "weight_tying": False, "scale_logits": False, "input_emb_norm": False,
    "block_type": "llama", "block_group_size": 1, "activation_type": "silu", "multi_query_attention": None,
    "mask_token_id": 290, "pad_token_id": 281, "eos_token_id": 281,
}  # fmt: skip
DREAM: dict[str, Any] = {
    "model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rope_theta": 1000000.0,
    "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "use_mrope": False,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "max_position_embeddings": 131072,
    "mask_token_id": 290, "pad_token_id": 281, "eos_token_id": 281, "bos_token_id": 281,
}  # fmt: skip
SDAR: dict[str, Any] = {
    "model_type": "sdar", "architectures": ["SDARForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 300,
    "rope_theta": 1000000.0, "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None, "max_position_embeddings": 128,
    "mask_token_id": 290, "pad_token_id": 281, "eos_token_id": 281, "block_size": 4, "fuse_cross_entropy": True,
}  # fmt: skip
LLADA2: dict[str, Any] = {
    "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    "rope_theta": 600000, "rope_scaling": None, "partial_rotary_factor": 0.5, "rotary_dim": 8, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "norm_head": False,
    "tie_word_embeddings": False, "max_position_embeddings": 128, "num_experts": 16, "num_experts_per_tok": 3,
    "num_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "score_function": "sigmoid", "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True, "block_size": 8, "mask_token_id": 290, "pad_token_id": 281,
    "eos_token_id": 281,
}  # fmt: skip
FAST: dict[str, Any] = {
    "model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "rope_theta": 1000000.0, "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_dropout": 0.0,
    "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
    "layer_types": ["full_attention"] * 3, "max_position_embeddings": 128, "bd_size": 8, "conplemenrary_mask": True,
    "mask_token_id": 290, "pad_token_id": 281, "eos_token_id": 281, "bos_token_id": 281,
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "llada": LLADA,
    "llada-grouped-query": {**LLADA, "n_kv_heads": 2, "include_qkv_bias": True},
    "llada-nulls": {**LLADA, "n_kv_heads": None, "mlp_hidden_size": None, "mlp_ratio": 2, "embedding_size": None},
    "llada-scaled": {**LLADA, "mlp_ratio": 2.6875, "scale_logits": True, "input_emb_norm": True, "embedding_size": 320},
    "llada-tied-groups": {**LLADA, "weight_tying": True, "block_group_size": 2, "scale_logits": True},
    "llada-normed": {**LLADA, "attention_layer_norm": True, "n_kv_heads": 2},
    "llada-biased": {**LLADA, "include_bias": True, "scale_logits": True, "embedding_size": 320},
    "dream": DREAM,
    "dream-tied": {**DREAM, "tie_word_embeddings": True},
    "sdar": SDAR,
    "sdar-biased": {**SDAR, "attention_bias": True, "block_size": 8},
    "fast": FAST,
    "fast-tied": {**FAST, "tie_word_embeddings": True, "bd_size": 4},
    "llada2": LLADA2,
    "llada2-biased": {**LLADA2, "use_bias": True, "use_qkv_bias": True, "num_shared_experts": 2, "topk_group": 4},
    "llada2-plain": {
        **LLADA2, "use_qk_norm": False, "num_shared_experts": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
        "moe_router_enable_expert_bias": False, "first_k_dense_replace": 0, "tie_word_embeddings": True,
    },
}  # fmt: skip
ON_TORCH = {"llada-normed", "llada-biased", "llada2", "llada2-biased", "llada2-plain"}


SHIFTED = {"Dream", "Fast_dLLM_Qwen"}  # the state at p - 1 predicts the token at p; both have Qwen2's biases


def block_of(c: dict[str, Any]) -> int | None:
    """The width of the blocks of a block-causal family, None for full attention."""
    return c.get("bd_size", c.get("block_size"))


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Released name -> shape of every tensor of a checkpoint."""
    return (_llada_shapes if c["model_type"] == "llada" else _other_shapes)(c)


def _llada_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, rows = c["d_model"], c["embedding_size"] or c["vocab_size"]
    kv = d // c["n_heads"] * (c["n_kv_heads"] or c["n_heads"])
    ffn = c["mlp_hidden_size"] or c["mlp_ratio"] * d
    out = {"model.transformer.wte.weight": (rows, d), "model.transformer.ln_f.weight": (d,)}
    if not c["weight_tying"]:
        out["model.transformer.ff_out.weight"] = (rows, d)
        if c["include_bias"]:
            out["model.transformer.ff_out.bias"] = (rows,)
    for i in range(c["n_layers"]):
        b = llada_block(c, i)
        out |= {b + "attn_norm.weight": (d,), b + "ff_norm.weight": (d,)}
        if c["attention_layer_norm"]:
            out |= {b + "q_norm.weight": (d,), b + "k_norm.weight": (kv,)}
        linear = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "attn_out": (d, d)}
        linear |= {"ff_proj": (ffn, d), "up_proj": (ffn, d), "ff_out": (d, ffn)}
        for name, shape in linear.items():
            out[f"{b}{name}.weight"] = shape
            if c["include_bias"] or (c["include_qkv_bias"] and name in ("q_proj", "k_proj", "v_proj")):
                out[f"{b}{name}.bias"] = shape[:1]
    return out


def llada_block(c: dict[str, Any], i: int) -> str:
    """The beginning of the names of layer `i`."""
    size = c["block_group_size"]
    return f"model.transformer.block_groups.{i // size}.{i % size}." if size > 1 else f"model.transformer.blocks.{i}."


def _other_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, kind = c["hidden_size"], c["model_type"]
    dim = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    moe = kind == "llada2_moe"
    out = {f"model.{'word_embeddings' if moe else 'embed_tokens'}.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], d)

    def gated(at: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{at}gate_proj.weight": (width, d), f"{at}up_proj.weight": (width, d), f"{at}down_proj.weight": (d, width),
        }  # fmt: skip

    for i in range(c["num_hidden_layers"]):
        n, m = f"model.layers.{i}.", f"model.layers.{i}.mlp."
        out |= {f"{n}input_layernorm.weight": (d,), f"{n}post_attention_layernorm.weight": (d,)}
        if moe:
            a = n + "attention."
            out |= {f"{a}query_key_value.weight": (q + 2 * kv, d), f"{a}dense.weight": (d, q)}
            if c["use_qkv_bias"]:
                out[f"{a}query_key_value.bias"] = (q + 2 * kv,)
            if c["use_bias"]:
                out[f"{a}dense.bias"] = (d,)
            if c["use_qk_norm"]:
                out |= {f"{a}query_layernorm.weight": (dim,), f"{a}key_layernorm.weight": (dim,)}
        else:
            a = n + "self_attn."
            linear = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
            for name, shape in linear.items():
                out[f"{a}{name}.weight"] = shape
                if (kind in SHIFTED and name != "o_proj") or c.get("attention_bias"):
                    out[f"{a}{name}.bias"] = shape[:1]
            if kind == "sdar":
                out |= {f"{a}q_norm.weight": (dim,), f"{a}k_norm.weight": (dim,)}
        if not moe or i < c["first_k_dense_replace"]:
            out |= gated(m, c["intermediate_size"])
            continue
        out[f"{m}gate.weight"] = (c["num_experts"], d)
        if c["moe_router_enable_expert_bias"]:
            out[f"{m}gate.expert_bias"] = (c["num_experts"],)
        for j in range(c["num_experts"]):
            out |= gated(f"{m}experts.{j}.", c["moe_intermediate_size"])
        if c["num_shared_experts"]:
            out |= gated(f"{m}shared_experts.", c["num_shared_experts"] * c["moe_intermediate_size"])
    return out


def state(c: dict[str, Any], seed: int = 0) -> State:
    """Random weights that all matter."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(c).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            out[name] = 0.1 * noise
        elif len(shape) == 1:
            out[name] = 1 + 0.1 * noise
        else:
            out[name] = noise * (0.3 if "wte" in name or "embed" in name else shape[1] ** -0.5)
    return out


def write(folder: Path, c: dict[str, Any], weights: State, dtype: torch.dtype = torch.float32) -> None:
    """A model directory: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file({name: one.to(dtype) for name, one in weights.items()}, folder / "model.safetensors")


# --- plain computation ---


def plain(c: dict[str, Any], weights: State, ids: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Logits [T, vocab] of ids [T]; `allowed` bool [T, T], None = every position sees every other."""
    return (_llada if c["model_type"] == "llada" else _other)(c, weights, ids, allowed)


def blocks(t: int, size: int) -> Tensor:
    """bool [T, T]: a position sees its own block and the ones before it."""
    at = torch.arange(t) // size
    return at[None] <= at[:, None]


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, theta: float, part: float = 1.0) -> Tensor:
    """x [heads, T, D], its first `part` of dimensions turned."""
    size = int(x.shape[-1] * part)
    frequency = theta ** -(torch.arange(0, size, 2).float() / size)
    angle = torch.arange(x.shape[1]).float()[:, None] * frequency
    a, b, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """[T, heads * D] of q [heads, T, D] over k, v [kv_heads, T, D]."""
    group = len(q) // len(k)
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * q.shape[-1] ** -0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)


def _heads(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(0, 1)


def _linear(w: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))


def _llada(c: dict[str, Any], w: State, ids: Tensor, allowed: Tensor | None) -> Tensor:
    d, dim, eps, top = c["d_model"], c["d_model"] // c["n_heads"], c["rms_norm_eps"], "model.transformer."
    h = w[top + "wte.weight"][ids]
    if c["input_emb_norm"]:
        h = h * d**0.5
    for i in range(c["n_layers"]):
        b = llada_block(c, i)
        x = _rms(h, w[b + "attn_norm.weight"], eps)
        q, k, v = (_linear(w, f"{b}{name}_proj", x) for name in "qkv")
        if c["attention_layer_norm"]:
            q, k = _rms(q, w[b + "q_norm.weight"], eps), _rms(k, w[b + "k_norm.weight"], eps)
        q, k = (_rotate(_heads(one, dim), c["rope_theta"]) for one in (q, k))
        h = h + _linear(w, b + "attn_out", _attend(q, k, _heads(v, dim), allowed))
        x = _rms(h, w[b + "ff_norm.weight"], eps)
        h = h + _linear(w, b + "ff_out", F.silu(_linear(w, b + "ff_proj", x)) * _linear(w, b + "up_proj", x))
    h = _rms(h, w[top + "ln_f.weight"], eps)
    logits = h @ w[top + "wte.weight"].T if c["weight_tying"] else _linear(w, top + "ff_out", h)
    return (logits * d**-0.5 if c["scale_logits"] else logits)[:, : c["vocab_size"]]


def _other(c: dict[str, Any], w: State, ids: Tensor, allowed: Tensor | None) -> Tensor:
    d, eps, moe, heads = c["hidden_size"], c["rms_norm_eps"], c["model_type"] == "llada2_moe", c["num_attention_heads"]
    dim, kv = c.get("head_dim", d // heads), c["num_key_value_heads"]
    table = w["model.word_embeddings.weight" if moe else "model.embed_tokens.weight"]
    h = table[ids]
    for i in range(c["num_hidden_layers"]):
        n, m = f"model.layers.{i}.", f"model.layers.{i}.mlp."
        x = _rms(h, w[n + "input_layernorm.weight"], eps)
        if moe:
            a, norms, last = n + "attention.", ("query_layernorm", "key_layernorm"), "dense"
            q, k, v = _linear(w, a + "query_key_value", x).split((heads * dim, kv * dim, kv * dim), -1)
        else:
            a, norms, last = n + "self_attn.", ("q_norm", "k_norm"), "o_proj"
            q, k, v = (_linear(w, f"{a}{name}_proj", x) for name in "qkv")
        q, k = _heads(q, dim), _heads(k, dim)
        if f"{a}{norms[0]}.weight" in w:
            q, k = (_rms(one, w[f"{a}{name}.weight"], eps) for one, name in zip((q, k), norms))
        q, k = (_rotate(one, c["rope_theta"], c.get("partial_rotary_factor", 1.0)) for one in (q, k))
        h = h + _linear(w, a + last, _attend(q, k, _heads(v, dim), allowed))
        x = _rms(h, w[n + "post_attention_layernorm.weight"], eps)
        sparse = moe and i >= c["first_k_dense_replace"]
        h = h + (torch.stack([_experts(c, w, m, one) for one in x]) if sparse else _gated(w, m, x))
    h = _rms(h, w["model.norm.weight"], eps)
    return h @ (table if c["tie_word_embeddings"] else w["lm_head.weight"]).T


def _gated(w: State, at: str, x: Tensor) -> Tensor:
    return _linear(w, at + "down_proj", F.silu(_linear(w, at + "gate_proj", x)) * _linear(w, at + "up_proj", x))


def _experts(c: dict[str, Any], w: State, at: str, x: Tensor) -> Tensor:
    """One token x [hidden] through its experts, chosen with sorted Python lists."""
    scores = torch.sigmoid(w[at + "gate.weight"] @ x)
    ranked = scores + w.get(at + "gate.expert_bias", torch.zeros(()))
    size = c["num_experts"] // c["n_group"]
    groups = [list(range(g * size, (g + 1) * size)) for g in range(c["n_group"])]
    worth = [sum(sorted((ranked[j].item() for j in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: -worth[g])[: c["topk_group"]]
    open_ = [j for g in best for j in groups[g]]
    chosen = sorted(open_, key=lambda j: -ranked[j].item())[: c["num_experts_per_tok"]]
    total = sum(scores[j] for j in chosen) if c["norm_topk_prob"] else 1.0
    out = sum(c["routed_scaling_factor"] * scores[j] / total * _gated(w, f"{at}experts.{j}.", x) for j in chosen)
    return out + _gated(w, at + "shared_experts.", x) if c["num_shared_experts"] else out
