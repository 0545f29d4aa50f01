"""Dream's sampler against a plain loop that follows the released one."""

from __future__ import annotations

import pytest
import tiny
import torch
from canvases import MASK, Masked, prompts, run

from hasten.errors import ConfigError
from hasten.unmask.dream import Config


def dream_loop(model: Masked, prompt: list[int], length: int, steps: int, alg: str) -> list[int]:
    """The released sampler at temperature 0, with every step's forward, those that commit nothing included."""
    x = torch.tensor([*prompt, *[MASK] * length])
    times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    for i in range(steps):
        probs = model.logits(x).softmax(-1)
        open_ = (x == MASK).nonzero()[:, 0].tolist()
        count = len(open_) if i == steps - 1 else int(len(open_) * (1 - float(times[i + 1] / times[i])))
        best = probs.topk(2).values
        score = {
            "maskgit_plus": best[:, 0],
            "topk_margin": best[:, 0] - best[:, 1],
            "entropy": (probs * (probs + 1e-10).log()).sum(-1),
        }[alg]
        for at in sorted(open_, key=lambda j, score=score: -float(score[j]))[:count]:
            x[at] = int(probs[at].argmax())
    return x[len(prompt) :].tolist()


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("steps", [6, 17, 24])
def test_it_is_the_released_sampler(alg, steps):
    model = Masked(tiny.PLAIN, 2, shift=1)
    for prompt in prompts(2, seed=steps):
        out = run(model, [prompt], f"dream:steps={steps},alg={alg}", max_tokens=20)[0]
        assert list(out.tokens) == dream_loop(model, prompt, 20, steps, alg)
        assert out.usage.forwards <= steps


def test_random_order_follows_the_seed_and_fills_everything():
    model = Masked()
    one, two, other = (run(model, [[5, 6]], "dream:steps=8,alg=origin", seed=seed)[0] for seed in (1, 1, 2))
    assert one.tokens == two.tokens
    assert one.tokens != other.tokens
    assert one.usage.forwards <= 8
    assert MASK not in one.tokens


def test_cut_offs_apply_before_scores():
    model = Masked()
    # one candidate per position is certain of itself: all scores tie, so the order is that of positions
    narrow = run(model, [[5, 6]], "dream:alg=maskgit_plus", temperature=1.0, top_k=1)[0]
    nucleus = run(model, [[5, 6]], "dream:alg=maskgit_plus", temperature=1.0, top_p=1e-6)[0]
    assert narrow.tokens == nucleus.tokens
    x = [5, 6, *[MASK] * 24]
    for at in range(2, 26):
        x[at] = int(model.logits(x)[at].argmax())
    assert list(narrow.tokens) == x[2:]


def test_drawn_positions_differ_from_the_best_ones():
    model = Masked()
    best = run(model, [[5, 6]], "dream:alg=entropy")[0]
    drawn = run(model, [[5, 6]], "dream:alg=entropy,alg_temp=5")[0]
    assert best.tokens != drawn.tokens


@pytest.mark.parametrize(("field", "value"), [("steps", -1), ("alg", "best"), ("alg_temp", -1.0), ("eps", 0.0)])
def test_settings_outside_their_range_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})
    assert caught.value.field == f"dream.{field}"
