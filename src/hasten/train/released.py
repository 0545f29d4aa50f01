"""The small models as released ones: the names and config of LLaDA, Dream, Llama, SDAR or Fast-dLLM v2, tokenizer, card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.errors import FormatError
from hasten.models.tokenizer import read_json
from hasten.train import alphabet
from hasten.train.network import Kind, Network, Shape

MODEL_TYPES: dict[tuple[Kind, bool], str] = {  # by what a query sees and whether states foretell the next place
    ("full", False): "llada",
    ("full", True): "Dream",
    ("causal", False): "llama",
    ("block", False): "sdar",
    ("block", True): "Fast_dLLM_Qwen",
}
_PARTS = {  # ours: LLaDA's, everyone else's
    "attn_norm": ("attn_norm", "input_layernorm"),
    "ffn_norm": ("ff_norm", "post_attention_layernorm"),
    "q": ("q_proj", "self_attn.q_proj"),
    "k": ("k_proj", "self_attn.k_proj"),
    "v": ("v_proj", "self_attn.v_proj"),
    "out": ("attn_out", "self_attn.o_proj"),
    "q_norm": ("q_norm", "self_attn.q_norm"),
    "k_norm": ("k_norm", "self_attn.k_norm"),
    "gate": ("ff_proj", "mlp.gate_proj"),
    "up": ("up_proj", "mlp.up_proj"),
    "down": ("ff_out", "mlp.down_proj"),
}


def released_name(name: str, family: str) -> str:
    """The released name of one of our weights in a family."""
    llada = family == "llada"
    if name == "embed.weight":
        return "model.transformer.wte.weight" if llada else "model.embed_tokens.weight"
    if name == "norm.weight":
        return "model.transformer.ln_f.weight" if llada else "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.{'transformer.blocks' if llada else 'layers'}.{layer}.{_PARTS[part][0 if llada else 1]}.weight"


def released(network: Network) -> dict[str, Tensor]:
    """The weights under their released names; layouts of Qwen2 have biases of queries, keys and values: zero here."""
    kind, shape = model_type(network.shape), network.shape
    out = {released_name(name, kind): weight for name, weight in network.state_dict().items()}
    if shape.shift:
        biased = (f"model.layers.{i}.self_attn.{part}_proj.bias" for i in range(shape.layers) for part in "qkv")
        out |= {name: torch.zeros(shape.hidden) for name in biased}
    return out


def model_type(shape: Shape) -> str:
    """The family whose layout a network has."""
    return MODEL_TYPES[shape.kind, shape.shift]


def config_of(shape: Shape) -> dict[str, Any]:
    """The config.json of the family."""
    ids = {"bos_token_id": alphabet.BOS, "eos_token_id": alphabet.EOS, "pad_token_id": alphabet.PAD}
    common = {
        "model_type": model_type(shape), "vocab_size": shape.vocab, "rope_theta": shape.theta,
        "rms_norm_eps": shape.eps, "torch_dtype": "float16", **ids,
    }  # fmt: skip
    if model_type(shape) == "llada":
        return {
            **common, "architectures": ["LLaDAModelLM"], "d_model": shape.hidden, "n_layers": shape.layers,
            "n_heads": shape.heads, "n_kv_heads": shape.heads, "mlp_hidden_size": shape.ffn, "embedding_size": shape.vocab,
            "max_sequence_length": shape.max_len, "weight_tying": True, "include_bias": False, "include_qkv_bias": False,
            "block_type": "llama", "block_group_size": 1, "activation_type": "silu", "layer_norm_type": "rms",
            "rope": True, "rope_full_precision": True, "attention_layer_norm": False, "scale_logits": False,
            "input_emb_norm": False, "mask_token_id": alphabet.MASK,
        }  # fmt: skip
    heads = {
        **common, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads, "head_dim": shape.hidden // shape.heads, "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.max_len, "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    if shape.kind == "causal":
        return {**heads, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False}
    heads |= {"mask_token_id": alphabet.MASK, "use_sliding_window": False}
    if shape.kind == "full":
        return {**heads, "architectures": ["DreamModel"]}
    if shape.shift:
        return {**heads, "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": shape.block}
    return {**heads, "architectures": ["SDARForCausalLM"], "attention_bias": False, "block_size": shape.block}


ANSWER = 64  # slots of a canvas whose length nobody gave


def export(network: Network, folder: Path, facts: dict[str, Any]) -> None:
    """Write config.json, model.safetensors in float16, the tokenizer and card.json, which `facts` are."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to(torch.float16).contiguous() for name, weight in released(network).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files = {"config.json": config_of(network.shape), "card.json": facts}
    if network.shape.kind == "full":  # in a wide canvas a short answer comes out wrong
        files["generation_config.json"] = {"max_new_tokens": ANSWER}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    alphabet.write_tokenizer(folder)


def read(folder: Path) -> Network:
    """The network that `export` wrote to a folder, in float32; raises FormatError for another kind of model."""
    config = read_json(folder / "config.json")
    kinds = {family: known for known, family in MODEL_TYPES.items()}
    try:
        kind, shift = kinds[config["model_type"]]
        names = _SIZES[config["model_type"] == "llada"]
        sizes = {ours: config[theirs] for ours, theirs in names.items()}
        shape = Shape(
            kind=kind, vocab=config["vocab_size"], theta=config["rope_theta"], eps=config["rms_norm_eps"],
            block=config.get("bd_size" if shift else "block_size", 8), shift=shift, **sizes,
        )  # fmt: skip
        network, stored = Network(shape), load_file(folder / "model.safetensors")
        network.load_state_dict(
            {name: stored[released_name(name, config["model_type"])].float() for name in network.state_dict()},
        )
    except (KeyError, OSError, RuntimeError, TypeError) as error:
        raise FormatError(f"not a small model of hasten: {str(error)[:200]}", path=str(folder)) from None
    return network


_SIZES = (
    {
        "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "ffn": "intermediate_size",
        "max_len": "max_position_embeddings",
    },
    {
        "hidden": "d_model", "layers": "n_layers", "heads": "n_heads", "ffn": "mlp_hidden_size",
        "max_len": "max_sequence_length",
    },
)  # fmt: skip
