"""Approximate canvas caches against a plain loop that keeps keys itself; exact where refreshed (engine/test_canvas.py)."""

from __future__ import annotations

import pytest
import tiny
import torch
from canvases import MASK, Masked, policy, prompts, run

from hasten.engine.contracts import RowInput
from hasten.engine.masks import FULL
from hasten.errors import ConfigError, IncompatibleError
from hasten.unmask.canvas_cache import Config

MODELS = {"full": Masked(), "windowed": Masked(tiny.WINDOWED, 1), "shifted": Masked(tiny.PLAIN, 2, shift=1)}


def cached_loop(model: Masked, prompt: list[int], length: int, block: int, kind: str) -> list[int]:
    """One token per forward with a key cache refreshed at block starts, written down once more by hand."""
    x = torch.tensor([*prompt, *[MASK] * length])
    shift = model.capabilities.logit_shift
    cache = model.stack.pool(8_000_000).open(len(x))
    for low in range(len(prompt), len(x), block):
        high, fresh = min(low + block, len(x)), True
        while bool((x[low:high] == MASK).any()):
            first = 0 if fresh else low - shift
            last = len(x) if fresh or kind == "prefix" else high
            row = RowInput(x[first:last], torch.arange(first, last), cache, FULL, "all", first)
            raw = model.stack.run([row]).logits.clone()
            cache.length = len(x)
            raw[:, MASK] = -torch.inf
            prob, token = raw.softmax(-1).max(-1)
            best = max((at for at in range(low, high) if x[at] == MASK), key=lambda at: float(prob[at - shift - first]))
            x[best], fresh = token[best - shift - first], False
    return x[len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_what_a_plain_loop_with_a_cache_does(name, kind):
    for prompt in prompts(4, seed=8):
        out = run(MODELS[name], [prompt], "reference:block=8", f"canvas-cache:policy={kind}", max_tokens=20)[0]
        assert list(out.tokens) == cached_loop(MODELS[name], prompt, 20, 8, kind)


def test_vicinity_recomputes_around_the_block_and_starts_uncached():
    out = run(Masked(), [[5, 6]], "reference:block=8", "canvas-cache:policy=vicinity,around=2,warmup=3", max_tokens=32)[0]
    first = 3 * 34 + 5 * 12  # three uncached forwards, then the block, two before it and two after
    assert out.usage.computed_tokens == first + 2 * (34 + 7 * 12) + (34 + 7 * 10)


def test_it_says_when_it_is_exact():
    model = Masked()
    assert not policy(model, "canvas-cache").cache.exact(model.capabilities)
    assert policy(model, "canvas-cache:refresh=1").cache.exact(model.capabilities)
    assert policy(model).cache.exact(model.capabilities)


@pytest.mark.parametrize(("field", "value"), [("policy", "none"), ("refresh", -1), ("around", -1), ("warmup", -2)])
def test_settings_outside_their_range_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})
    assert caught.value.field == f"canvas-cache.{field}"


def test_a_block_causal_model_has_its_own():
    with pytest.raises(IncompatibleError, match="exact cache"):
        policy(Masked(block=4), "canvas-cache")
