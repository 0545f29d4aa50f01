"""What placeholders are made of: maps of a hidden state (hidden transfer, 2404.12022) or trained inputs (LUD, 2405.15208).

Both let a frozen decoder stack guess tokens ahead in its own pass. `TransferMaps` turn the state that enters a layer into
states of the next tokens, which run through the rest of the stack. `TrainedInputs` are embeddings that stand for tokens not
known yet, from the first layer on, with a low-rank adapter that acts on them alone: of real tokens the stack computes
what it does without. Guesses are read out by rows of the target's own output layer over a reduced vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.engine.contracts import Pseudo
from hasten.errors import FormatError, out_of_range
from hasten.models.feature import compress, fill, read_layer
from hasten.models.linear import Linear
from hasten.models.stack import DecoderStack

Anchors = Literal["last", "ends", "all"]


class Guesser(nn.Module):
    """Base of what is trained to fill placeholders: `count` of them behind an anchor, over `kept` int64 [draft vocab] ids.

    Raises ConfigError for a count below 1 and for ids outside the target's vocabulary.
    """

    kind = ""

    def __init__(self, target: DecoderStack, kept: Tensor, count: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if count < 1:
            raise out_of_range("count", count, "at least 1")
        if kept.ndim != 1 or not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= target.config.vocab_size:
            raise out_of_range("kept", tuple(kept.shape), f"[draft vocabulary] ids below {target.config.vocab_size}")
        self.count, self.kept, self.dtype = count, kept, dtype or target.dtype
        self.cap = target.config.logit_softcap
        self.head = Linear(target.config.hidden, len(kept), False, self.dtype)
        self.head.weight = nn.Parameter(target.output_rows(kept).to(self.dtype), requires_grad=False)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that training changes."""
        return [(name, p) for name, p in self.named_parameters() if not name.startswith("head.")]

    def pseudo(self, count: int, anchors: Anchors = "all") -> Pseudo:
        """The first `count` placeholders, as a pass wants them."""
        raise NotImplementedError

    def logits(self, final: Tensor) -> Tensor:
        """float32 logits [..., draft vocab] of placeholders' states after the final norm."""
        rows = final.reshape(-1, final.shape[-1])  # of a transposed batch torch would multiply a copied head by each matrix
        logits = cast(Tensor, self.head(rows)).float().unflatten(0, final.shape[:-1])
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _facts(self) -> dict[str, str]:
        return {}

    def save(self, path: Path, target: str, about: dict[str, object]) -> None:
        """Write the trained weights in 8 bits, the kept ids, the target's identity and facts about the training."""
        facts = {"hasten": "placeholders", "kind": self.kind, "target": target, "count": str(self.count), **self._facts()}
        compress(self.trained(), self.kept, path, {**facts, "about": json.dumps(about)})

    def _ready(self, state: dict[str, Tensor], path: str | Path) -> None:
        """Take weights from a file, for inference."""
        fill(self.trained(), state, self.dtype, path)
        self.eval().requires_grad_(False)
        self.head.pack()


