"""The decoder stack: one implementation of every Llama-like family, which owns its layer loop.

Two ways in. `run` is the engine's: ragged rows over slot-addressed caches, visibility as a value, hooks and taps.
`forward` is the dense oracle [B, T] without a cache: training, tests and scoring compare against it. Both use the same
blocks; only attention differs. This stack is the oracle for every other backbone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.engine.cache import CacheLayout, CachePool
from hasten.engine.contracts import NO_NEEDS, LayerHooks, Needs, Pass, RowInput
from hasten.engine.masks import Causal, Tree, Visibility, at_layer, mask
from hasten.errors import FormatError, UnsupportedError, out_of_range
from hasten.models.config import ModelConfig
from hasten.models.linear import Linear
from hasten.models.moe import ExpertLayer
from hasten.models.rope import RopeTable
from hasten.models.stack import DecoderStack, capabilities_of, visibility_of


class Norm(nn.Module):
    """RMS norm over the last dimension: computed in float32, times `weight`, cast back."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x [..., size]; in inference a vector's result does not depend on how many others come with it."""
        if torch.is_grad_enabled():
            wide = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
            return wide.to(x.dtype)
        narrow = x.dtype != torch.float32
        wide, weight = (x.float(), self.weight.float()) if narrow else (x, self.weight)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        out = torch.mul(wide, weight)
        if length.numel() == 1:  # one vector: the scale is a number, and costs no operator
            out.mul_(1.0 / math.sqrt(length.item() ** 2 / self.size + self.eps))
        else:  # the same steps in float64, so that both give the same bits
            out.mul_(length.double().pow_(2).div_(self.size).add_(self.eps).sqrt_().reciprocal_().float())
        return out.to(x.dtype) if narrow else out

    __call__ = forward


TILE = 64  # keys are read in whole tiles, masked where nothing is stored: sums then run in one order for any pass


