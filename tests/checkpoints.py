"""Tiny randomly initialised transformers checkpoints: every family, every arithmetic variant it can carry."""

from __future__ import annotations

from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-biased": (
        "LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32}}),
    "llama-linear-rope": (
        "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 5}),
    "smollm3-windows": (
        "SmolLM3Config", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "mistral-full": ("MistralConfig", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "qwen3-biased": ("Qwen3Config", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 6}),
    "gemma3": (
        "Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "num_hidden_layers": 7},
    ),
    "gemma3-linear-rope": (
        "Gemma3TextConfig", {
            "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 6, "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}  # fmt: skip
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {}),
    "stablelm": ("StableLmConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 6}),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model of the named variant whose every weight is random and matters."""
    kind, extra = {**VARIANTS, **ADAPTED}[name]
    config = getattr(transformers, kind)(**{**BASE, **extra, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    offset = config.model_type.startswith("gemma")
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.1 * noise + (0 if offset or parameter_name.endswith("bias") else 1))
            else:
                p.copy_(noise * (0.3 if "embed" in parameter_name else p.shape[1] ** -0.5))
    return model


def ids(rows: int, length: int, vocab: int = 300, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
