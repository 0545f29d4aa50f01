"""GGUF files written from transformers models, and block formats read back by a second implementation of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_ARCH = {"gemma3_text": "gemma3"}
_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def _half(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _nibbles(b: np.ndarray) -> np.ndarray:
    return np.concatenate([b & 15, b >> 4], 1)


def _bits(b: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(b), axis=1, bitorder="little") << 4


def _scales(b: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    low, high = range(4), range(4, 8)
    scale = [b[:, j] & 63 for j in low] + [(b[:, j + 4] & 15) | ((b[:, j - 4] >> 6) << 4) for j in high]
    least = [b[:, j + 4] & 63 for j in low] + [(b[:, j + 4] >> 4) | ((b[:, j] >> 6) << 4) for j in high]
    return scale, least


def _k_blocks(b: np.ndarray, quants: np.ndarray, fifth: np.ndarray | None) -> np.ndarray:
    d, dmin = _half(b[:, :2]), _half(b[:, 2:4])
    scale, least = _scales(b[:, 4:16])
    out = []
    for j in range(8):
        q = quants[:, 32 * (j // 2) : 32 * (j // 2) + 32] >> (4 * (j % 2)) & 15
        if fifth is not None:
            q = q | ((fifth >> j & 1) << 4)
        out.append(d * scale[j][:, None].astype(np.float32) * q - dmin * least[j][:, None].astype(np.float32))
    return np.concatenate(out, 1)


def _q6_k(b: np.ndarray) -> np.ndarray:
    d, scale = _half(b[:, 208:210]), b[:, 192:208].view(np.int8).astype(np.float32)
    out = []
    for half in range(2):
        ql, qh = b[:, 64 * half : 64 * half + 64], b[:, 128 + 32 * half : 160 + 32 * half]
        for part in range(4):
            low = ql[:, 32 * (part % 2) : 32 * (part % 2) + 32] >> (4 * (part // 2)) & 15
            q = (low | ((qh >> (2 * part) & 3) << 4)).astype(np.float32) - 32
            out.append(d * np.repeat(scale[:, 8 * half + 2 * part : 8 * half + 2 * part + 2], 16, axis=1) * q)
    return np.concatenate(out, 1)


DECODERS = {
    "Q8_0": lambda b: _half(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32),
    "Q4_0": lambda b: _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8),
    "Q4_1": lambda b: _half(b[:, :2]) * _nibbles(b[:, 4:]) + _half(b[:, 2:4]),
    "Q5_0": lambda b: _half(b[:, :2]) * ((_nibbles(b[:, 6:]) | _bits(b[:, 2:6])).astype(np.float32) - 16),
    "Q5_1": lambda b: _half(b[:, :2]) * (_nibbles(b[:, 8:]) | _bits(b[:, 4:8])) + _half(b[:, 2:4]),
    "Q4_K": lambda b: _k_blocks(b, b[:, 16:144], None),
    "Q5_K": lambda b: _k_blocks(b, b[:, 48:176], b[:, 16:48]),
    "Q6_K": _q6_k,
}


def _random_k(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Random bytes with sane scales: every bit of the K formats is exercised, which no quantiser would do."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    b = rng.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    spread = shape[-1] ** -0.5 * rng.uniform(0.5, 1.5, len(b))
    if kind == "Q6_K":
        b[:, 208:210] = (spread / 1300).astype("<f2")[:, None].view(np.uint8)
    else:
        middle = 7.5 if kind == "Q4_K" else 15.5
        b[:, :2] = (spread / 30 / middle).astype("<f2")[:, None].view(np.uint8)
        b[:, 2:4] = (spread / 30).astype("<f2")[:, None].view(np.uint8)
    return b.reshape(*shape[:-1], -1)


def encode(values: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(stored array, the float32 values it stands for); K formats ignore `values` and store random blocks."""
    if kind == "F32":
        return values, values
    if kind == "F16":
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        narrow = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return narrow.view(torch.uint8).numpy(), narrow.float().numpy()
    form = gguf.GGMLQuantizationType[kind]
    raw = _random_k(values.shape, kind, rng) if kind.endswith("K") else gguf.quants.quantize(values, form)
    size = gguf.GGML_QUANT_SIZES[form][1]
    return raw, DECODERS[kind](raw.reshape(-1, size)).reshape(values.shape).astype(np.float32)


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama q or k projection as GGUF files order them."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def halves(values: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    return values.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def vocabulary(size: int) -> tuple[list[str], list[int]]:
    """(tokens, types) of a byte-level vocabulary: all bytes, one merge, one control token, and filler."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    tokens = ["<|pad|>", "<|start|>", "<|endoftext|>", *letters, "th"]
    tokens += [f"filler{i}" for i in range(size - len(tokens))]
    return tokens[:size], ([3, 3, 3] + [1] * size)[:size]


def write(path: Path, model: Any, kind: str = "F32", **extra: Any) -> None:
    """Write `model` with matrices of this kind, and set its own matrices to what the file stands for."""
    c = model.config
    arch = _ARCH.get(c.model_type, c.model_type)
    gemma = arch.startswith("gemma")
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    w = gguf.GGUFWriter(str(path), arch)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_dimension_count(head_dim)
    if gemma:
        w.add_sliding_window(c.sliding_window)
    if arch == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)
    tokens, types = vocabulary(c.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(["t h"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    for key, value in extra.items():
        w.add_string(key.replace("__", "."), value)
    if rope.get("rope_type") == "llama3":
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        w.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            w_name = _name(name, gemma)
            values = p.numpy()
            if values.ndim == 1:
                offset = np.float32(1 if gemma and "norm" in name else 0)
                w.add_tensor(w_name, values + offset)
                continue
            turned = arch in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name)
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            raw, exact = encode(interleave(values, heads) if turned else values.copy(), kind, rng)
            form = gguf.GGMLQuantizationType[kind]
            w.add_tensor(w_name, raw, raw_dtype=None if kind in ("F32", "F16") else form)
            p.copy_(torch.from_numpy(np.ascontiguousarray(halves(exact, heads) if turned else exact)))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def _name(name: str, gemma: bool) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}  # fmt: skip
    if name in top:
        return top[name]
    _, _, index, rest = name.split(".", 3)
    part, _, leaf = rest.rpartition(".")
    return f"blk.{index}.{({**_NAMES, **_SANDWICH} if gemma else _NAMES)[part]}.{leaf}"
