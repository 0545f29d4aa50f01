"""A small language model for one target: few and narrow layers between projections of the target's own embeddings.

A draft model spends most of its weights on its vocabulary. Here the rows of the target's embedding and output layers stay
frozen and are not stored; one linear map each takes them to the small width, W_in: hidden -> d and W_out: d -> hidden. The
output covers a reduced vocabulary of the ids the target uses most, so that every other token has probability 0.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.engine.masks import CAUSAL, mask
from hasten.errors import ConfigError, out_of_range
from hasten.models.config import Layer, ModelConfig
from hasten.models.feature import compress, fill, read_layer
from hasten.models.linear import Linear
from hasten.models.stack import DecoderStack
from hasten.models.transformer import Block, Transformer

_HEAD = 64  # elements of an attention head, fewer where the model is narrower


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a small model: width `hidden`, `layers`, `ffn`, and the `window` of tokens that attention sees."""

    hidden: int = 192
    layers: int = 2
    ffn: int = 512
    window: int = 512

    def __post_init__(self) -> None:
        for name, top in (("hidden", 1 << 14), ("layers", 64), ("ffn", 1 << 16), ("window", 1 << 20)):
            if not 1 <= getattr(self, name) <= top:
                raise out_of_range(f"small.{name}", getattr(self, name), f"an integer in [1, {top}]")
        if self.hidden % min(_HEAD, self.hidden) or self.hidden % 2:
            raise out_of_range("small.hidden", self.hidden, f"even, and a multiple of {_HEAD} above it")


