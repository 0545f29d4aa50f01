"""A small decoder stack to train: dense, batched, padded; the arithmetic of `models/transformer.py`, written for gradients.

Pre-norm RMS norms, SwiGLU, rotary positions in float32, no biases, one matrix for reading and writing tokens. What a query
may see is full, causal or block-causal. `train/released.py` writes and reads it under the names of a released family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import out_of_range
from hasten.train import alphabet

Kind = Literal["full", "causal", "block"]
KINDS: tuple[Kind, ...] = ("full", "causal", "block")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a network, in elements; `kind` says what a query sees, `block` the width of a block of the block-causal.

    `shift`: a place's token is read from the state of the place before it, as left-to-right networks do (the layouts of
    Dream and, in blocks, of Fast-dLLM v2).
    """

    kind: Kind = "full"
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    ffn: int = 704
    vocab: int = alphabet.SIZE
    max_len: int = 1024
    theta: float = 10_000.0
    eps: float = 1e-5
    block: int = 8
    shift: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise out_of_range("kind", self.kind, ", ".join(KINDS))
        for name in ("hidden", "layers", "heads", "ffn", "vocab", "max_len", "block"):
            if getattr(self, name) < 1:
                raise out_of_range(name, getattr(self, name), "at least 1")
        if self.shift and self.kind == "causal":
            raise out_of_range("shift", self.shift, "false for kind 'causal', whose states foretell the next place anyway")
        if self.hidden % (2 * self.heads):
            raise out_of_range("heads", self.heads, f"a divisor of half of hidden = {self.hidden}")

    @property
    def qk_norm(self) -> bool:
        """Whether every head's queries and keys are normalised: of the layouts only SDAR's has it."""
        return self.kind == "block" and not self.shift

    @property
    def foretells(self) -> bool:
        """Whether a state is of the token behind its place, rather than of the token at it."""
        return self.shift or self.kind == "causal"


class Norm(nn.Module):
    """RMS norm of the last dimension in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x normalised and scaled, in float32."""
        return _Scaled.apply(x.float(), self.weight, self.eps)  # type: ignore[no-any-return,no-untyped-call]


@dataclass(frozen=True, slots=True)
class Rows:
    """How packed tokens [N] and padded rows [B, T] belong together, and what queries see.

    `places` [N] are those of tokens in the flattened rows, `tokens` [B T] the way back; both point behind the end where
    there is nothing. The angles `cos` and `sin` are those of the tokens [N, 1, size].
    """

    count: int
    places: Tensor
    tokens: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool


