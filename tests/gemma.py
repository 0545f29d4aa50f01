"""A tiny random DiffusionGemma on disk, with every kind of layer the released one has, and a tokenizer of single letters."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
    pytest.skip("this transformers has no DiffusionGemma", allow_module_level=True)

VOCAB, CANVAS = 60, 8


def build() -> Any:
    """A tiny model with every kind of layer the released one has: sliding, full, experts."""
    text = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], max_position_embeddings=128,
        num_experts=4, top_k_experts=2, moe_intermediate_size=24, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS, image_token_id=59, boi_token_id=58, eoi_token_id=57
    )
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(noise * (1.0 if "embed_tokens" in name else p.shape[-1] ** -0.5))
    return model


def write(folder: Path) -> Path:
    """The model in `folder`, with its tokenizer: pad 0, end 1, begin 2, then one id per letter."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    build().save_pretrained(folder)
    letters = ["<pad>", "<eos>", "<bos>", *string.ascii_letters, "\u0120", *".,:;"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in letters[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder
