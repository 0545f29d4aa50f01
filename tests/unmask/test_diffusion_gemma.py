"""DiffusionGemma's sampler through the public API: transformers' own text under the same noise, and all that engines promise."""

from __future__ import annotations

import json
from types import MethodType

import pytest
import torch
from canvases import Masked
from gemma import CANVAS, VOCAB, transformers, write
from live import serving

import hasten
from hasten.combine import combine
from hasten.engine.contracts import MethodContext
from hasten.engine.sampling import draw
from hasten.errors import ConfigError, IncompatibleError, UnsupportedError
from hasten.pass_cost import PassCost
from hasten.registry import cards
from hasten.types import Request, SamplingParams, commit_log
from hasten.unmask._noise import uniforms
from hasten.unmask.diffusion_gemma import Config

SHORT = "diffusion-gemma:steps=6,bound=4"
SOON = "diffusion-gemma:steps=12,bound=1e9,t_min=0.01,t_max=0.02,confidence=10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def llm(folder):
    return hasten.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(folder, attn_implementation="sdpa").eval()


def prompts(count):
    sizes = [1 + 5 * i for i in range(count)]
    return [torch.randint(3, 50, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in sizes]


class Keyed:
    """Hands transformers' sampler the random numbers that hasten keys by seed, step and position; `forwards` counts steps."""

    def __init__(self, monkeypatch, model, start, seed, temperature):
        self.seed, self.temperature, self.low, self.forwards, self.fresh = seed, temperature, start - CANVAS, 0, False
        own = type(model)._prepare_sampler

        def sampler(this, generation_config):
            made = own(this, generation_config)
            made.initialize_canvas = self.ids
            return made

        monkeypatch.setattr(model, "_prepare_sampler", MethodType(sampler, model))
        monkeypatch.setattr(torch, "multinomial", self.multinomial)
        self.hook = model.model.encoder.register_forward_pre_hook(self.begins)

    def begins(self, *_):
        """The encoder runs before every canvas."""
        self.low, self.fresh = self.low + CANVAS, True

    def uniforms(self, stream):
        return uniforms(self.seed, self.forwards, torch.arange(self.low, self.low + CANVAS), stream=stream)[:, 0]

    def ids(self, batch_size, device):
        stream, self.fresh = 1 if self.fresh else 2, False
        found = (self.uniforms(stream) * VOCAB).long()
        self.forwards += stream == 2
        return found[None]

    def multinomial(self, probs, num_samples):
        if not self.temperature:
            return probs.argmax(-1, keepdim=True)
        return torch.tensor([[draw(one, u)] for one, u in zip(probs, self.uniforms(0).tolist(), strict=True)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("auto", {}),
        (SHORT, dict(steps=6, bound=4.0, cold=0.4, hot=0.8, sure=0.005)),
        (SOON, dict(steps=12, bound=1e9, cold=0.01, hot=0.02, sure=10.0)),
    ],
    ids=["defaults", "all-steps", "stops-early"],
)
def test_it_is_the_sampler_of_transformers(llm, reference, method, settings, temperature):
    given = {}
    if settings:
        bound = type(reference.generation_config._get_default_generation_params()["sampler_config"])(settings["bound"])
        given = dict(max_denoising_steps=settings["steps"], sampler_config=bound, t_min=settings["cold"],
                     t_max=settings["hot"], confidence_threshold=settings["sure"])  # fmt: skip
    for seed, prompt in enumerate(prompts(3 if settings else 2)):
        asked = (20, 9, 16)[seed]
        out = llm.generate(prompt, method=method, max_tokens=asked, temperature=temperature, seed=seed)
        with pytest.MonkeyPatch.context() as monkeypatch:
            keyed = Keyed(monkeypatch, reference, len(prompt), seed, temperature)
            want = reference.generate(torch.tensor([prompt]), max_new_tokens=asked, eos_token_id=1, pad_token_id=0, **given)
            keyed.hook.remove()
        tokens = want.sequences[0, len(prompt) :].tolist()[:asked]
        ends = tokens.index(1) + 1 if 1 in tokens else asked
        assert list(out.tokens) == tokens[:ends]
        assert out.usage.forwards == keyed.forwards
        assert out.finish_reason == ("stop" if 1 in tokens else "length")
        assert out.method == ("diffusion-gemma",)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_ragged_batch_is_its_rows_alone(llm, temperature):
    many = prompts(4)
    for method in (SHORT, SOON):
        how = dict(method=method, max_tokens=19, temperature=temperature, seed=5, ignore_eos=True, n=2)
        for prompt, outs in zip(many, llm.generate(many, **how), strict=True):
            alone = llm.generate(prompt, **how)
            assert [one.tokens for one in alone] == [one.tokens for one in outs]
            assert [one.usage.forwards for one in alone] == [one.usage.forwards for one in outs]
            assert {len(one.tokens) for one in outs} == {19}


def test_the_presets_are_its_own_sampler_and_seeds_matter(llm):
    prompt = prompts(2)[1]
    outs = [
        llm.generate(prompt, method=name, max_tokens=8, seed=3) for name in ("auto", "exact", "plain", "diffusion-gemma")
    ]
    assert len({out.tokens for out in outs}) == 1
    assert {out.method for out in outs} == {("diffusion-gemma",)}
    assert llm.generate(prompt, method=SHORT, max_tokens=8, seed=4).tokens != outs[0].tokens


def test_a_checkpoint_says_how_it_is_sampled(folder, llm, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    said = json.loads((folder / "generation_config.json").read_text())
    bound = {"entropy_bound": 4.0, "_cls_name": "EntropyBoundSamplerConfig"}
    (tmp_path / "generation_config.json").write_text(
        json.dumps({**said, "max_denoising_steps": 6, "sampler_config": bound})
    )
    other, prompt = hasten.load(tmp_path), prompts(2)[1]
    assert other.model.sampler == {"steps": 6, "bound": 4.0}
    short = llm.generate(prompt, method=SHORT, max_tokens=8, seed=3)
    assert other.generate(prompt, max_tokens=8, seed=3).tokens == short.tokens
    asked = other.generate(prompt, method="diffusion-gemma:steps=3", max_tokens=8, seed=3)
    assert asked.usage.forwards <= 3 < short.usage.forwards


def test_text_streams_in_order_and_the_trace_says_what_it_cost(llm):
    events = list(llm.stream("a quick fox", method=SHORT, max_tokens=20, seed=1, ignore_eos=True))
    out = events[-1].output
    start = len(llm.encode("a quick fox"))
    assert "".join(event.text for event in events) == out.text == llm.decode(out.tokens)
    log = commit_log(events)[0]
    assert [position for _, position, _, _ in log] == list(range(start, start + 20))
    assert [token for _, _, token, _ in log] == list(out.tokens)
    assert all(0 < confidence <= 1 for *_, confidence in log)
    steps = sorted({step for step, *_ in log})
    assert len(steps) == 3  # a canvas becomes final as one
    forwards = [event for event in events if event.kind == "forward"]
    assert len(forwards) == out.usage.forwards == steps[-1] - forwards[0].step + 1
    assert out.usage.computed_tokens == out.usage.forwards * CANVAS + start + 2 * CANVAS
    assert [(e.position, e.total) for e in events if e.kind == "block"] == [(start + i, start + i + 8) for i in (0, 8, 16)]


def test_stops_end_it(llm):
    how = dict(method=SOON, max_tokens=40, temperature=1.0)
    seed, whole = next(
        (seed, out)
        for seed in range(40)
        if 1 in (out := llm.generate("a b", seed=seed, ignore_eos=True, **how)).tokens[:32]
    )
    ended = llm.generate("a b", seed=seed, **how)
    assert ended.tokens == whole.tokens[: whole.tokens.index(1) + 1]
    assert (ended.finish_reason, ended.stop) == ("stop", 1)
    assert ended.usage.forwards < whole.usage.forwards
    stop = whole.text[9:11]
    cut = llm.generate("a b", seed=seed, ignore_eos=True, stop=stop, **how)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop) == ("stop", stop)
    assert llm.generate("a b", seed=seed, **{**how, "max_tokens": 3}, ignore_eos=True).tokens == whole.tokens[:3]
    biased = llm.generate("a b", seed=seed, **how, ignore_eos=True, logit_bias={7: 100.0})
    assert set(biased.tokens) == {7}


def test_cut_offs_apply_to_what_is_drawn(llm):
    how = dict(method="diffusion-gemma:steps=6,bound=1e9", max_tokens=8, seed=2, ignore_eos=True)
    best = llm.generate("a b", **how)
    assert llm.generate("a b", temperature=1.0, top_k=1, **how).tokens == best.tokens
    assert llm.generate("a b", temperature=1.0, min_p=1.0, **how).tokens == best.tokens
    assert llm.generate("a b", temperature=1e-30, **how).tokens == best.tokens


def test_an_aborted_canvas_keeps_what_was_final(llm):
    params = SamplingParams(max_tokens=24, ignore_eos=True, seed=7)
    number = llm.engine.add(Request((5, 6, 7), params), llm.parts((SHORT,)))
    for _ in range(9):
        llm.engine.step()
    assert llm.engine.abort(number)
    out = next(event.output for event in llm.engine.step() if event.output is not None)
    whole = llm.generate([5, 6, 7], method=SHORT, max_tokens=24, ignore_eos=True, seed=7)
    assert (out.finish_reason, out.tokens) == ("abort", whole.tokens[:CANVAS])
    assert llm.engine.idle
    assert llm.engine.scheduler.pool.used_bytes == 0


def test_a_pass_that_fails_ends_its_row_and_no_other(llm, monkeypatch):
    params = SamplingParams(max_tokens=16, ignore_eos=True, seed=7)
    good = llm.generate([5, 6], method=SHORT, max_tokens=16, ignore_eos=True, seed=7)
    denoise = llm.model.denoise
    passes = 0

    def failing(context, ids, before=None):
        nonlocal passes
        passes += 1
        if passes == 2:
            raise RuntimeError("no luck")  # the pass of both; alone both get through
        return denoise(context, ids, before) * (float("nan") if context.length % 8 == 3 else 1)

    monkeypatch.setattr(llm.model, "denoise", failing)
    parts = llm.parts((SHORT,))
    outs = llm.engine.run([(Request(prompt, params), parts) for prompt in ((5, 6), (9, 6, 7))])
    assert outs[0][0].tokens == good.tokens
    assert outs[1][0].finish_reason == "error"


def test_what_canvases_of_masks_are_filled_with_is_refused_naming_both(llm):
    slugs = [one.slug for one in cards() if one.plugs_into == "unmask" and one.slug != "diffusion-gemma"]
    assert {"reference", "dream", "threshold", "canvas-cache", "freedave", "remask"} <= set(slugs)
    for slug in slugs:
        for method in (slug, ["diffusion-gemma", slug]):
            with pytest.raises(IncompatibleError, match="no mask token") as caught:
                llm.generate([5], method=method)
            assert repr(slug) in str(caught.value)
            assert repr(llm.name) in str(caught.value)
    for preset in ("fast", "few-step"):
        with pytest.raises(IncompatibleError, match="no mask token"):
            llm.generate([5], method=preset)
    with pytest.raises(IncompatibleError, match="'prompt-lookup' needs 'causal'"):
        llm.generate([5], method="prompt-lookup")
    with pytest.raises(IncompatibleError, match="combined"):
        llm.generate([5], method=["diffusion-gemma", SHORT])


def test_models_with_masks_refuse_it():
    for model in (Masked(), Masked(shift=1), Masked(block=8)):
        with pytest.raises(IncompatibleError, match="'diffusion-gemma' needs 'self_conditioning'") as caught:
            combine(("diffusion-gemma",), MethodContext("masks", model), PassCost)
        assert "'masks'" in str(caught.value)


def test_what_such_a_model_cannot_do_is_refused_by_name(llm):
    for field, wrong in (("repetition_penalty", 1.2), ("logprobs", 2), ("max_tokens", 128)):
        with pytest.raises(ConfigError) as caught:
            llm.generate([5], **{field: wrong})
        assert caught.value.field == field
    with pytest.raises(IncompatibleError, match="behind a slot"):
        llm.fill("a <mask:3> b")
    assert len(llm.fill("a <mask:3>").tokens) == 3
    with pytest.raises(UnsupportedError, match="whole canvases"):
        llm.embed("a")


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("bound", -0.5), ("t_min", -2.0), ("t_max", 0.0), ("stability", -2), ("confidence", float("nan"))],
)
def test_settings_outside_their_range_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})
    assert caught.value.field == f"diffusion-gemma.{field}"


def test_the_schedule_falls(llm):
    with pytest.raises(ConfigError, match="t_max"):
        Config(t_min=0.5, t_max=0.4)
    with pytest.raises(ConfigError, match="t_max"):
        llm.generate([5], method="diffusion-gemma:t_min=0.9")  # above the released first temperature
    assert Config(steps=3).over({"steps": 7, "bound": 2.0}) == Config(3, 2.0, 0.4, 0.8, 1, 0.005)


def test_the_server_answers_with_it(llm):
    want = llm.chat([{"role": "user", "content": "a b"}], max_tokens=12, seed=4)
    with serving({"tiny": llm}) as served, served.client() as client:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a b"}],
            "max_tokens": 12,
            "seed": 4,
            "temperature": 0,
        }
        answer = client.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == want.text
        assert answer["usage"]["completion_tokens"] == want.usage.completion_tokens
        refused = client.post("/v1/chat/completions", json={**body, "hasten": {"method": "threshold"}})
        assert refused.status_code == 400
        assert "no mask token" in refused.json()["error"]["message"]
