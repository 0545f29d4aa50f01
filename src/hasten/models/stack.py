"""What hasten's own decoder stacks have in common, whichever backbone runs them: what trained drafters build on."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hasten.models.config import ModelConfig
from hasten.models.rope import RopeTable


class DecoderStack(ABC):
    """A decoder stack of `config`: its sizes, and the weights at its two ends. `dtype` is that of its hidden states."""

    config: ModelConfig
    dtype: torch.dtype
    ropes: list[RopeTable]

    @abstractmethod
    def embed_rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), hidden] of the input embedding as stored."""

    @abstractmethod
    def output_rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), hidden] of the output layer."""

    @abstractmethod
    def embeddings(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of token ids, scaled as the model scales them."""
