"""The linear operator of the torch stack: a plain weight for training and as oracle, packed once for inference.

Measured with 135M weights on 2 threads, milliseconds of all linear layers at T = 1 / 4 / 16 query tokens:

| machine and precision | ordinary | oneDNN's packed layout |
|---|---|---|
| AVX2 float32 | 59 / 136 / 147 | 44 / 59 / 79 |
| AVX-512 float32 | 20 / 35 / 47 | 28 / 37 / 46 |
| AVX-512 and AMX bfloat16 | 20 / 21 / 21 | 14 / 14 / 14 |
| AVX2 bfloat16 | 26 / 92 / 355 | not available |

bfloat16 without hardware support is fast only as a matrix-vector product; from `_BF16_UPCAST` query tokens on it is
cheaper to widen the weight first. The choice goes by the processor's kind, never by a timing at load: results must not
change in their last digits from one start to the next.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BF16_UPCAST = 5  # query tokens from which widening a bf16 weight to fp32 beats T matrix-vector products


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether packing weights of `dtype` pays on this CPU and works in this build of torch (tried once on a small one)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512":
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
        self.inputs, self.dtype = inputs, dtype

    def pack(self) -> None:
        """Pack the weight for inference if this machine gains from it; otherwise leave it as it is."""
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or not packs(weight.dtype):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.weight = None

    def unpack(self) -> None:
        """Undo `pack`, so that gradients can pass; the weight is read off by applying the operator to unit vectors."""
        if self.packed is not None:
            units = torch.eye(self.inputs, dtype=self.dtype)
            weight = torch.ops.mkldnn._linear_pointwise(units, self.packed, None, "none", [], "").T.contiguous()
            self.weight, self.packed = nn.Parameter(weight, requires_grad=False), None

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]."""
        if self.packed is not None:
            if x.dtype != self.dtype:  # autocast narrows what comes in, and knows nothing of packed weights
                x = x.to(self.dtype)
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        weight = self.weight
        assert weight is not None  # noqa: S101 - packed and weight exclude each other
        narrow = weight.dtype == torch.bfloat16 and not torch.is_grad_enabled() and not packs(torch.bfloat16)
        if narrow and x[..., 0].numel() >= _BF16_UPCAST:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), weight.float(), bias).to(x.dtype)
        return F.linear(x, weight, self.bias)

    __call__ = forward  # torch's own call machinery costs as much as a small operator, seven times a layer
