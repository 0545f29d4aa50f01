"""One decoder layer that continues a target's hidden states: the network of EAGLE-1/2 and FSPAD drafters.

Element i of its sequence joins the target's final state f_i (what its output layer reads) with the embedding of the token
that followed, x_{i+1}, and predicts f_{i+1} and, by rows of the target's own output layer, the token x_{i+2}. EAGLE
(2401.15077): one linear map joins the two, and one output serves as feature and for the logits. FSPAD (2408.15562): the
embedding gates a small network over the feature, and the layer has two outputs, one for the logits and one to feed back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.engine.contracts import Backbone, Pass, RowInput
from hasten.errors import ConfigError, FormatError, out_of_range
from hasten.models.config import Layer, ModelConfig
from hasten.models.fetch import cache_dir
from hasten.models.linear import Linear
from hasten.models.stack import DecoderStack
from hasten.models.transformer import Block, Norm, Transformer

Kind = Literal["eagle", "fspad"]


class _Pass(nn.Module):
    """Hands its input on: EAGLE's layer has no norm before attention and none at its end."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _LogitHalf(nn.Module):
    """The part of FSPAD's output that the output layer reads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.size]


class _TwoHeaded(Block):
    """FSPAD's layer: the feed-forward part is twice as wide at its end, and both halves continue the attention's sum."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(config, 0, dtype)
        self.down = Linear(config.ffn, 2 * config.hidden, False, dtype)

    def finish(self, h: Tensor, mixed: Tensor) -> Tensor:
        """[..., 2 * hidden]: the half for the logits, then the half that is fed back."""
        h = h + mixed
        return torch.cat((h, h), -1) + self.feed_forward(self.ffn_norm(h))


class FeatureModel(Transformer):
    """The draft layer for one target, over a reduced vocabulary `kept` int64 [draft vocab] of target ids.

    Embeddings and output rows are the target's, frozen and not stored. Raises ConfigError for ids outside the target's
    vocabulary.
    """

    def __init__(
        self, kind: Kind, target: DecoderStack, kept: Tensor, ffn: int | None = None, dtype: torch.dtype | None = None
    ):
        if kind not in ("eagle", "fspad"):
            raise out_of_range("kind", kind, "eagle or fspad")
        c = target.config
        if kept.ndim != 1 or not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= c.vocab_size:
            raise out_of_range("kept", tuple(kept.shape), f"[draft vocabulary] ids below {c.vocab_size}")
        dtype = dtype or target.dtype
        config = dataclasses.replace(
            c, layers=(Layer(),), vocab_size=len(kept), ffn=ffn or 2 * c.hidden, tied=False, qk_norm=False, qkv_bias=False,
            out_bias=False, ffn_bias=False, sandwich_norms=False, attn_softcap=None, embed_scale=1.0,
        )  # fmt: skip
        with torch.device("meta"):
            super().__init__(config, dtype)
        self.kind, self.kept, self.target_dtype = kind, kept, dtype
        d = c.hidden
        self.embed = nn.Embedding(1, 1)  # inputs come as embeddings of the target
        block = Block(config, 0, dtype) if kind == "eagle" else _TwoHeaded(config, dtype)
        block.attn_norm = _Pass()  # type: ignore[assignment]
        self.layers = nn.ModuleList([block])
        self.norm = _Pass() if kind == "eagle" else _LogitHalf(d)  # type: ignore[assignment]
        self.join = Linear(2 * d, d, True, dtype)
        if kind == "fspad":
            self.gate = Linear(d, config.ffn, False, dtype)
            self.up = Linear(d, config.ffn, False, dtype)
            self.mix = Linear(config.ffn, d, False, dtype)
            self.join_norm = Norm(d, c.norm_eps, dtype)
        self.head = Linear(d, len(kept), False, dtype)
        self.head.weight = nn.Parameter(target.output_rows(kept).to(dtype), requires_grad=False)
        self.ropes = target.ropes

    def reset(self, seed: int = 0) -> FeatureModel:
        """Random weights: normal with deviation 0.02, norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.trained():
            with torch.no_grad():
                if p.ndim < 2:
                    p.fill_(1.0 if "norm" in name else 0.0)
                else:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        return self

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that training changes."""
        return [(n, p) for n, p in self.named_parameters() if not n.startswith(("embed.", "head."))]

    def inputs(self, features: Tensor, embeds: Tensor) -> Tensor:
        """Layer input z [..., hidden] of target features and the embeddings of the tokens that followed them."""
        z = cast(Tensor, self.join(torch.cat((embeds, features), -1)))
        if self.kind == "eagle":
            return z
        return z + cast(Tensor, self.mix(F.silu(self.gate(embeds)) * self.up(self.join_norm(z))))

    def fed_back(self, states: Tensor) -> Tensor:
        """The part [..., hidden] of the layer's output that stands for the next feature."""
        return states[..., self.config.hidden :] if self.kind == "fspad" else states

    def dense(self, features: Tensor, embeds: Tensor) -> Tensor:
        """The layer's output [B, T, hidden or 2 * hidden] over whole sequences [B, T, hidden], causal; for training."""
        block = cast(Block, self.layers[0])
        h = self.inputs(features, embeds)
        rotary = self.ropes[block.rope].at(torch.arange(h.shape[1]), h.dtype) if block.rope is not None else None
        q, k, v = block.project(h, rotary)
        c = self.config
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=c.attn_scale, enable_gqa=True
        )
        return block.finish(h, cast(Tensor, block.out(mixed.transpose(1, 2).flatten(-2))))

    def run_layer(self, rows: list[RowInput]) -> tuple[Tensor, Pass]:
        """(output [N, ...] of all queries, the pass with its logits); rows bring `embeds` made by `inputs`."""
        from hasten.engine.contracts import Needs

        done = self.run(rows, Needs(hidden=(1,)))
        return done.hidden[1], done

    def save(self, path: Path, target: str, about: dict[str, object]) -> None:
        """Write the trained weights in 8 bits, the kept ids, the target's `identity` and facts about the training."""
        facts = {"hasten": "feature-drafter", "kind": self.kind, "target": target, "ffn": str(self.config.ffn)}
        compress(self.trained(), self.kept, path, {**facts, "about": json.dumps(about)})