class SmallLM(Transformer):
    """A language model over the target's ids; logits are those of the ids `kept` int64 [draft vocab], -inf elsewhere.

    Raises ConfigError for ids outside the target's vocabulary and for a width above the target's.
    """

    def __init__(self, target: DecoderStack, kept: Tensor, shape: Shape | None = None, dtype: torch.dtype | None = None):
        shape = shape or Shape()
        c = target.config
        if kept.ndim != 1 or not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= c.vocab_size:
            raise out_of_range("kept", tuple(kept.shape), f"[draft vocabulary] ids below {c.vocab_size}")
        if shape.hidden > c.hidden:
            raise out_of_range("small.hidden", shape.hidden, f"at most the target's {c.hidden}")
        dtype = dtype or target.dtype
        size = min(_HEAD, shape.hidden)
        config = ModelConfig(
            family="small", vocab_size=len(kept), hidden=shape.hidden, heads=shape.hidden // size,
            kv_heads=shape.hidden // size, head_dim=size, ffn=shape.ffn, max_len=c.max_len,
            layers=(Layer(window=shape.window),) * shape.layers, norm_eps=c.norm_eps,
        )  # fmt: skip
        with torch.device("meta"):
            super().__init__(config, dtype)
        self.capabilities = dataclasses.replace(
            self.capabilities, vocab_size=c.vocab_size, bos_id=c.bos_id, eos_ids=c.eos_ids
        )
        self.shape, self.kept = shape, kept
        self.embed = nn.Embedding(1, 1)  # ids become embeddings of the target
        self.layers = nn.ModuleList(Block(config, i, dtype) for i in range(shape.layers))
        self.norm = type(self.norm)(shape.hidden, c.norm_eps, dtype)
        self.into = Linear(c.hidden, shape.hidden, False, dtype)
        self.back = nn.Parameter(torch.zeros(c.hidden, shape.hidden, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(len(kept), dtype=dtype))
        self.rows = target.output_rows(kept).to(dtype)
        self.rows_of = target.embeddings  # bound, so that the target is no part of this module

    def reset(self, seed: int = 0) -> SmallLM:
        """Random layers between projections onto the principal directions of the target's output rows.

        The input map is then scaled to states of size 1, the output map to logits of deviation about 1/2.
        """
        generator = torch.Generator().manual_seed(seed)
        d, deep = self.shape.hidden, 2 * self.shape.layers
        for name, p in self.trained():
            with torch.no_grad():
                if p.ndim < 2:
                    p.fill_(1.0 if "norm" in name else 0.0)
                else:
                    ends = name.endswith(("out.weight", "down.weight"))  # what is added to the residual stream
                    p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[1] * (deep if ends else 1)) ** -0.5)
        wide = self.rows.float()
        basis = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -d:]
        size = (wide @ basis).square().mean().sqrt().clamp(min=1e-6)
        with torch.no_grad():
            cast(nn.Parameter, self.into.weight).copy_(basis.T / size)
            self.back.copy_(basis / (2 * size * d**0.5))
        return self

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that training changes."""
        return [(name, p) for name, p in self.named_parameters() if not name.startswith(("embed.", "head."))]

    def _embed(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.into(self.rows_of(tokens).to(self.dtype)))

    def dense(self, ids: Tensor) -> Tensor:
        """States [B, T, d] after the final norm over whole sequences of ids [B, T]; for training."""
        b, t = ids.shape
        c, positions = self.config, torch.arange(t)
        cos, sin = self.ropes[0].at(positions, self.dtype)
        allowed = None if t <= self.shape.window else mask(CAUSAL, positions, positions, 0, self.shape.window)
        h = self._embed(ids)
        for layer in self.layers:
            block = cast(Block, layer)
            q, k, v = block.project(block.attn_norm(h), (cos, sin))
            mixed = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2).to(q.dtype), v.transpose(1, 2).to(q.dtype), allowed,
                is_causal=allowed is None, scale=c.attn_scale,
            )  # fmt: skip
            h = block.finish(h, cast(Tensor, block.out(mixed.transpose(1, 2).reshape(b, t, -1))))
        return self.norm(h)

    def draft_logits(self, states: Tensor) -> Tensor:
        """float32 logits [..., draft vocab] of states [..., d], whose columns are the ids `kept`."""
        if self.head.weight is None or not self.head.weight.is_meta:
            return cast(Tensor, self.head(states)).float()
        return F.linear(states, self.rows @ self.back, self.bias).float()

    def logits(self, final_hidden: Tensor) -> Tensor:
        """float32 logits [..., target vocab] of states after the final norm: -inf where nothing is ever drafted."""
        near = self.draft_logits(final_hidden)
        out = near.new_full((*near.shape[:-1], self.capabilities.vocab_size), -torch.inf)
        return out.index_copy_(-1, self.kept, near)

    def pack(self) -> SmallLM:
        """Multiply both maps of the output out, then as any stack; inference only from now on."""
        with torch.no_grad():
            self.head = Linear(self.config.hidden, len(self.kept), True, self.dtype)
            self.head.weight = nn.Parameter((self.rows.float() @ self.back.float()).to(self.dtype), requires_grad=False)
            self.head.bias = self.bias
        self.rows = self.rows[:0]
        super().pack()
        return self

    def save(self, path: Path, target: str, about: dict[str, object]) -> None:
        """Write the weights in 8 bits, the kept ids, the target's identity and facts about the training."""
        sizes = {name: str(value) for name, value in dataclasses.asdict(self.shape).items()}
        facts = {"hasten": "small-lm", "kind": "small", "target": target, **sizes}
        compress(self.trained(), self.kept, path, {**facts, "about": json.dumps(about)})


def load_small(path: str | Path, target: DecoderStack) -> SmallLM:
    """The small model stored at `path`, in the target's precision, packed; raises as `load_feature_model` does."""
    kept, facts, state = read_layer(path, "small-lm", "small", target, "hidden")
    try:
        shape = Shape(**{field.name: int(facts.get(field.name, "")) for field in dataclasses.fields(Shape)})
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", hint="train it again", field="weights") from None
    model = SmallLM(target, kept, shape)
    fill(model.trained(), state, model.dtype, path)
    model.eval().requires_grad_(False)
    return model.pack()
