"""DiffusionGemma through transformers: what a sampler needs of it, one sequence at a time.

An encoder reads committed text causally and keeps its keys; a decoder of the same weights fills a canvas that sees these
keys and all of itself. There is no mask token: a canvas starts as random ids, and every pass over it may be told the logits
of the pass before (self-conditioning). Which ids stay is the sampler's affair; this file only runs the two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.engine.cache import CachePool
from hasten.engine.contracts import NO_NEEDS, Capabilities, Needs, Pass, RowInput
from hasten.errors import UnsupportedError, out_of_range
from hasten.models.config import AdaptedConfig


@dataclass(slots=True)
class Context:
    """The committed text of one sequence: its `length` in tokens and the model's own keys of it."""

    length: int = 0
    keys: Any = None


class DiffusionGemma:
    """A DiffusionGemma model of transformers. `canvas` is its canvas length in tokens, `pad_id` what follows an end.

    Of the capabilities, `block` is the canvas length and `mask_id` is None. As a Backbone it serves nothing: its two halves
    are no pass over rows, so that the engine's loops refuse it.
    """

    name = "transformers"

    def __init__(self, model: Any) -> None:
        text = model.config.get_text_config()
        self._model = model.eval()
        self.dtype = next(model.parameters()).dtype
        self.canvas: int = model.config.canvas_length
        self.pad_id: int | None = text.pad_token_id
        self.config = AdaptedConfig("diffusion_gemma", model.num_parameters(), text.vocab_size)
        flat: list[Any] = []
        for ends in (text.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
            flat += ends if isinstance(ends, list) else [ends]
        self.capabilities = Capabilities(
            kind="masked",
            vocab_size=text.vocab_size,
            max_len=text.max_position_embeddings,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            visibilities=frozenset(),
            cache_exact=frozenset(),
            truncate=False,
            bos_id=text.bos_token_id,
            eos_ids=tuple(dict.fromkeys(e for e in flat if isinstance(e, int) and 0 <= e < text.vocab_size)),
            block=self.canvas,
        )

    def pack(self) -> DiffusionGemma:
        """Nothing to do: the model keeps its own weights."""
        return self

    def serves(self, rows: Sequence[RowInput], needs: Needs) -> bool:
        """False: see `encode` and `denoise`."""
        return False

    def pool(self, budget_bytes: int) -> CachePool:
        """Raises UnsupportedError: keys live in a Context."""
        raise UnsupportedError("DiffusionGemma keeps its keys itself; use encode and denoise")

    def run(self, rows: Sequence[RowInput], needs: Needs = NO_NEEDS) -> Pass:
        """Raises UnsupportedError."""
        raise UnsupportedError("DiffusionGemma has no single pass over rows; use encode and denoise")

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """Ids [canvas], each equally likely: what a canvas starts as, and what positions that are not kept become."""
        return torch.randint(0, self.capabilities.vocab_size, (self.canvas,), generator=generator)

    @torch.inference_mode()
    def encode(self, context: Context, ids: Tensor) -> None:
        """Append ids [T] to the committed text; raises ConfigError when there are none or they exceed the context."""
        end = context.length + len(ids)
        if not context.length < end <= self.capabilities.max_len:
            raise out_of_range("ids", len(ids), f"1 to {self.capabilities.max_len - context.length} more tokens")
        encoder = self._model.model.encoder
        positions = torch.arange(context.length, end)[None]
        masks = encoder.create_masks_for_generate(
            config=self._model.config,
            inputs_embeds=torch.empty(1, len(ids), 0, dtype=self.dtype),  # only its shape is read
            attention_mask=torch.ones(1, end, dtype=torch.bool),
            past_key_values=context.keys,
            position_ids=positions,
        )
        out = encoder(
            input_ids=ids[None], attention_mask=masks, past_key_values=context.keys, position_ids=positions, use_cache=True
        )
        context.keys, context.length = out.past_key_values, end

    @torch.inference_mode()
    def denoise(self, context: Context, ids: Tensor, before: Tensor | None = None) -> Tensor:
        """float32 logits [canvas, vocab], soft-capped, of a canvas of ids [canvas] behind the committed text.

        `before` [canvas, vocab]: the logits of the last pass as the sampler has processed them, None in the first one. The
        context stays as it is. Raises ConfigError for an empty context or ids of another length.
        """
        if context.keys is None:
            raise out_of_range("context", 0, "at least one encoded token")
        if len(ids) != self.canvas:
            raise out_of_range("ids", len(ids), f"a canvas of {self.canvas} tokens")
        out = self._model(
            decoder_input_ids=ids[None],
            past_key_values=context.keys,
            self_conditioning_logits=None if before is None else before[None].to(self.dtype),
            decoder_position_ids=torch.arange(context.length, context.length + self.canvas)[None],
        )
        logits: Tensor = out.logits[0]
        return logits
