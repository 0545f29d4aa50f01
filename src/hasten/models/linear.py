"""The linear operator of the torch stack: a plain weight for training and as oracle, packed once for inference.

Measured on this class of machine (fp32, 135M weights, 2 threads): oneDNN's packed layout reads T=1 in 0.75x, T=4 in 0.43x
and T=16 in 0.54x of the time of an ordinary linear call. bfloat16 without hardware support is fast only as a
matrix-vector product; from `_BF16_UPCAST` query tokens on it is cheaper to widen the weight first.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BF16_UPCAST = 5  # query tokens from which widening a bf16 weight to fp32 beats T matrix-vector products


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs linear weights of `dtype` on this CPU (asked once, by trying a small one)."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(32, 32, dtype=dtype), 1)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(1, 32, dtype=dtype), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]; `pack()` turns the weight into the fastest layout this machine has.

    A packed operator has no `weight` parameter any more (memory is not held twice) and refuses to be trained.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Pack the weight for inference if this machine gains from it; otherwise leave it as it is."""
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or not packs(weight.dtype):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]."""
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        weight = self.weight
        assert weight is not None  # noqa: S101 - packed and weight exclude each other
        narrow = weight.dtype == torch.bfloat16 and not torch.is_grad_enabled() and not packs(torch.bfloat16)
        if narrow and x[..., 0].numel() >= _BF16_UPCAST:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), weight.float(), bias).to(x.dtype)
        return F.linear(x, weight, self.bias)