class TransferMaps(Guesser):
    """One linear map for each token ahead, of the state that enters `layers[i]`; untrained each repeats that state.

    The identity is not stored: weights hold what a map adds to it. Raises ConfigError for layers outside the stack or in
    falling order.
    """

    kind = "hidden-transfer"

    def __init__(
        self, target: DecoderStack, kept: Tensor, layers: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(target, kept, len(layers), dtype)
        top = len(target.config.layers)
        if any(not 0 <= at <= top for at in layers) or list(layers) != sorted(layers):
            raise out_of_range("layers", layers, f"in [0, {top}], none below the one before it")
        self.at = tuple(layers)
        d = target.config.hidden
        self.maps = Linear(d, self.count * d, True, self.dtype)
        for _, p in self.trained():
            p.data.zero_()

    def _facts(self) -> dict[str, str]:
        return {"layers": ",".join(map(str, self.at))}

    def enter(self, step: int, states: Tensor) -> Tensor:
        """Map `step` of the anchors' states [A, hidden]."""
        d = states.shape[-1]
        own = slice(step * d, (step + 1) * d)
        weight, bias = cast(Tensor, self.maps.weight)[own], cast(Tensor, self.maps.bias)[own]
        return states + F.linear(states.to(weight.dtype), weight, bias)

    def pseudo(self, count: int, anchors: Anchors = "all") -> Pseudo:
        """The first `count` placeholders, each entering where its map reads."""
        return Pseudo(self.at[:count], self.enter, None, anchors)


class TrainedInputs(Guesser):
    """`count` input embeddings and, for them alone, in every layer a low-rank term beside the projections to queries,
    keys and values (`rank`) and a small network beside the feed-forward part (`beside` units). Fresh ones change nothing.
    """

    kind = "lud"

    def __init__(
        self, target: DecoderStack, kept: Tensor, count: int, rank: int, beside: int, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(target, kept, count, dtype)
        for name, value in (("rank", rank), ("beside", beside)):
            if not 1 <= value <= 4096:
                raise out_of_range(name, value, "in [1, 4096]")
        c, n = target.config, len(target.config.layers)
        self.rank, self.beside = rank, beside
        qkv = (c.heads + 2 * c.kv_heads) * c.head_dim
        shapes = {"inputs": (count, c.hidden), "qkv_in": (n * rank, c.hidden), "qkv_out": (n * rank, qkv),
                  "ffn_in": (n * beside, c.hidden), "ffn_out": (n * beside, c.hidden)}  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=self.dtype)))

    inputs: Tensor
    qkv_in: Tensor
    qkv_out: Tensor
    ffn_in: Tensor
    ffn_out: Tensor

    def _facts(self) -> dict[str, str]:
        return {"rank": str(self.rank), "beside": str(self.beside)}

    def reset(self, target: DecoderStack, seed: int = 0) -> TrainedInputs:
        """Inputs near the mean embedding of the kept ids, and an adapter that adds nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            often = target.embeddings(self.kept).float()
            noise = torch.randn(self.inputs.shape, generator=generator) * often.std()
            self.inputs.copy_(often.mean(0) + 0.1 * noise)
            for into in (self.qkv_in, self.ffn_in):
                into.copy_(torch.randn(into.shape, generator=generator) * into.shape[1] ** -0.5)
            self.qkv_out.zero_()
            self.ffn_out.zero_()
        return self

    def enter(self, step: int, states: Tensor) -> Tensor:
        """Input `step`, whatever the anchors' states [A, hidden] are."""
        return self.inputs[step].expand(len(states), -1)

    def adapt(self, layer: int, where: str, x: Tensor) -> Tensor:
        """What the adapter adds to "qkv" or "ffn" of `layer` for placeholders x [M, hidden]."""
        if where == "qkv":
            own = slice(layer * self.rank, (layer + 1) * self.rank)
            return F.linear(x, self.qkv_in[own]) @ self.qkv_out[own]
        own = slice(layer * self.beside, (layer + 1) * self.beside)
        return F.silu(F.linear(x, self.ffn_in[own])) @ self.ffn_out[own]

    def pseudo(self, count: int, anchors: Anchors = "all") -> Pseudo:
        """The first `count` placeholders, from the first layer on."""
        return Pseudo((0,) * count, self.enter, self.adapt, anchors)


def load_maps(path: str | Path, target: DecoderStack) -> TransferMaps:
    """The maps stored at `path`; raises FormatError or ConfigError as `load_feature_model` does."""
    kept, facts, state = read_layer(path, "placeholders", TransferMaps.kind, target, "count")
    layers = facts.get("layers", "").split(",")
    if not all(at.isdigit() and len(at) < 6 for at in layers) or len(layers) != int(facts["count"]):
        raise FormatError(f"{path}: layers = {facts.get('layers')!r} are not {facts['count']} layers", field="weights")
    maps = TransferMaps(target, kept, tuple(map(int, layers)))
    maps._ready(state, path)
    return maps


def load_inputs(path: str | Path, target: DecoderStack) -> TrainedInputs:
    """The inputs and adapter stored at `path`; raises FormatError or ConfigError as `load_feature_model` does."""
    kept, facts, state = read_layer(path, "placeholders", TrainedInputs.kind, target, "count")
    sizes = [facts.get(name, "") for name in ("rank", "beside")]
    if not all(size.isdigit() and 1 <= int(size[:6]) <= 4096 for size in sizes):
        raise FormatError(f"{path}: rank and beside = {sizes} are no sizes", hint="train it again", field="weights")
    inputs = TrainedInputs(target, kept, int(facts["count"]), int(sizes[0]), int(sizes[1]))
    inputs._ready(state, path)
    return inputs