class Layer(nn.Module):
    """Attention and a gated feed-forward, each behind a norm and added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        width, ffn = shape.hidden, shape.ffn
        self.attn_norm, self.ffn_norm = Norm(width, shape.eps), Norm(width, shape.eps)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, width, bias=False)
        size = width // shape.heads
        self.q_norm = Norm(size, shape.eps) if shape.qk_norm else None
        self.k_norm = Norm(size, shape.eps) if shape.qk_norm else None

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """x [N, hidden] after the layer."""
        width = x.shape[1]
        fused = F.linear(self.attn_norm(x), torch.cat((self.q.weight, self.k.weight, self.v.weight)))
        q, k, v = fused.view(len(x), 3, self.heads, -1).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = (_Turned.apply(one, rows.cos, rows.sin) for one in (q, k))  # type: ignore[no-untyped-call]
        q, k, v = (
            _Moved.apply(one, rows.tokens, rows.places).view(rows.count, -1, self.heads, one.shape[-1]).transpose(1, 2)
            for one in (q, k, v)
        )  # type: ignore[no-untyped-call]
        mixed = attend(q, k, v, rows.mask, rows.causal).transpose(1, 2).reshape(-1, width)
        x = x + self.out(_Moved.apply(mixed, rows.places, rows.tokens))  # type: ignore[no-untyped-call]
        gate, up = F.linear(self.ffn_norm(x), torch.cat((self.gate.weight, self.up.weight))).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class _Moved(torch.autograd.Function):
    """Lines of x in another order, zeros where the index points behind the end; `back` is the index of the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return _lines(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, back = ctx.saved_tensors
        return _lines(grad, back), None, None


def _lines(x: Tensor, index: Tensor) -> Tensor:
    wide = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return wide.index_select(0, index)


class _Scaled(torch.autograd.Function):
    """RMS norm with its gradient in closed form: seven times as fast as the one derived operator by operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        along = grad * unit
        drift = (along @ weight).unsqueeze(-1) / unit.shape[-1]
        return (grad * weight).addcmul_(unit, drift, value=-1).mul_(scale), along.flatten(0, -2).sum(0), None


class _Turned(torch.autograd.Function):
    """Rotary positions of x [..., heads, size], computed in float32; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    wide, half = x.float(), x.shape[-1] // 2
    swapped = torch.cat((wide[..., half:], wide[..., :half]), -1)
    return torch.addcmul(wide * cos, swapped, sin, value=sign).to(x.dtype)


PACK = 256  # packed tokens come in multiples of it
LONG = 640  # keys from which fused attention is faster than products and a softmax, forward and backward, on a CPU


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention of q, k, v [B, heads, T, size]; `mask` is true where a query sees a key."""
    length = k.shape[2]
    if length >= LONG:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if causal:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(v.dtype) @ v


class Network(nn.Module):
    """The stack; call it for the normalised last states, and `logits` for the scores of tokens at chosen ones."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Fresh weights: N(0, 0.02), what is added to the stream narrower by the square root of the additions."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.ndim == 2:
                    added = name.endswith(("out.weight", "down.weight"))
                    weight.normal_(0, 0.02 / (2 * len(self.layers)) ** 0.5 if added else 0.02, generator=generator)
                else:
                    weight.fill_(1.0)

    def forward(
        self, ids: Tensor, known: Tensor | None = None, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """States [B, T, hidden] of ids [B, T], zeros at padding; with `shift` each stands at the place it foretells.

        `known` [B, T] is false at padding, which lies behind a row and which nothing sees. `mask`
        [T, T] or [B, T, T] overrides what the kind of network sees; `positions` [T] the places 0, 1, ....
        """
        count, length = ids.shape
        places = torch.arange(length) if positions is None else positions
        kind = self.shape.kind
        if mask is None and kind == "block":
            mask = block_causal(length, self.shape.block)
        causal = mask is None and kind == "causal"  # padding lies behind all queries that are read
        seen: Tensor | None = None
        if mask is not None:
            seen = mask if mask.ndim == 3 else mask[None]
        if known is not None and not causal and not bool(known.all()):
            seen = known[:, None, :] if seen is None else seen & known[:, None, :]
        if seen is not None:
            seen = seen[:, None]
        rows = self._rows(ids, known, places, seen, causal)
        flat = F.pad(ids.flatten(), (0, 1), value=alphabet.PAD)
        x = self.embed(flat[rows.places])
        for layer in self.layers:
            x = layer(x, rows)
        states: Tensor = _Moved.apply(self.norm(x), rows.tokens, rows.places).view(count, length, -1)  # type: ignore[no-untyped-call]
        return torch.cat((states[:, :1], states[:, :-1]), 1) if self.shape.shift else states

    def _rows(self, ids: Tensor, known: Tensor | None, positions: Tensor, mask: Tensor | None, causal: bool) -> Rows:
        """Tokens without the padding; in training to a multiple of 256, so that products of few shapes are computed."""
        places = torch.arange(ids.numel()) if known is None else known.flatten().nonzero().flatten()
        real = len(places)
        room = -real % PACK if torch.is_grad_enabled() else 0
        tokens = torch.full((ids.numel(),), real + room)
        tokens[places] = torch.arange(real)
        places = F.pad(places, (0, room), value=ids.numel())
        cos, sin = self._angles(F.pad(positions.repeat(len(ids)), (0, 1))[places])
        return Rows(len(ids), places, tokens, cos, sin, mask, causal)

    def logits(self, states: Tensor) -> Tensor:
        """float32 scores [..., vocab] of states [..., hidden]; a diffusion model never writes a mask."""
        out = F.linear(states, self.embed.weight).float()
        if self.shape.kind != "causal":
            out[..., alphabet.MASK] = float("-inf")
        return out

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        size = self.shape.hidden // self.shape.heads
        inverse = 1.0 / (self.shape.theta ** (torch.arange(0, size, 2).float() / size))
        angles = positions.float()[:, None] * inverse[None, :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def block_causal(length: int, block: int) -> Tensor:
    """Which keys a query sees [length, length]: those of its own block, counted from position 0, and of earlier ones."""
    of = torch.arange(length) // block
    return of[:, None] >= of[None, :]
