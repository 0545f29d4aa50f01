"""DiffusionGemma: a sampler written over our two halves gives what transformers' own generate gives, step for step."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from hasten.engine.contracts import NO_NEEDS
from hasten.engine.engine import Engine
from hasten.errors import ConfigError, HastenError, UnsupportedError
from hasten.models.diffusion_gemma import Context, DiffusionGemma
from hasten.models.load import load

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
    pytest.skip("this transformers has no DiffusionGemma", allow_module_level=True)

VOCAB, CANVAS = 60, 8


def build():
    """A tiny model with every kind of layer the released one has: sliding, full, experts."""
    text = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], max_position_embeddings=128,
        num_experts=4, top_k_experts=2, moe_intermediate_size=24, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS, image_token_id=59, boi_token_id=58, eoi_token_id=57
    )
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(noise * (1.0 if "embed_tokens" in name else p.shape[-1] ** -0.5))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusion-gemma")
    build().save_pretrained(path)
    return path


@dataclasses.dataclass
class Settings:
    steps: int = 6
    bound: float = 4.0
    cold: float = 0.4
    hot: float = 0.8
    sure: float = 0.005


def sample(model: DiffusionGemma, prompt: torch.Tensor, canvases: int, s: Settings) -> tuple[list[int], int]:
    """The released sampler, drawing from torch's own stream in the order transformers draws."""
    context, out, passes, unread = Context(), prompt.tolist(), 0, prompt
    for _ in range(canvases):
        model.encode(context, unread)
        canvas, before, last = model.random(), None, None
        for step in range(s.steps, 0, -1):
            logits = model.denoise(context, canvas, before) / (s.cold + (s.hot - s.cold) * (torch.tensor(step) / s.steps))
            passes += 1
            drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            ranked, order = entropy.sort()
            kept = torch.zeros(len(order), dtype=torch.bool)
            kept[order] = ranked.cumsum(0) - ranked <= s.bound
            best = logits.argmax(-1)
            canvas = torch.where(kept, drawn, model.random())
            before, done = logits, last is not None and bool((best == last).all()) and bool(entropy.mean() < s.sure)
            last = best
            if done:
                break
        ends = [i for i, token in enumerate(last.tolist()) if token in model.capabilities.eos_ids]
        text = last.tolist() if not ends else last.tolist()[: ends[0] + 1]
        out += text + [model.pad_id] * (CANVAS - len(text))
        if ends:
            break
        unread = last
    return out, passes


@pytest.mark.parametrize("settings", [Settings(), Settings(12, 1e9, 0.01, 0.02, 10.0)], ids=["all-steps", "stops-early"])
def test_a_sampler_over_the_halves_gives_what_transformers_gives(folder, settings):
    reference = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(folder, attn_implementation="sdpa").eval()
    done = load(folder)
    assert isinstance(done.model, DiffusionGemma)
    bound = type(reference.generation_config._get_default_generation_params()["sampler_config"])(settings.bound)
    early = 0
    for seed in range(4):
        prompt = torch.randint(3, 50, (5 + 3 * seed,), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        want = reference.generate(
            prompt[None], max_new_tokens=3 * CANVAS, max_denoising_steps=settings.steps, sampler_config=bound,
            t_min=settings.cold, t_max=settings.hot, stability_threshold=1, confidence_threshold=settings.sure,
            eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(seed)
        got, passes = sample(done.model, prompt, 3, settings)
        assert got == want.sequences[0].tolist()
        early += passes % settings.steps != 0
    assert early or settings.sure < 1


def test_reading_in_parts_is_reading_at_once(folder):
    model = load(folder).model
    ids = torch.randint(3, 50, (21,), generator=torch.Generator().manual_seed(5))
    canvas = model.random(torch.Generator().manual_seed(0))
    whole, parts = Context(), Context()
    model.encode(whole, ids)
    for a, b in ((0, 3), (3, 4), (4, 15), (15, 21)):
        model.encode(parts, ids[a:b])
    first = model.denoise(whole, canvas)
    assert (model.denoise(parts, canvas) - first).abs().max() <= 1e-4
    assert (model.denoise(whole, canvas) - first).abs().max() == 0  # a pass leaves the context as it is
    assert (model.denoise(whole, canvas, first) - first).abs().max() > 1e-3  # and is told of the one before
    assert first.abs().max() <= 30
    assert first.dtype == torch.float32


def test_what_it_offers_is_declared_and_the_engine_refuses_it(folder):
    done = load(folder)
    c = done.model.capabilities
    assert (c.kind, c.mask_id, c.block, c.eos_ids, c.bos_id) == ("masked", None, CANVAS, (1,), 2)
    assert not c.has("mask_id")
    assert done.config.family == "diffusion_gemma"
    with pytest.raises(UnsupportedError, match="encode and denoise"):
        Engine(done.model, cache_bytes=1_000_000)
    assert not done.model.serves([], NO_NEEDS)
    for refused in (lambda: done.model.pool(1_000_000), lambda: done.model.pack().run([])):
        with pytest.raises(UnsupportedError, match="encode and denoise"):
            refused()
    with pytest.raises(UnsupportedError, match="native"):
        load(folder, backbone="native")


def test_wrong_inputs_are_refused_by_name(folder):
    model = load(folder).model
    context = Context()
    with pytest.raises(ConfigError, match="context"):
        model.denoise(context, model.random())
    with pytest.raises(ConfigError, match="ids"):
        model.encode(context, torch.tensor([], dtype=torch.long))
    with pytest.raises(ConfigError, match="ids"):
        model.encode(context, torch.zeros(129, dtype=torch.long))
    model.encode(context, torch.tensor([2, 5]))
    with pytest.raises(ConfigError, match="canvas of 8"):
        model.denoise(context, torch.tensor([1, 2]))


def test_a_damaged_config_is_refused(folder, tmp_path):
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = 100
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(HastenError):
        load(tmp_path)
