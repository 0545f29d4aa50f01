"""Any transformers causal model behind the Backbone contract: its layers, our attention, our cache.

The model is run with an attention function of ours, so that keys and values live in the engine's slabs and every
visibility rule is honoured; the model's own cache is never used. A probe at load compares one pass with the model's own
attention and refuses a model it does not reproduce. Code that ships with a checkpoint is never executed: only classes
of the installed transformers are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine.cache import CacheLayout, CachePool
from hasten.engine.contracts import NO_NEEDS, Capabilities, Needs, Pass, RowInput
from hasten.engine.masks import ALL_VISIBILITIES, at_layer, mask
from hasten.errors import FormatError, HastenError, MissingExtraError, UnsupportedError
from hasten.models.config import AdaptedConfig
from hasten.models.diffusion_gemma import DiffusionGemma

_ATTENTION = "hasten"
CANVASES = {"diffusion_gemma": "DiffusionGemmaForBlockDiffusion"}  # models that fill canvases with their own attention
_KINDS = {"full_attention", "sliding_attention"}


@dataclass(slots=True)
class _RowPass:
    """The row that is being run: where its keys go, what it may see, and the shapes attention was asked with."""

    row: RowInput
    start: int
    visible: int
    windows: Sequence[int | None]
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    shapes: list[tuple[int, int]] = field(default_factory=list)  # (kv heads, head dim) of each call

    def mask_at(self, layer: int, window: int | None) -> Tensor | None:
        """The mask [T, S] of `layer`."""
        visibility = at_layer(self.row.visibility, layer)
        key = (id(visibility), window)
        if key not in self.masks:
            cache = self.row.cache
            keys = self.row.positions if cache is None else cache.positions[: self.visible]
            self.masks[key] = mask(visibility, self.row.positions, keys, self.start, window)
        return self.masks[key]


_NOW: ContextVar[_RowPass | None] = ContextVar("hasten_row_pass", default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [1, heads, T, D] over the row's slab, in the form transformers calls it; [1, T, heads, D]."""
    now = _NOW.get()
    layer = getattr(module, "layer_idx", None)
    if now is None or layer is None:
        raise UnsupportedError("this model's attention cannot be placed in the layer loop")
    if kwargs.get("s_aux") is not None or attention_mask is not None:
        raise UnsupportedError("this model adds sinks or biases of its own to attention scores")
    keys, values = key[0], value[0]
    if keys.shape != values.shape:
        raise UnsupportedError("this model's keys and values differ in shape")
    now.shapes.append((keys.shape[0], keys.shape[2]))
    cache = now.row.cache
    if cache is not None:
        slab_k, slab_v = cache.layers[layer]
        end = now.start + keys.shape[1]
        slab_k[:, now.start : end].copy_(keys)
        slab_v[:, now.start : end].copy_(values)
        keys, values = slab_k[:, : now.visible], slab_v[:, : now.visible]
    allowed = now.mask_at(layer, sliding_window or now.windows[layer])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None:
        mixed = F.scaled_dot_product_attention(
            query, keys[None], values[None], attn_mask=allowed, scale=scale, enable_gqa=True
        )
        return mixed.transpose(1, 2), None
    group = query.shape[1] // keys.shape[0]
    scores = query[0].float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    out = scores.softmax(-1).to(values.dtype) @ values.repeat_interleave(group, 0)
    return out.transpose(0, 1)[None], None