@dataclass(slots=True)
class RowPlan:
    """What one row needs in every layer of a pass: its span in the flat batch, cache slots, and masks by kind.

    `visible` slots hold keys, `read` are looked at: whole tiles of a cache, or all when there is none. `extra` is the span
    of its placeholders, which lie behind the queries of all rows; `known` states of an anchor where there are no queries.
    """

    row: RowInput
    start: int
    visible: int
    read: int
    span: slice
    positions: Tensor
    visibility: Visibility
    masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = field(default_factory=dict)
    extra: slice = field(default_factory=lambda: slice(0, 0))
    known: Mapping[int, Tensor] | None = None

    def mask_at(self, layer: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The mask [T, read] of this row in `layer`, as bool or added to scores of `dtype`; made once per kind and pass."""
        visibility = at_layer(self.visibility, layer)
        key = (id(visibility), window, dtype)
        if key not in self.masks:
            cache = self.row.cache
            keys = self.positions if cache is None else cache.positions[: self.visible]
            allowed = mask(visibility, self.positions, keys, self.start, window)
            spare = self.read - self.visible
            if spare:
                allowed = torch.ones(len(self.positions), self.visible, dtype=torch.bool) if allowed is None else allowed
                allowed = F.pad(allowed, (0, spare))
            if allowed is not None and dtype != torch.bool:
                allowed = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
            self.masks[key] = allowed
        return self.masks[key]

    def pick(self, x: Tensor) -> Tensor:
        """This row's part of x [N, ...]: its queries, then its placeholders."""
        own = x[self.span]
        return own if self.extra.stop == self.extra.start else torch.cat((own, x[self.extra]))


class Block(nn.Module):
    """One decoder layer: attention and a gated feed-forward part, each behind a norm, added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        c = config
        self.index, self.config = index, config
        self.silu = c.activation == "silu"
        self.window, self.rope = c.layers[index].window, c.layers[index].rope
        heads_dim, kv_dim = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.attn_norm = Norm(c.hidden, c.norm_eps, dtype)
        self.qkv = Linear(c.hidden, heads_dim + 2 * kv_dim, c.qkv_bias, dtype)
        self.out = Linear(heads_dim, c.hidden, c.out_bias, dtype)
        self.ffn_norm = Norm(c.hidden, c.norm_eps, dtype)
        self.experts = ExpertLayer(c, dtype) if c.experts is not None and index >= c.experts.first else None
        if self.experts is None:
            self.gate_up = Linear(c.hidden, 2 * c.ffn, c.ffn_bias, dtype)
            self.down = Linear(c.ffn, c.hidden, c.ffn_bias, dtype)
        sizes = (c.head_dim, c.head_dim) if c.qk_norm else (heads_dim, kv_dim) if c.qk_norm_whole else None
        self.q_norm = Norm(sizes[0], c.norm_eps, dtype) if sizes else None
        self.k_norm = Norm(sizes[1], c.norm_eps, dtype) if sizes else None
        self.post_attn_norm = Norm(c.hidden, c.norm_eps, dtype) if c.sandwich_norms else None
        self.post_ffn_norm = Norm(c.hidden, c.norm_eps, dtype) if c.sandwich_norms else None

    def project(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, rotated q [..., heads, head_dim] and k, v [..., kv_heads, head_dim] of normed x [..., hidden].

        `added` [M, ...] is added to the last M rows before norms and rotation.
        """
        c = self.config
        fused = plus(self.qkv(x), added).unflatten(-1, (c.heads + 2 * c.kv_heads, c.head_dim))
        qk, v = fused[..., : c.heads + c.kv_heads, :], fused[..., c.heads + c.kv_heads :, :]
        if self.q_norm is not None and self.k_norm is not None:
            parts = (qk[..., : c.heads, :], qk[..., c.heads :, :])
            if c.qk_norm_whole:
                parts = (parts[0].flatten(-2), parts[1].flatten(-2))
            qk = torch.cat((self.q_norm(parts[0]), self.k_norm(parts[1])), dim=-1 if c.qk_norm_whole else -2)
            qk = qk.unflatten(-1, (-1, c.head_dim)) if c.qk_norm_whole else qk
        if rotary is not None:
            qk = RopeTable.rotate(qk, *rotary)
        return qk[..., : c.heads, :], qk[..., c.heads :, :], v

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
        """Attention of q [T, heads, D] over keys and values [kv_heads, S, D]; returns [T, heads * D].

        `allowed` bool [T, S] or added to the scores, None = all. A query that may see nothing gets zeros, never NaN.
        """
        c = self.config
        t = q.shape[0]
        if c.attn_softcap is None:
            if t == 1:
                # the query heads of a group act as the queries of one head: no key is repeated
                grouped = q.view(1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
                allowed = allowed if allowed is None else allowed.expand(grouped.shape[2], -1)
                mixed = F.scaled_dot_product_attention(grouped, keys[None], values[None], allowed, scale=c.attn_scale)
                return mixed.view(1, -1)
            mixed = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=allowed,
                scale=c.attn_scale,
                enable_gqa=True,
            )
            return mixed[0].transpose(0, 1).reshape(t, -1)
        grouped = q.view(t, c.kv_heads, -1, c.head_dim).permute(1, 2, 0, 3)
        scores = torch.matmul(grouped.float(), keys.float().transpose(1, 2)[:, None]) * c.attn_scale
        scores = c.attn_softcap * torch.tanh(scores / c.attn_softcap)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        mixed = torch.matmul(scores.softmax(-1).to(values.dtype), values[:, None])
        return mixed.permute(2, 0, 1, 3).reshape(t, -1)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The gated feed-forward part of normed x [..., hidden]."""
        if self.experts is not None:
            return cast(Tensor, self.experts(x))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        gate = F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")
        return cast(Tensor, self.down(gate * up))

    def ragged(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        plans: Sequence[RowPlan],
        added: Tensor | None = None,
    ) -> Tensor:
        """Attention output [N, hidden] of normed x [N, hidden], each row over its own cache (which it fills)."""
        q, k, v = self.project(x, rotary, added)
        if len(plans) == 1:
            return cast(Tensor, self.out(self._row(plans[0], q, k, v)))
        mixed = [self._row(plan, plan.pick(q), plan.pick(k), plan.pick(v)) for plan in plans]
        queries = [plan.span.stop - plan.span.start for plan in plans]
        if sum(queries) < len(x):  # placeholders go behind the queries of all rows again
            behind = [part[t:] for part, t in zip(mixed, queries, strict=True)]
            mixed = [part[:t] for part, t in zip(mixed, queries, strict=True)] + behind
        return cast(Tensor, self.out(torch.cat(mixed)))

    def _row(self, plan: RowPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mixed values [T, heads * D] of one row's q, k and v [T, heads, D]."""
        cache = plan.row.cache
        kind = q.dtype if self.config.attn_softcap is None else torch.bool
        allowed = plan.mask_at(self.index, self.window, kind)
        if cache is None:
            return self.attend(q, k.transpose(0, 1), v.transpose(0, 1), allowed)
        slab_k, slab_v = cache.layers[self.index]
        start, end = plan.start, plan.start + len(q)
        if end - start == 1:
            slab_k[:, start] = k[0]
            slab_v[:, start] = v[0]
        else:
            slab_k[:, start:end] = k.transpose(0, 1)
            slab_v[:, start:end] = v.transpose(0, 1)
        keys, values = slab_k[:, : plan.read], slab_v[:, : plan.read]
        if self.window and plan.visible == end and end - start == 1 and end > self.window + TILE and allowed is not None:
            first = (end - self.window) // TILE * TILE  # tiles that lie wholly before the window are not read
            keys, values, allowed = keys[:, first:], values[:, first:], allowed[:, first:]
        return self.attend(q, keys, values, allowed)

    def finish(self, h: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after attention output `mixed` and the feed-forward part."""
        if self.post_attn_norm is not None:
            mixed = self.post_attn_norm(mixed)
        h = h + mixed
        y = self.feed_forward(self.ffn_norm(h))
        return h + (y if self.post_ffn_norm is None else self.post_ffn_norm(y))

    def hooked(self, h: Tensor, mixed: Tensor, normed: Tensor, hooks: LayerHooks, types: Tensor | None) -> Tensor:
        """`finish` for one row [T, hidden] whose hooks may replace or add to each part."""
        i = self.index

        def beside(where: str, x: Tensor, y: Tensor) -> Tensor:
            extra = hooks.parallel(i, where, x) if hooks.parallel else None
            return y if extra is None else y + extra

        replaced = hooks.mixer(i, normed) if hooks.mixer else None
        mixed = beside("attention", normed, mixed if replaced is None else replaced)
        if self.post_attn_norm is not None:
            mixed = self.post_attn_norm(mixed)
        out = h + mixed
        if hooks.after_attention:
            out = hooks.after_attention(i, out, types, hooks.memory)
        x = self.ffn_norm(out)
        replaced = hooks.ffn(i, x, types) if hooks.ffn else None
        y = beside("ffn", x, self.feed_forward(x) if replaced is None else replaced)
        out = out + (y if self.post_ffn_norm is None else self.post_ffn_norm(y))
        return beside("layer", h, out)


def plus(x: Tensor, added: Tensor | None) -> Tensor:
    """x [..., N, size] with `added` [..., M, size] on its last M rows."""
    if added is None:
        return x
    n = x.shape[-2] - added.shape[-2]
    return torch.cat((x[..., :n, :], x[..., n:, :] + added), -2)


class Transformer(nn.Module, DecoderStack):
    """A decoder stack of `config`, in `dtype`; implements the engine's Backbone contract under the name "torch"."""

    name = "torch"

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = nn.Embedding(config.vocab_size, config.hidden, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, i, dtype) for i in range(len(config.layers)))
        self.norm = Norm(config.hidden, config.norm_eps, dtype)
        self.head = Linear(config.hidden, config.vocab_size, config.head_bias, dtype)
        if config.tied:
            self.head.weight = cast(nn.Parameter, self.embed.weight)
        self.ropes = [RopeTable(rope, config.head_dim) for rope in config.ropes]
        self.capabilities = capabilities_of(config, hooks=True)

    @classmethod
    def from_state(
        cls, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32
    ) -> Transformer:
        """A stack with these weights (names and shapes of models/config.py), cast to `dtype` one tensor at a time.

        Raises FormatError naming every missing, unexpected, repeated or wrongly shaped tensor.
        """
        with torch.device("meta"):
            model = cls(config, dtype)
        model.ropes = [RopeTable(rope, config.head_dim) for rope in config.ropes]
        wanted = dict(model.named_parameters())
        if config.tied:
            wanted.pop("head.weight", None)
        problems: list[str] = []
        done: set[str] = set()
        for name, tensor in tensors:
            parameter = wanted.get(name)
            if parameter is None or name in done:
                problems.append(f"{'repeated' if name in done else 'unexpected'} {name}")
            elif tuple(tensor.shape) != tuple(parameter.shape):
                problems.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
            else:
                module, _, leaf = name.rpartition(".")
                value = nn.Parameter(tensor.detach().to(parameter.dtype).contiguous(), requires_grad=False)
                setattr(model.get_submodule(module), leaf, value)
                done.add(name)
        problems += [f"missing {name}" for name in wanted if name not in done]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise FormatError(f"weights do not fit a {config.family} model: {shown}", field="weights")
        if config.tied:
            model.head.weight = cast(nn.Parameter, model.embed.weight)
        return model.eval()

    def pack(self) -> Transformer:
        """Turn every linear weight into the layout this machine reads fastest; inference only from now on."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        for module in self.modules():  # found at once instead of through nn.Module.__getattr__, about 400 times a token
            module.__dict__.update(module._modules)
            module.__dict__.update(module._parameters)
        return self

    def pool(self, budget_bytes: int) -> CachePool:
        """A pool of row caches for this model; see CachePool."""
        c = self.config
        return CachePool(CacheLayout(len(c.layers), c.kv_heads, c.head_dim, self.dtype), budget_bytes)

    def serves(self, rows: Sequence[RowInput], needs: Needs) -> bool:
        """Every visibility, need and hook except `kv_write` (no sparse KV layers), and placeholders without hooks only.

        Rows with placeholders are causal or trees, and rows of one pass have theirs adapted in one way.
        """
        if any(row.hooks is not None and row.hooks.kv_write is not None for row in rows):
            return False
        behind = [row for row in rows if row.pseudo is not None]
        simple = all(isinstance(row.visibility, (Causal, Tree)) for row in behind)
        return not behind or (simple and all(row.hooks is None for row in rows))

    def _embed(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return h if self.config.embed_scale == 1.0 else h * torch.tensor(self.config.embed_scale, dtype=h.dtype)

    def embed_rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), hidden] of the input embedding as stored."""
        return self.embed.weight.detach()[ids]

    def output_rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), hidden] of the output layer, also when it is packed."""
        if self.head.weight is not None:
            return self.head.weight.detach()[ids]
        if self.config.tied:
            return self.embed.weight.detach()[ids]
        with torch.inference_mode():
            columns = self.head(torch.eye(self.config.hidden, dtype=self.dtype))  # packed weights cannot be read back
        return cast(Tensor, columns.T[ids].clone())

    def embeddings(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of token ids, scaled as the model scales them."""
        return self._embed(ids)

    def logits(self, final_hidden: Tensor) -> Tensor:
        """float32 logits [..., vocab] of hidden states after the final norm, scaled and soft-capped as the model does."""
        logits = cast(Tensor, self.head(final_hidden)).float()
        cap, scale = self.config.logit_softcap, self.config.logit_scale
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        ids: Tensor,
        visibility: Visibility | None = None,
        hidden: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Dense pass over ids [B, T] without a cache: float32 logits [B, T, vocab]; `visibility` None: as it was trained.

        With `hidden`, also the states entering those layers (index `layers` = after the last layer) [B, T, hidden].
        """
        b, t = ids.shape
        visibility = visibility_of(self.config) if visibility is None else visibility
        positions = torch.arange(t, device=ids.device)
        rotary = [table.at(positions, self.dtype) for table in self.ropes]
        h = self._embed(ids)
        taps: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers):
            block = cast(Block, layer)
            if hidden is not None and i in hidden:
                taps[i] = h
            allowed = mask(at_layer(visibility, i), positions, positions, 0, block.window)
            q, k, v = block.project(block.attn_norm(h), None if block.rope is None else rotary[block.rope])
            mixed = torch.stack([block.attend(q[n], k[n].transpose(0, 1), v[n].transpose(0, 1), allowed) for n in range(b)])
            h = block.finish(h, cast(Tensor, block.out(mixed)))
        if hidden is not None and len(self.layers) in hidden:
            taps[len(self.layers)] = h
        logits = self.logits(self.norm(h))
        return logits if hidden is None else (logits, taps)

    def _plan(self, rows: Sequence[RowInput]) -> tuple[list[RowPlan], Tensor]:
        """Row plans and the input embeddings [N, hidden] of all queries, flat in row order."""
        plans, at = [], 0
        for row in rows:
            t = row.queries
            if t == 0:
                raise out_of_range("queries", 0, "at least 1 per row")
            start, visible, read = 0, t, t
            if row.cache is not None:
                start = row.cache.length if row.start is None else row.start
                visible = row.cache.reserve(start, row.positions)
                read = min(-(-visible // TILE) * TILE, row.cache.capacity)
            plans.append(RowPlan(row, start, visible, read, slice(at, at + t), row.positions, row.visibility))
            at += t
        if all(row.embeds is None for row in rows):
            return plans, self._embed(rows[0].tokens if len(rows) == 1 else torch.cat([row.tokens for row in rows]))
        parts = [self._embed(row.tokens) if row.embeds is None else row.embeds.to(self.dtype) for row in rows]
        return plans, torch.cat(parts)

    @torch.inference_mode()
    def run(self, rows: Sequence[RowInput], needs: Needs = NO_NEEDS) -> Pass:
        """One pass over ragged rows; see RowInput for where keys are written and which logits come back.

        Raises UnsupportedError for needs it does not serve, MemoryFitError when a row's cache is full.
        """
        if not self.serves(rows, needs):
            raise UnsupportedError("the torch stack does not serve the kv_write hook, nor placeholders beside other hooks")
        plans, h = self._plan(rows)
        embeds = h if needs.embeds else None
        hooked = any(row.hooks is not None for row in rows)
        if any(row.pseudo is not None for row in rows):
            from hasten.models.placeholders import widened

            return widened(self, h, plans, needs, embeds)
        positions = plans[0].positions if len(plans) == 1 else torch.cat([plan.positions for plan in plans])
        rotary = [table.at(positions, self.dtype) for table in self.ropes]
        taps: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers):
            block = cast(Block, layer)
            if hooked:
                h, changed = self._before(i, h, plans)
                if changed:
                    positions = torch.cat([plan.positions for plan in plans])
                    rotary = [table.at(positions, self.dtype) for table in self.ropes]
            if i in needs.hidden:
                taps[i] = h
            normed = block.attn_norm(h)
            mixed = block.ragged(normed, None if block.rope is None else rotary[block.rope], plans)
            if hooked:
                h = torch.cat([self._one(block, h, mixed, normed, plan) for plan in plans])
            else:
                h = block.finish(h, mixed)
        if len(self.layers) in needs.hidden:
            taps[len(self.layers)] = h
        return self._output(h, plans, needs, taps, embeds)

    def _output(
        self, h: Tensor, plans: Sequence[RowPlan], needs: Needs, taps: dict[int, Tensor], embeds: Tensor | None
    ) -> Pass:
        """Final norm and head, only for the positions that are read."""
        wanted: list[int] = []
        starts: list[int] = []
        for plan in plans:
            starts.append(len(wanted))
            t = plan.span.stop - plan.span.start
            if isinstance(plan.row.logits, str) and t != plan.row.queries:
                local: Iterable[int] = range(t) if plan.row.logits == "all" else range(t - 1, t)
                local = () if plan.row.logits == "none" else local
            else:
                local = plan.row.wanted()
            wanted += [plan.span.start + j for j in local]
        final = self.norm(h) if needs.final_hidden else None
        rows = h if wanted == list(range(len(h))) else h[wanted]
        logits = self.logits(self.norm(rows)) if wanted else torch.empty(0, self.config.vocab_size)
        spans = tuple((plan.span.start, plan.span.stop) for plan in plans)
        return Pass(logits, tuple(starts), spans, taps, final, embeds, backbone=self.name)

    @staticmethod
    def _before(i: int, h: Tensor, plans: Sequence[RowPlan]) -> tuple[Tensor, bool]:
        """Run before_layer hooks; rows may change length, so spans and masks follow. Returns (h, whether changed)."""
        parts, at, changed = [], 0, False
        for plan in plans:
            part, hooks = h[plan.span], plan.row.hooks
            if hooks is not None and hooks.before_layer is not None:
                if plan.row.cache is not None:
                    raise UnsupportedError("before_layer changes a row's length and needs a row without a KV slab")
                part, plan.positions, hooks.types, _ = hooks.before_layer(i, part, plan.positions, hooks.types)
                plan.masks.clear()
                plan.visible = plan.read = len(part)
                changed = True
            plan.span = slice(at, at + len(part))
            at += len(part)
            parts.append(part)
        return (torch.cat(parts), True) if changed else (h, False)

    @staticmethod
    def _one(block: Block, h: Tensor, mixed: Tensor, normed: Tensor, plan: RowPlan) -> Tensor:
        """One row's way through the rest of a block, with or without hooks."""
        s, hooks = plan.span, plan.row.hooks
        if hooks is None:
            return block.finish(h[s], mixed[s])
        return block.hooked(h[s], mixed[s], normed[s], hooks, hooks.types)
