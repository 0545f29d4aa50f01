"""What hasten's own decoder stacks have in common, whichever backbone runs them: what trained drafters build on."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hasten.engine.contracts import Capabilities
from hasten.engine.masks import ALL_VISIBILITIES, CAUSAL, FULL, BlockCausal, Visibility
from hasten.models.config import ModelConfig
from hasten.models.rope import RopeTable


def visibility_of(config: ModelConfig) -> Visibility:
    """What a query saw when the model was trained."""
    if config.kind == "causal":
        return CAUSAL
    return FULL if config.block is None else BlockCausal(config.block)


def capabilities_of(config: ModelConfig, *, hooks: bool) -> Capabilities:
    """What a decoder stack of `config` offers; a cache is exact under rules that never show a key something later."""
    c = config
    exact = {"causal", "tree", "block_causal", "prefix_lm"} if c.kind == "causal" else {"block_causal"} if c.block else ()
    return Capabilities(
        kind=c.kind,
        vocab_size=c.vocab_size,
        max_len=c.max_len,
        layers=len(c.layers),
        hidden=c.hidden,
        visibilities=ALL_VISIBILITIES,
        cache_exact=frozenset(exact),
        hidden_states=True,
        embeds=True,
        hooks=hooks,
        logit_shift=c.logit_shift,
        mask_id=c.mask_id,
        bos_id=c.bos_id,
        eos_ids=c.eos_ids,
        eot_id=c.eot_id,
        block=c.block,
        canvas=c.canvas,
    )


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