def compress(trained: list[tuple[str, nn.Parameter]], kept: Tensor, path: Path, facts: dict[str, str]) -> None:
    """Write weights with 8 bits and a scale per row (a drafter needs no more), the kept ids and `facts`."""
    state: dict[str, Tensor] = {"kept": kept.int()}
    for name, p in trained:
        weight = p.detach().float()
        if weight.ndim < 2:
            state[name] = weight.to(torch.bfloat16)
            continue
        scale = (weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127).to(torch.bfloat16).float()
        state[name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        state[f"{name}.scale"] = scale
    save_file(state, path, facts)


def identity(model: Backbone | DecoderStack, name: str) -> str:
    """What tells one model from another, however it was loaded: its family and a hash of its sizes and embeddings.

    The same in float32 and bfloat16. Models outside hasten's own stack go by `name`.
    """
    if not isinstance(model, DecoderStack):
        return name.replace("/", "--")
    c = model.config
    sizes = f"{c.vocab_size} {c.hidden} {len(c.layers)} {c.heads} {c.ffn}"
    rows = model.embed_rows(torch.arange(min(256, c.vocab_size))).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    return f"{c.family}-{hashlib.sha256(sizes.encode() + rows).hexdigest()[:12]}"


def weights_path(slug: str, backbone: Backbone, model: str, given: str = "") -> Path:
    """Where what a method needs for a model lies: `given`, else made here (cache folder), else shipped.

    Raises ConfigError when there is none.
    """
    if given:
        return Path(given)
    for folder in (cache_dir() / "drafters", Path(__file__).parent.parent / "weights"):
        path = folder / identity(backbone, model) / f"{slug}.safetensors"
        if path.exists():
            return path
    raise ConfigError(
        f"no weights of {slug!r} were made for model {model!r}",
        hint=f"hasten train {slug} {model}, or {slug}:weights=FILE",
        field=f"{slug}.weights",
    )


def load_feature_model(path: str | Path, kind: Kind, target: DecoderStack) -> FeatureModel:
    """The draft layer stored at `path`, in the target's precision, packed.

    Raises FormatError naming missing, unexpected or wrongly shaped tensors, ConfigError for another kind or target.
    """
    kept, facts, state = read_layer(path, "feature-drafter", kind, target, "ffn")
    model = FeatureModel(kind, target, kept, int(facts["ffn"]))
    fill(model.trained(), state, model.dtype, path)
    model.eval().requires_grad_(False).pack()
    return model


def read_layer(
    path: str | Path, what: str, kind: str, target: DecoderStack, size: str
) -> tuple[Tensor, dict[str, str], dict[str, Tensor]]:
    """(kept ids, facts, weights) of a file written by `compress`, checked against its kind and the target.

    `size` names the fact that must be a number. Raises FormatError or ConfigError naming the file.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read ({error})", hint="give a file made by `hasten train`", field="weights"
        ) from None
    if facts.get("hasten") not in ("feature-drafter", "medusa-heads", "placeholders", "small-lm"):
        raise FormatError(f"{path} holds no draft layer", hint="give a file made by `hasten train`", field="weights")
    if facts.get("kind") != kind or facts["hasten"] != what:
        raise ConfigError(f"{path} holds a draft layer of kind {facts.get('kind')!r}, not {kind!r}", field="weights")
    own = identity(target, "")
    if facts.get("target") != own:
        raise ConfigError(
            f"{path} was trained for model {facts.get('target')!r}, not {own!r}", hint="train one for it", field="weights"
        )
    if not facts.get(size, "").isdigit() or not 0 < int(facts[size]) <= 1 << 20:
        raise FormatError(f"{path}: {size} = {facts.get(size)!r} is no size", hint="train it again", field="weights")
    state = {key: value for key, value in stored.items() if not key.endswith(".scale")}
    for key, scale in stored.items():
        whole = state.get(key.removesuffix(".scale"))
        if key.endswith(".scale") and whole is not None and whole.ndim == 2 and scale.shape == (len(whole), 1):
            state[key.removesuffix(".scale")] = whole.float() * scale
    return state.pop("kept", torch.empty(0, dtype=torch.int32)).long(), facts, state


def fill(wanted: list[tuple[str, nn.Parameter]], state: dict[str, Tensor], dtype: torch.dtype, path: str | Path) -> None:
    """Put weights into parameters; raises FormatError naming missing, unexpected or wrongly shaped tensors."""
    names = dict(wanted)
    problems = [f"missing {key}" for key in names if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in names]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(p.shape)}"
        for key, p in names.items()
        if key in state and state[key].shape != p.shape
    ]
    if problems:
        raise FormatError(f"{path} does not fit the model: {'; '.join(problems[:6])}", field="weights")
    for key, p in names.items():
        p.data = state[key].to(dtype)
