"""DiffusionGemma through transformers: a Backbone of two halves, one sequence at a time.

An encoder reads committed text causally and keeps its keys; a decoder of the same weights fills a canvas that sees these
keys and all of itself. There is no mask token: a canvas starts as random ids, and every pass over it may be told the logits
of the pass before (self-conditioning). Which ids stay is the sampler's affair (hasten.unmask.diffusion_gemma).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.engine.cache import CacheLayout, CachePool, RowCache
from hasten.engine.contracts import NO_NEEDS, Capabilities, Needs, Pass, RowInput
from hasten.engine.masks import FULL
from hasten.errors import UnsupportedError, out_of_range
from hasten.models.config import AdaptedConfig


@dataclass(slots=True)
class Context:
    """The committed text of one sequence, as a LayerCache: its `length` in tokens and the model's own keys of it.

    `read` is this text with what the last pass has read behind it, until that is committed.
    """

    length: int = 0
    keys: Any = None
    read: Context | None = None
    kind = "kv"

    def advance(self, tokens: int) -> None:
        """Commit the `tokens` that the last pass has read."""
        read, self.read = self.read, None
        if tokens:
            if read is None or read.length != self.length + tokens:
                raise out_of_range("tokens", tokens, "what the last pass has read")
            self.length, self.keys = read.length, read.keys

    def truncate(self, length: int) -> None:
        """Forget everything; raises UnsupportedError for a cut inside the text, since layers with a window drop keys."""
        if 0 < length < self.length:
            raise UnsupportedError("DiffusionGemma's keys cannot be cut, only forgotten")
        if length < self.length:
            self.length, self.keys, self.read = 0, None, None

    def gather(self, base: int, slots: Sequence[int]) -> None:
        """Raises UnsupportedError: nothing is drafted."""
        raise UnsupportedError("DiffusionGemma's keys cannot be put in another order")

    def fork(self) -> Context:
        """A copy; the model never writes into keys, it makes new ones of old and new."""
        keys = copy.copy(self.keys)
        if keys is not None:
            keys.layers = [copy.copy(layer) for layer in keys.layers]
        return Context(self.length, keys)

    def snapshot(self) -> Context:
        """The state as a value."""
        return self.fork()

    def restore(self, snapshot: Context) -> None:
        """Return to a snapshot."""
        self.length, self.keys, self.read = snapshot.length, snapshot.fork().keys, None

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        layers = [] if self.keys is None else self.keys.layers
        return sum(part.nbytes for layer in layers for part in (layer.keys, layer.values) if part is not None)


class _Contexts(CachePool):
    """Rows with a Context each. Their slabs only count memory: they are as large as the model's keys and never touched."""

    def open(self, slots: int, more: int = 0) -> RowCache:
        row = super().open(slots, more)
        row.others = {0: Context()}
        return row


class DiffusionGemma:
    """A DiffusionGemma model of transformers. `canvas` is its canvas length in tokens, `pad_id` what follows an end.

    Of the capabilities, `block` is the canvas length and `mask_id` is None. `sampler` holds what the checkpoint's
    generation_config.json sets of its sampler, by hasten's names.
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
            visibilities=frozenset({"full"}),
            cache_exact=frozenset(),
            truncate=False,
            self_conditioning=True,
            bos_id=text.bos_token_id,
            eos_ids=tuple(dict.fromkeys(e for e in flat if isinstance(e, int) and 0 <= e < text.vocab_size)),
            block=self.canvas,
        )
        layers = model.model.decoder.layers
        numbers = sum(layer.self_attn.k_proj.out_features for layer in layers)  # values are as many as keys in every layer
        self._layout = CacheLayout(1, 1, numbers, self.dtype)
        self.sampler = _sampler(model.generation_config)

    def pack(self) -> DiffusionGemma:
        """Nothing to do: the model keeps its own weights."""
        return self

    def serves(self, rows: Sequence[RowInput], needs: Needs) -> bool:
        """Whole canvases behind the keys of their own row, for logits of the canvas alone."""
        return needs == NO_NEEDS and all(
            row.cache is not None
            and row.visibility == FULL
            and all(part is None for part in (row.hooks, row.embeds, row.pseudo))
            and row.queries >= self.canvas
            and min(row.wanted(), default=0) >= row.queries - self.canvas
            for row in rows
        )

    def pool(self, budget_bytes: int) -> CachePool:
        """A pool of row caches for this model; see CachePool."""
        return _Contexts(self._layout, budget_bytes)

    def run(self, rows: Sequence[RowInput], needs: Needs = NO_NEEDS) -> Pass:
        """One pass per row, joined; see Backbone. The last `canvas` queries of a row are its canvas, and those before it
        are text that has become final since its last pass, which the encoder reads first.

        Raises UnsupportedError for rows it does not serve.
        """
        if not self.serves(rows, needs):
            raise UnsupportedError("DiffusionGemma computes whole canvases and nothing else")
        logits: list[Tensor] = []
        starts: list[int] = []
        spans: list[tuple[int, int]] = []
        for row in rows:
            starts.append(sum(len(block) for block in logits))
            at = spans[-1][1] if spans else 0
            spans.append((at, at + row.queries))
            logits.append(self._one(row))
        joined = torch.cat(logits) if logits else torch.empty(0, self.capabilities.vocab_size)
        return Pass(joined, tuple(starts), tuple(spans))

    def _one(self, row: RowInput) -> Tensor:
        """Logits of the wanted queries of one row; what was read waits in its Context until the row is advanced."""
        cache, text = row.cache, row.queries - self.canvas
        if cache is None or not isinstance(context := cache.others.get(0), Context):
            raise UnsupportedError("DiffusionGemma runs over caches of its own pool")
        cache.reserve(context.length, row.positions)
        if text:
            context.read = context.fork()
            self.encode(context.read, row.tokens[:text])
        logits = self.denoise(context.read if text and context.read else context, row.tokens[text:], row.before)
        return logits[torch.tensor(list(row.wanted()), dtype=torch.long) - text].float()

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


def _sampler(generation: Any) -> Mapping[str, float]:
    """What a generation config sets of the sampler; what it leaves open is not there."""
    found = {
        "steps": getattr(generation, "max_denoising_steps", None),
        "bound": getattr(getattr(generation, "sampler_config", None), "entropy_bound", None),
        "t_min": getattr(generation, "t_min", None),
        "t_max": getattr(generation, "t_max", None),
        "stability": getattr(generation, "stability_threshold", None),
        "confidence": getattr(generation, "confidence_threshold", None),
    }
    return {name: value for name, value in found.items() if value is not None}
