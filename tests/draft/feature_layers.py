"""Draft layers for tests: random or briefly trained ones over tiny targets, written as files like those of `hasten train`."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from hasten.engine.contracts import MethodContext
from hasten.models.feature import FeatureModel, identity
from hasten.models.transformer import Transformer


def layer(kind: str, target: Transformer, seed: int = 0, ffn: int = 40, kept: int | None = None) -> FeatureModel:
    """A random layer over the first `kept` ids (default all)."""
    ids = torch.arange(tiny.VOCAB if kept is None else kept)
    return FeatureModel(kind, target, ids, ffn).reset(seed)


def saved(folder: Path, kind: str, target: Transformer, **options: int) -> Path:
    """A file with a random layer for `target`."""
    path = folder / f"{kind}.safetensors"
    layer(kind, target, **options).save(path, identity(target, ""), {"steps": 0})
    return path


def context(engine) -> MethodContext:
    return MethodContext("tiny", engine.backbone)
