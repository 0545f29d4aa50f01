"""Compressed checkpoints written by a second implementation: whole numbers, one at a time, into words of 32 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

SCALES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "short": torch.float16}


def words(numbers: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of unsigned numbers, the first in the lowest bits."""
    out = []
    for at in range(0, len(numbers), 32 // bits):
        word = sum(number << (bits * i) for i, number in enumerate(numbers[at : at + 32 // bits]))
        out.append(word - 2**32 if word >= 2**31 else word)
    return out


def scheme(bits: int, symmetric: bool, group: int | None, **changes: Any) -> dict[str, Any]:
    """A group of config_groups."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
        "strategy": "channel" if group is None else "group", "group_size": group, "observer": "minmax",
    }  # fmt: skip
    return {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, **changes}


def section(*groups: dict[str, Any], form: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    """A quantization_config with these groups."""
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)}, **changes,
    }  # fmt: skip


def matrix(
    module: str, shape: tuple[int, int], how: dict[str, Any], seed: int = 0, scales: str = "f16",
    form: str = "pack-quantized", down: int = 0,
) -> tuple[dict[str, torch.Tensor], np.ndarray]:  # fmt: skip
    """(stored tensors, values float32) of a random matrix; scales "short" have 7 significant bits; 2^-down smaller."""
    rng = np.random.default_rng(seed)
    (rows, cols), weights = shape, how["weights"]
    bits, group = weights["num_bits"], weights["group_size"] or cols
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (rows, cols))
    zero = (
        np.zeros((rows, cols // group), int) if weights["symmetric"] else rng.integers(-half, half, (rows, cols // group))
    )
    size = 2.0 ** (rng.integers(-9, -3, zero.shape) - down)
    scale = torch.from_numpy(rng.uniform(0.5, 1, zero.shape) * size)
    if scales == "short":
        fraction, exponent = np.frexp(scale.numpy())
        scale = torch.from_numpy(np.ldexp(np.rint(fraction * 128) / 128, exponent))
    scale = scale.to(SCALES[scales])
    wide = np.repeat(scale.double().numpy(), group, 1)
    values = (wide * (codes - np.repeat(zero, group, 1))).astype(np.float32)
    tensors = {"weight_scale": scale}
    if form == "pack-quantized":
        packed = [words([int(one) + half for one in row], bits) for row in codes]
        tensors["weight_packed"] = torch.tensor(packed, dtype=torch.int32)
        tensors["weight_shape"] = torch.tensor([rows, cols])
        if not weights["symmetric"]:
            columns = [words([int(one) + half for one in column], bits) for column in zero.T]
            tensors["weight_zero_point"] = torch.tensor(columns, dtype=torch.int32).T.contiguous()
    else:
        tensors["weight"] = torch.from_numpy(codes.astype(np.int8))
        if not weights["symmetric"]:
            tensors["weight_zero_point"] = torch.from_numpy(zero.astype(np.int8))
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}, values


def write(folder: Path, model: Any, how: dict[str, Any], quantized: dict[str, Any], **options: Any) -> None:
    """Write a transformers model with random matrices in place of its own, and give the model what they stand for."""
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, torch.Tensor] = {}
    named = [target for group in quantized["config_groups"].values() for target in group["targets"]]
    for i, (name, parameter) in enumerate(model.named_parameters()):
        module = name.removesuffix(".weight")
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        if not (inner or module in named):
            stored[name] = parameter.detach().clone()
            continue
        tensors, values = matrix(module, tuple(parameter.shape), how, i, **options)
        stored |= tensors
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = {**json.loads(model.config.to_json_string()), "quantization_config": quantized}
    (folder / "config.json").write_text(json.dumps(config))
