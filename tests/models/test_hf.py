"""The transformers adapter: families hasten does not implement, over hasten's cache, against transformers itself."""

from __future__ import annotations

import json
import random

import checkpoints
import pytest
import torch

import hasten
from hasten.engine.contracts import Needs, RowInput
from hasten.errors import FormatError, MissingExtraError, UnsupportedError
from hasten.models import hf
from hasten.models.load import load


@pytest.fixture(scope="module", params=list(checkpoints.ADAPTED))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = checkpoints.build(request.param)
    reference.save_pretrained(folder)
    return reference, folder


def test_logits_over_our_cache_are_the_models_own(pair):
    reference, folder = pair
    model = load(folder).model
    assert model.name == "transformers"
    ids = checkpoints.ids(1, 40)[0]
    with torch.no_grad():
        out = reference(ids[None], output_hidden_states=True)
    row = model.pool(50_000_000).open(40)
    got = [model.run([RowInput(ids[:25], torch.arange(25), row, logits="all")]).logits]
    row.advance(25)
    for i in range(25, 40):
        got.append(model.run([RowInput(ids[i : i + 1], torch.tensor([i]), row)]).logits)
        row.advance(1)
    assert (torch.cat(got) - out.logits[0]).abs().max() <= 1e-4
    passed = model.run([RowInput(ids, torch.arange(40))], Needs(hidden=(1,), final_hidden=True))
    assert (passed.hidden[1] - out.hidden_states[1][0]).abs().max() <= 1e-4
    assert (passed.final_hidden - out.hidden_states[-1][0]).abs().max() <= 1e-4


def test_generation_batched_and_drafted_is_plain_generation(pair):
    reference, folder = pair
    llm = hasten.load(folder, cache_bytes=50_000_000)
    r = random.Random(0)
    prompts = [[r.randrange(3, 300) for _ in range(n)] * 3 for n in (2, 5, 9)]
    plain = llm.generate(prompts, max_tokens=20, ignore_eos=True, method="plain")
    for prompt, output in zip(prompts, plain):
        with torch.no_grad():
            text = list(prompt)
            for _ in range(20):
                text.append(int(reference(torch.tensor([text])).logits[0, -1].argmax()))
        assert list(output.tokens) == text[len(prompt) :]
        assert llm.generate(prompt, max_tokens=20, ignore_eos=True, method="plain").tokens == output.tokens
    for sampling in ({}, {"temperature": 0.8, "seed": 5}):
        want = llm.generate(prompts, max_tokens=20, ignore_eos=True, method="plain", **sampling)
        drafted = llm.generate(prompts, max_tokens=20, ignore_eos=True, method="prompt-lookup", **sampling)
        assert [o.tokens for o in drafted] == [o.tokens for o in want]


def test_needs_it_cannot_meet_are_refused(pair):
    _, folder = pair
    model = load(folder).model
    row = RowInput(torch.tensor([1]), torch.tensor([0]))
    for needs in (Needs(embeds=True), Needs(pseudo=1), Needs(hidden=(99,))):
        assert not model.serves([row], needs)
        with pytest.raises(UnsupportedError):
            model.run([row], needs)


def test_a_family_of_ours_gives_the_same_logits_through_both_ways(tmp_path):
    for name in ("llama", "gemma2", "qwen3"):
        folder = tmp_path / name
        checkpoints.build(name).save_pretrained(folder)
        adapted = hf.load_adapted(folder, json.loads((folder / "config.json").read_text()), torch.float32, 10**9)
        ids = checkpoints.ids(1, 30)[0]
        rows = [RowInput(ids, torch.arange(30), logits="all")]
        assert (adapted.run(rows).logits - load(folder).model.run(rows).logits).abs().max() <= 1e-4


def test_code_beside_a_checkpoint_is_never_executed(tmp_path):
    checkpoints.build("olmo2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    assert load(tmp_path).model.name == "transformers"
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="evil"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_error_names_the_extra(tmp_path, monkeypatch):
    import sys

    checkpoints.build("olmo2").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"hasten\[hf\]"):
        load(tmp_path)


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="t5"):
        load(tmp_path)


def test_a_config_larger_than_its_files_is_refused_before_anything_is_allocated(tmp_path):
    checkpoints.build("olmo2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 65536}))
    with pytest.raises(FormatError, match="parameters, the files hold"):
        load(tmp_path)
