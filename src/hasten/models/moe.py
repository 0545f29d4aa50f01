"""The expert feed-forward layer: a router picks a few experts for every token, and one that all tokens share may join.

Parameters (below `layers.i.experts.`), E experts of width w: router [E, hidden]; bias [E], always float32; gate_up
[E, 2 w, hidden], rows: gate, then up; down [E, hidden, w]; shared.gate_up.weight [2 s, hidden], shared.down.weight
[hidden, s]. Tokens are sorted by expert, and every expert that is used multiplies its tokens in one go.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.models.config import Experts, ModelConfig
from hasten.models.linear import Linear


def route(x: Tensor, router: Tensor, bias: Tensor | None, experts: Experts) -> tuple[Tensor, Tensor]:
    """(expert ids int64, weights float32) [N, active] for x [N, hidden]; scores and choice are computed in float32.

    The bias shifts the choice, never the weights. Equal scores are broken by torch.topk.
    """
    e = experts
    scores = F.linear(x.float(), router.float()).sigmoid()
    ranked = scores if bias is None else scores + bias
    if e.groups > 1:
        by_group = ranked.unflatten(-1, (e.groups, -1))
        best = by_group.topk(2, -1).values.sum(-1).topk(e.active_groups, -1).indices
        closed = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        ranked = by_group.masked_fill(closed[..., None], -torch.inf).flatten(-2)
    ids = ranked.topk(e.active, -1).indices
    weights = scores.gather(-1, ids)
    if e.normalised and e.active > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * e.scale


class Shared(nn.Module):
    """The expert that every token uses."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * width, False, dtype)
        self.down = Linear(width, hidden, False, dtype)


class ExpertLayer(nn.Module):
    """The feed-forward part of a layer with experts (`config.experts`), in `dtype`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        assert config.experts is not None  # noqa: S101 - the caller chose this layer by it
        e = self.experts = config.experts
        self.silu = config.activation == "silu"
        self.router = nn.Parameter(torch.empty(e.count, config.hidden, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(e.count)) if e.biased else None
        self.gate_up = nn.Parameter(torch.empty(e.count, 2 * e.width, config.hidden, dtype=dtype))
        self.down = nn.Parameter(torch.empty(e.count, config.hidden, e.width, dtype=dtype))
        self.shared = Shared(config.hidden, e.shared, dtype) if e.shared else None

    def _gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return (F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")) * up

    def forward(self, x: Tensor) -> Tensor:
        """The feed-forward part of normed x [..., hidden]."""
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = route(flat, self.router, self.bias, self.experts)
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=self.experts.count).tolist()
        parts = flat[order // ids.shape[1]].split(counts)
        done = [
            F.linear(self._gated(F.linear(part, self.gate_up[i])), self.down[i])
            for i, part in enumerate(parts)
            if len(part)
        ]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        chosen = torch.cat(done)[back].unflatten(0, ids.shape)
        out = (chosen.float() * weights[..., None]).sum(-2).to(x.dtype).view(x.shape)
        if self.shared is None:
            return out
        return out + cast(Tensor, self.shared.down(self._gated(self.shared.gate_up(x))))
