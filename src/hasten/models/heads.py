"""Medusa heads: small residual blocks on a target's final state, one for every token ahead (2401.10774).

Head k, counted from 1, reads the state f_i whose output layer gives token i + 1, and predicts token i + 1 + k:
output(f + SiLU(W_k f + b_k)). The output rows are the target's, frozen, over a reduced vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import out_of_range
from hasten.models.feature import compress, fill, read_layer
from hasten.models.linear import Linear
from hasten.models.stack import DecoderStack


class MedusaHeads(nn.Module):
    """`count` heads for `target` over the ids `kept` int64 [draft vocab]; untrained they repeat its own next token."""

    def __init__(self, target: DecoderStack, kept: Tensor, count: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if count < 1:
            raise out_of_range("heads", count, "at least 1")
        if kept.ndim != 1 or not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= target.config.vocab_size:
            raise out_of_range("kept", tuple(kept.shape), f"[draft vocabulary] ids below {target.config.vocab_size}")
        d = target.config.hidden
        self.count, self.kept, self.dtype = count, kept, dtype or target.dtype
        self.block = Linear(d, count * d, True, self.dtype)
        self.head = Linear(d, len(kept), False, self.dtype)
        self.head.weight = nn.Parameter(target.output_rows(kept).to(self.dtype), requires_grad=False)
        self.reset()

    def reset(self, seed: int = 0) -> MedusaHeads:
        """Blocks of zero: every head then repeats the target's own next token."""
        for _, p in self.trained():
            p.data.zero_()
        return self

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that training changes."""
        return [(name, p) for name, p in self.named_parameters() if not name.startswith("head.")]

    def states(self, final: Tensor) -> Tensor:
        """Output states [..., heads, hidden] of final states [..., hidden]."""
        steps = cast(Tensor, self.block(final)).unflatten(-1, (self.count, -1))
        return final[..., None, :] + F.silu(steps)

    def forward(self, final: Tensor) -> Tensor:
        """Logits float32 [..., heads, draft vocab] of final states [..., hidden]."""
        return cast(Tensor, self.head(self.states(final))).float()

    def save(self, path: Path, target: str, about: dict[str, object]) -> None:
        """Write the blocks in 8 bits, the kept ids, the target's identity and facts about the training."""
        facts = {"hasten": "medusa-heads", "kind": "medusa", "target": target, "heads": str(self.count)}
        compress(self.trained(), self.kept, path, {**facts, "about": json.dumps(about)})


def load_heads(path: str | Path, target: DecoderStack) -> MedusaHeads:
    """The heads stored at `path`, packed; raises as `load_feature_model` does."""
    kept, facts, state = read_layer(path, "medusa-heads", "medusa", target, "heads")
    heads = MedusaHeads(target, kept, int(facts["heads"]))
    fill(heads.trained(), state, heads.dtype, path)
    heads.eval().requires_grad_(False)
    for module in (heads.block, heads.head):
        module.pack()
    return heads
