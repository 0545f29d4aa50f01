"""DiffusionGemma: a sampler written over our two halves gives what transformers' own generate gives, step for step."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from gemma import CANVAS, build, transformers

from hasten.engine.contracts import NO_NEEDS, Needs, RowInput
from hasten.engine.masks import CAUSAL, FULL
from hasten.errors import ConfigError, HastenError, UnsupportedError
from hasten.models.diffusion_gemma import Context, DiffusionGemma
from hasten.models.load import load


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


def test_what_it_offers_is_declared_and_other_passes_are_refused(folder):
    done = load(folder)
    c = done.model.capabilities
    assert (c.kind, c.mask_id, c.block, c.eos_ids, c.bos_id) == ("masked", None, CANVAS, (1,), 2)
    assert not c.has("mask_id")
    assert c.has("self_conditioning")
    assert done.config.family == "diffusion_gemma"
    cache = done.model.pool(1_000_000).open(40)
    ids, at = torch.arange(3, 3 + CANVAS), torch.arange(CANVAS)
    whole = RowInput(ids, at, cache, FULL, "all")
    assert done.model.serves([whole], NO_NEEDS)
    for row in (
        dataclasses.replace(whole, cache=None),
        dataclasses.replace(whole, visibility=CAUSAL),
        dataclasses.replace(whole, tokens=ids[:4], positions=at[:4]),
        RowInput(torch.arange(3, 12), torch.arange(9), cache, FULL, "all"),
    ):
        with pytest.raises(UnsupportedError, match="whole canvases"):
            done.model.run([row])
    with pytest.raises(UnsupportedError, match="whole canvases"):
        done.model.run([whole], Needs(final_hidden=True))
    with pytest.raises(UnsupportedError, match="native"):
        load(folder, backbone="native")


def test_a_pass_is_the_two_halves_and_leaves_no_trace_until_it_is_committed(folder):
    model = load(folder).model
    pool = model.pool(1_000_000)
    cache, context = pool.open(40), Context()
    ids = torch.randint(3, 50, (13 + CANVAS,), generator=torch.Generator().manual_seed(5))
    model.encode(context, ids[:5])
    want = model.denoise(context, ids[5 : 5 + CANVAS])
    for _ in range(2):  # the first one is not committed
        end = 5 + CANVAS
        row = RowInput(ids[:end], torch.arange(end), cache, FULL, tuple(range(5, end)), 0)
        assert torch.equal(model.run([row]).logits, want)
        cache.truncate(0)
        assert cache.nbytes() == cache.slab.nbytes
    model.run([row])
    cache.advance(5)
    held = cache.nbytes() - cache.slab.nbytes
    assert 0 < held <= pool.layout.nbytes(5)
    model.encode(context, ids[5:13])
    want = model.denoise(context, ids[13:], want)
    row = RowInput(ids[5:], torch.arange(5, 13 + CANVAS), cache, FULL, tuple(range(8, 8 + CANVAS)), 5)
    row.before = model.denoise(Context(5, cache.others[0].keys), ids[5 : 5 + CANVAS])
    assert torch.equal(model.run([row]).logits, want)
    other = pool.open(40)
    other.copy_from(cache)
    cache.advance(8)
    assert (cache.others[0].length, other.others[0].length) == (13, 5)
    with pytest.raises(UnsupportedError, match="cut"):
        cache.truncate(7)


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