class HFBackbone:
    """A transformers causal model as a Backbone named "transformers"; rows run one after another.

    Serves every visibility and hidden states entering a layer; neither hooks nor input embeddings.
    """

    name = "transformers"

    def __init__(self, model: Any) -> None:
        text = model.config.get_text_config()
        layers = text.num_hidden_layers
        kinds = getattr(text, "layer_types", None)
        if kinds is not None and not set(kinds) <= _KINDS:
            raise UnsupportedError(f"model type {text.model_type!r} has layers other than full and sliding attention")
        self._model = model.eval()
        self.dtype = next(model.parameters()).dtype
        window = getattr(text, "sliding_window", None)
        self._windows = [window if kinds and kinds[i] == "sliding_attention" else None for i in range(layers)]
        self.config = AdaptedConfig(text.model_type, model.num_parameters(), text.vocab_size)
        ends = [model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)]
        flat = [e for end in ends for e in (end if isinstance(end, list) else [end]) if isinstance(e, int)]
        self.capabilities = Capabilities(
            kind="causal",
            vocab_size=text.vocab_size,
            max_len=getattr(text, "max_position_embeddings", None) or 2048,
            layers=layers,
            hidden=text.hidden_size,
            visibilities=ALL_VISIBILITIES,
            cache_exact=frozenset({"causal", "tree", "block_causal", "prefix_lm"}),
            hidden_states=True,
            bos_id=text.bos_token_id if isinstance(text.bos_token_id, int) else None,
            eos_ids=tuple(dict.fromkeys(e for e in flat if 0 <= e < text.vocab_size)),
        )
        self._layout = CacheLayout(layers, 0, 0, self.dtype)
        self._probe()

    def pack(self) -> HFBackbone:
        """Nothing to do: the model keeps its own weights."""
        return self

    def pool(self, budget_bytes: int) -> CachePool:
        """A pool of row caches for this model; see CachePool."""
        return CachePool(self._layout, budget_bytes)

    def serves(self, rows: Sequence[RowInput], needs: Needs) -> bool:
        """Tokens without hooks; hidden states entering a layer and after the final norm, not between the two."""
        plain = all(row.hooks is None and row.embeds is None and row.pseudo is None for row in rows)
        inner = all(0 <= i < self.capabilities.layers for i in needs.hidden)
        return plain and inner and not needs.embeds and needs.pseudo is None

    @torch.inference_mode()
    def run(self, rows: Sequence[RowInput], needs: Needs = NO_NEEDS) -> Pass:
        """One pass per row, joined; see Backbone. Raises UnsupportedError for needs it does not serve."""
        if not self.serves(rows, needs):
            raise UnsupportedError("the transformers adapter serves neither hooks nor input embeddings")
        logits: list[Tensor] = []
        starts: list[int] = []
        spans: list[tuple[int, int]] = []
        taps: dict[int, list[Tensor]] = {i: [] for i in needs.hidden}
        finals: list[Tensor] = []
        at = 0
        for row in rows:
            starts.append(sum(len(block) for block in logits))
            spans.append((at, at + row.queries))
            at += row.queries
            out = self._one(row, bool(needs.hidden or needs.final_hidden))
            if row.wanted():
                logits.append(out.logits[0].float())
            for i in needs.hidden:
                taps[i].append(out.hidden_states[i][0])
            if needs.final_hidden:
                finals.append(out.hidden_states[-1][0])
        joined = torch.cat(logits) if logits else torch.empty(0, self.capabilities.vocab_size)
        hidden = {i: torch.cat(parts) for i, parts in taps.items()}
        return Pass(joined, tuple(starts), tuple(spans), hidden, torch.cat(finals) if finals else None)

    def _one(self, row: RowInput, states: bool) -> Any:
        """The model's output for one row, logits for its wanted queries only."""
        start, visible = 0, row.queries
        if row.cache is not None:
            start = row.cache.length if row.start is None else row.start
            visible = row.cache.reserve(start, row.positions)
        state = _RowPass(row, start, visible, self._windows)
        token = _NOW.set(state)
        try:
            out = self._model(
                input_ids=row.tokens[None],
                position_ids=row.positions[None],
                use_cache=False,
                output_hidden_states=states,
                logits_to_keep=torch.tensor(list(row.wanted()) or [row.queries - 1]),
            )
            if len(state.shapes) != self.capabilities.layers or len(set(state.shapes)) != 1:
                raise UnsupportedError(f"model type {self.config.family!r} does not take its attention from outside")
            self._shape = state.shapes[0]
            return out
        finally:
            _NOW.reset(token)

    @torch.inference_mode()
    def _probe(self) -> None:
        """Compare one pass over the slabs with the model's own attention; raises UnsupportedError when they differ."""
        n = min(16, self.capabilities.max_len)
        ids = torch.arange(1, n + 1) * 7919 % self.capabilities.vocab_size
        try:
            self._model.set_attn_implementation("eager")
            want = self._model(input_ids=ids[None], use_cache=False).logits[0].float()
            self._model.set_attn_implementation(_ATTENTION)
            whole = self.run([RowInput(ids, torch.arange(n), logits="all")]).logits
            self._layout = CacheLayout(self.capabilities.layers, *self._shape, self.dtype)
            cache = self.pool(self._layout.nbytes(64)).open(n)
            first = self.run([RowInput(ids[: n // 2], torch.arange(n // 2), cache, logits="all")]).logits
            cache.advance(n // 2)
            rest = self.run([RowInput(ids[n // 2 :], torch.arange(n // 2, n), cache, logits="all")]).logits
            scale = want.abs().max().clamp(min=1.0)
            error = float(max((got - want).abs().max() / scale for got in (whole, torch.cat((first, rest)))))
        except UnsupportedError:
            raise
        except Exception as problem:  # noqa: BLE001 - whatever a foreign model raises, the answer is the same
            line = (str(problem).splitlines() or [type(problem).__name__])[0]
            raise UnsupportedError(
                f"model type {self.config.family!r} does not run through the transformers adapter: {line[:200]}",
                field="model_type",
            ) from None
        if not error <= (1e-3 if self.dtype == torch.float32 else 0.1):
            raise UnsupportedError(
                f"model type {self.config.family!r} gives other logits through the adapter (relative error {error:.2g})",
                hint="its attention is of a kind that the adapter does not know",
                field="model_type",
            )


def load_adapted(path: Path, config: Mapping[str, Any], dtype: torch.dtype, stored: int) -> HFBackbone | DiffusionGemma:
    """The model of a directory through the installed transformers, in `dtype`; the checkpoint's own code is ignored.

    `stored` is the number of weights in its files.

    Raises MissingExtraError without transformers, UnsupportedError for a model type it lacks or that is no causal model,
    FormatError when config and weights do not fit.
    """
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise MissingExtraError(
            f"model_type {config.get('model_type')!r:.60} is not implemented here and transformers is not installed",
            hint="pip install 'hasten[hf]'",
            field="model_type",
        ) from None
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UnsupportedError(f"model_type {kind!r:.60} is known neither here nor to transformers", field="model_type")
    known = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        settings = CONFIG_MAPPING[kind].from_dict(known)
        canvas = kind in CANVASES
        build: Any = (
            getattr(transformers, CANVASES[kind])
            if canvas
            else transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
        )
        if build is None:
            raise UnsupportedError(f"model_type {kind!r} is not a causal language model", field="model_type")
        with torch.device("meta"):
            described = build(settings).num_parameters()
        if described > stored * 1.01 + 1000:  # before anything is allocated: fields left out have defaults of any size
            raise FormatError(f"config.json describes {described:,} parameters, the files hold {stored:,}", path=str(path))
        transformers.AttentionInterface.register(_ATTENTION, _attention)
        model, info = build.from_pretrained(
            str(path),
            config=settings,
            dtype=dtype,
            attn_implementation="sdpa" if canvas else _ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except HastenError:
        raise
    except Exception as problem:  # noqa: BLE001 - transformers' own checks raise errors of many unrelated types
        line = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise FormatError(f"transformers cannot load it: {line[:300]}", path=str(path)) from None
    if info.get("missing_keys"):
        raise FormatError(f"weights are missing: {', '.join(sorted(info['missing_keys'])[:6])}", path=str(path))
    return DiffusionGemma(model) if canvas else HFBackbone(model)
