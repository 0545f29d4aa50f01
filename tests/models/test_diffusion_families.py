"""Masked-diffusion families: real files under released names against plain computations, on both backbones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import canvases
import diffusion
import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.engine.contracts import Needs, RowInput
from hasten.engine.masks import FULL, BlockCausal, Explicit
from hasten.errors import ConfigError, FormatError, HastenError, MemoryFitError, UnsupportedError
from hasten.kernels import library
from hasten.models.config import ModelConfig
from hasten.models.families import config_from_hf, state_from_hf
from hasten.models.linear import Linear
from hasten.models.load import load
from hasten.models.moe import route
from hasten.models.native import NativeStack

native_only = pytest.mark.skipif(not library.available(), reason="the native library was not built")
FAMILIES = ("llada", "dream", "sdar", "fast", "llada2")


def on_both(*names: str):
    """Parameters `name` and `backbone`: every family on torch, and on the native stack where that runs it."""
    pairs = [(name, "torch") for name in names]
    pairs += [pytest.param(name, "native", marks=native_only) for name in names if name not in diffusion.ON_TORCH]
    return pytest.mark.parametrize(("name", "backbone"), pairs)


def ids(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed))


def sight(name: str) -> tuple[object, int | None]:
    """(the family's own visibility, its block)."""
    block = diffusion.block_of(diffusion.VARIANTS[name])
    return (FULL, None) if block is None else (BlockCausal(block), block)


def loaded(name: str, folder: Path, **how):
    config = diffusion.VARIANTS[name]
    weights = diffusion.state(config)
    diffusion.write(folder, config, weights)
    return load(folder, **how), config, weights


def dense(model, tokens: torch.Tensor, visibility) -> torch.Tensor:
    return model.run([RowInput(tokens, torch.arange(len(tokens)), None, visibility, "all")]).logits


@pytest.mark.parametrize("name", diffusion.VARIANTS)
def test_logits_are_those_of_the_plain_computation(name, tmp_path):
    done, config, weights = loaded(name, tmp_path, backbone="torch")
    tokens = ids(37)
    visibility, block = sight(name)
    want = diffusion.plain(config, weights, tokens, None if block is None else diffusion.blocks(37, block))
    assert want.std() > (0.01 if config.get("scale_logits") else 0.1)  # a comparison of zeros would prove nothing
    # 1e-5 of the largest logit, where it has to be 1e-4: processors differ in the order in which their kernels add
    bound = min(1e-4, 1e-5 * float(want.abs().max())) if config["model_type"] in ("llada", "Dream") else 1e-4
    assert (done.model(tokens[None])[0] - want).abs().max() <= bound  # sees by itself what the family sees
    for module in done.model.modules():
        if isinstance(module, Linear):
            module.unpack()  # where float32 is packed, its weights are no parameters
    head, embed = done.model.head.weight, done.model.embed.weight
    twice = head.numel() if head is not embed and torch.equal(head, embed) else 0  # tied, until the head was packed
    assert sum(p.numel() for p in done.model.parameters()) - twice == done.config.parameters
    assert (dense(done.model.pack(), tokens, visibility) - want).abs().max() <= bound


@native_only
@pytest.mark.parametrize("name", [name for name in diffusion.VARIANTS if name not in diffusion.ON_TORCH])
def test_the_native_stack_gives_the_same(name, tmp_path):
    done, config, weights = loaded(name, tmp_path)
    assert done.model.name == "native"
    tokens = ids(37)
    for visibility, allowed in ((FULL, None), (BlockCausal(8), diffusion.blocks(37, 8))):
        want = diffusion.plain(config, weights, tokens, allowed)
        assert (dense(done.model, tokens, visibility) - want).abs().max() <= 1e-4
    needs = Needs(hidden=(0, 2), final_hidden=True, embeds=True)
    row = RowInput(tokens, torch.arange(37), None, FULL, "all")
    here, there = done.model.run([row], needs), done.model.oracle.run([row], needs)
    assert here.best == there.logits.argmax(-1).tolist()
    for mine, other in (
        (here.final_hidden, there.final_hidden),
        (here.embeds, there.embeds),
        *zip(here.hidden.values(), there.hidden.values()),
    ):
        assert (mine - other).abs().max() <= 1e-4 * max(1, other.abs().max())


@native_only
@pytest.mark.parametrize("name", sorted(diffusion.ON_TORCH))
def test_what_the_native_stack_lacks_runs_on_torch_and_says_so(name, tmp_path):
    done, *_ = loaded(name, tmp_path)
    assert done.model.name == "torch"
    assert done.model.run([RowInput(ids(5), torch.arange(5))]).backbone == "torch"
    for how in ({"backbone": "native"}, {"activations": "int8"}, {"weights": "int4"}):
        with pytest.raises(UnsupportedError, match="the native stack has no"):
            load(tmp_path, **how)
    with pytest.raises(UnsupportedError, match="the native stack has no"):
        NativeStack(done.config, None)


def test_what_a_model_offers_is_declared(tmp_path):
    expected = {"llada": (0, None, None), "dream": (1, None, None), "sdar": (0, 4, None), "llada2": (0, 8, None)}
    expected["fast"] = (1, 8, None)
    for name in FAMILIES:
        done, *_ = loaded(name, tmp_path / name)
        c = done.model.capabilities
        assert (c.kind, c.mask_id, c.eos_ids) == ("masked", 290, (281,))
        assert (c.logit_shift, c.block, c.eot_id) == expected[name]
        assert c.cache_exact == ({"block_causal"} if c.block else frozenset())
        assert {"full", "block_causal"} <= c.visibilities
        assert [c.has(need) for need in ("masked", "mask_id", "causal")] == [True, True, False]
    assert done.config.max_len == 128
    assert config_from_hf(diffusion.DREAM).max_len == 131072  # as config.json says; 2048 is what is documented


@on_both(*FAMILIES)
def test_ragged_rows_of_one_pass_are_those_of_each_alone(name, backbone, tmp_path):
    done, config, weights = loaded(name, tmp_path, backbone=backbone)
    visibility, block = sight(name)
    rows = [ids(n, seed=n) for n in (1, 9, 30, 4)]
    out = done.model.run([RowInput(one, torch.arange(len(one)), None, visibility, "all") for one in rows])
    for i, one in enumerate(rows):
        want = diffusion.plain(config, weights, one, None if block is None else diffusion.blocks(len(one), block))
        assert (out.row_logits(i) - want).abs().max() <= 1e-4
        alone = dense(done.model, one, visibility)
        assert (out.row_logits(i) - alone).abs().max() <= (0 if backbone == "native" else 1e-5)


@on_both(*FAMILIES)
def test_queries_may_be_wanted_in_any_order_and_twice(name, backbone, tmp_path):
    """As many as there are queries, too: that is no request for all of them."""
    done, config, weights = loaded(name, tmp_path, backbone=backbone)
    visibility, block = sight(name)
    tokens, wanted = ids(6), (0, 0, 1, 2, 3, 4)
    want = diffusion.plain(config, weights, tokens, None if block is None else diffusion.blocks(6, block))
    out = done.model.run([RowInput(tokens, torch.arange(6), None, visibility, wanted)])
    assert (out.logits - want[list(wanted)]).abs().max() <= 1e-4


@on_both("sdar", "fast")
def test_blocks_go_by_position_wherever_keys_are_stored(name, backbone, tmp_path):
    """Slots that are no positions take the way through a mask; a cache that is full says so."""
    done, config, weights = loaded(name, tmp_path, backbone=backbone)
    visibility, b = sight(name)
    tokens, order = ids(6 * b), torch.randperm(6 * b, generator=torch.Generator().manual_seed(2))
    cache = done.model.pool(8_000_000).open(6 * b)
    want = diffusion.plain(config, weights, tokens, diffusion.blocks(6 * b, b))
    out = done.model.run([RowInput(tokens[order], order, cache, visibility, "all", start=0)])
    assert (out.logits - want[order]).abs().max() <= 1e-4
    cache.advance(6 * b)
    with pytest.raises(MemoryFitError):
        done.model.run([RowInput(tokens[:65], torch.arange(65), cache, visibility, "all")])


@on_both("sdar", "fast", "llada2")
def test_a_block_over_its_cache_is_that_of_the_whole_pass(name, backbone, tmp_path):
    """Prefill whole blocks, then denoise a block several times over them, store it, and go on; two ragged rows at once."""
    done, config, weights = loaded(name, tmp_path, backbone=backbone)
    _, b = sight(name)
    visibility, model = BlockCausal(b), done.model
    rows = [ids(5 * b, seed=3), ids(4 * b, seed=4)]
    cut = [2 * b, b]  # whole blocks that are prefilled
    caches = [model.pool(8_000_000).open(64) for _ in rows]
    model.run([RowInput(one[:n], torch.arange(n), cache, visibility, "none") for one, n, cache in zip(rows, cut, caches)])
    for cache, n in zip(caches, cut):
        cache.advance(n)
    for step in range(3):
        spans = [torch.arange(n + step * b, n + (step + 1) * b) for n in cut]
        noisy = [one[span].clone() for one, span in zip(rows, spans)]
        for one in noisy:
            one[1::2] = model.capabilities.mask_id
        for tokens in (noisy, [one[span] for one, span in zip(rows, spans)]):  # the last pass stores clean keys
            inputs = [
                RowInput(part, span, cache, visibility, "all", start=int(span[0]))
                for part, span, cache in zip(tokens, spans, caches)
            ]
            out = model.run(inputs)
            for i, (part, span) in enumerate(zip(tokens, spans)):
                whole = torch.cat((rows[i][: span[0]], part))
                want = diffusion.plain(config, weights, whole, diffusion.blocks(len(whole), b))[span]
                assert (out.row_logits(i) - want).abs().max() <= 1e-4
        for cache in caches:
            cache.advance(b)


def plain_text(config: dict, weights: diffusion.State, prompt: list[int], length: int, size: int) -> list[int]:
    """One token a pass, the surest of its block first, by plain computation of the whole canvas."""
    x, block, shift = [*prompt, *[290] * length], diffusion.block_of(config), config["model_type"] in diffusion.SHIFTED
    for low in range(len(prompt) // size * size if block else len(prompt), len(x), size):
        high = min(low + size, len(x))
        while 290 in x[low:high]:
            seen = torch.tensor(x[:high] if block else x)
            logits = diffusion.plain(config, weights, seen, diffusion.blocks(len(seen), block) if block else None)
            logits = torch.cat((logits[:1], logits[:-1])) if shift else logits
            logits[:, 290] = -torch.inf
            probs = logits.softmax(-1).max(-1)
            best = max((i for i in range(low, high) if x[i] == 290), key=lambda i: float(probs.values[i]))
            x[best] = int(probs.indices[best])
    return x[len(prompt) :]


@on_both(*FAMILIES)
def test_the_engine_fills_canvases_as_a_plain_loop_does(name, backbone, tmp_path):
    done, config, weights = loaded(name, tmp_path, backbone=backbone)
    block = diffusion.block_of(config)
    prompts = [(ids(n, seed=n) % 280).tolist() for n in (3, 11, 6, 8, 16)]  # of 8 and 16: blocks begin behind the prompt
    method = "threshold:tau=2" if block else "reference:block=6,steps=12"
    for prompt, out in zip(prompts, canvases.run(done.model, prompts, method, max_tokens=12)):
        assert list(out.tokens) == plain_text(config, weights, prompt, 12, block or 6)


@on_both(*FAMILIES)
def test_a_query_that_sees_nothing_gives_numbers_all_the_same(name, backbone, tmp_path):
    """Ragged rows have no padding; a row that is masked as a whole is the worst that a rule of sight can ask for."""
    done, config, weights = loaded(name, tmp_path, backbone=backbone)
    tokens = ids(6)
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed[:, :2] = False  # two positions of padding that nobody sees
    allowed[:2] = False  # and that see nobody
    logits = dense(done.model, tokens, Explicit(allowed))
    assert bool(logits.isfinite().all())
    if name in ("llada", "dream"):  # without positions that hold something, padding on the left only moves the rest
        want = diffusion.plain(config, weights, tokens[2:])
        assert (logits[2:] - want).abs().max() <= 1e-4
    assert bool(dense(done.model, tokens, Explicit(torch.zeros(6, 6, dtype=torch.bool))).isfinite().all())


def test_every_stored_tensor_is_used_and_none_is_missing(tmp_path):
    for name, config in diffusion.VARIANTS.items():
        weights, ours = diffusion.state(config), config_from_hf(config)
        state = dict(state_from_hf(ours, list(weights), weights.__getitem__))
        stored = sum(one.numel() for key, one in weights.items())
        padding = (len(weights["model.transformer.wte.weight"]) - 300) if config["model_type"] == "llada" else 0
        tables = sum(key.endswith(("wte.weight", "transformer.ff_out.weight")) for key in weights)
        biases = sum(key.endswith("transformer.ff_out.bias") for key in weights)
        assert sum(one.numel() for one in state.values()) == stored - padding * (64 * tables + biases), name
        key = sorted(weights)[len(weights) // 2]
        for change, match in (
            ({**weights, "model.extra.weight": torch.zeros(1)}, "extra"),
            ({k: v for k, v in weights.items() if k != key}, "missing|place"),
        ):
            with pytest.raises(FormatError, match=match):
                list(state_from_hf(ours, list(change), change.__getitem__))


@on_both(*FAMILIES)
def test_half_precision_files_become_float32(name, backbone, tmp_path):
    config = diffusion.VARIANTS[name]
    weights = diffusion.state(config)
    diffusion.write(tmp_path, config, weights, torch.float16)
    done = load(tmp_path, backbone=backbone)
    assert done.dtype == torch.float32
    tokens = ids(20)
    visibility, block = sight(name)
    halved = {key: one.half().float() for key, one in weights.items()}
    want = diffusion.plain(config, halved, tokens, None if block is None else diffusion.blocks(20, block))
    assert (dense(done.model, tokens, visibility) - want).abs().max() <= 1e-4


def test_the_bias_of_the_router_stays_float32(tmp_path):
    done, *_ = loaded("llada2", tmp_path, dtype="bfloat16")
    layer = done.model.layers[1].experts
    assert layer.bias.dtype == torch.float32
    assert layer.router.dtype == layer.gate_up.dtype == torch.bfloat16
    assert bool(dense(done.model, ids(9), FULL).isfinite().all())


def test_the_router_chooses_within_the_best_groups():
    e = config_from_hf(diffusion.LLADA2).experts
    router = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(16)
    bias[5] = 10.0  # decides the choice, not the weight
    chosen, weights = route(x, router, bias, e)
    assert bool((chosen == 5).any(-1).all())
    assert weights.sum(-1).allclose(torch.tensor(2.5))
    assert all(len(set((row // 4).tolist())) <= 2 for row in chosen)
    scores = (x @ router.T).sigmoid().gather(-1, chosen)
    assert weights.allclose(2.5 * scores / scores.sum(-1, keepdim=True), atol=1e-6)
    everything = dataclasses.replace(e, groups=1, active_groups=1, normalised=False, scale=1.0)
    chosen, weights = route(x, router, None, everything)
    assert weights.allclose((x @ router.T).sigmoid().topk(3).values)


def test_experts_can_be_trained(tmp_path):
    done, *_ = loaded("llada2", tmp_path, backbone="torch")
    done.model.requires_grad_(True)
    done.model(ids(12)[None]).square().mean().backward()
    for part in ("gate_up", "down", "router"):
        assert getattr(done.model.layers[1].experts, part).grad.abs().sum() > 0


# --- special tokens ---


def with_tokenizer(folder: Path, specials: dict[str, int], mask: str | None = None) -> None:
    """A byte-level tokenizer of 256 tokens in `folder`, with control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(alphabet)}
    vocab |= {f"[unused{i}]": i for i in range(256, max(specials.values()) + 1) if i not in specials.values()}
    vocab |= specials
    fast = Tokenizer(models.BPE(vocab, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": mask} if mask else {}))


def test_text_that_looks_like_a_mask_stays_text(tmp_path):
    diffusion.write(tmp_path, diffusion.LLADA, diffusion.state(diffusion.LLADA))
    with_tokenizer(tmp_path, {"<|endoftext|>": 281, "<|mdm_mask|>": 290, "<|eot_id|>": 292}, "<|mdm_mask|>")
    done = load(tmp_path)
    text = "fill <|mdm_mask|> in<|eot_id|>"
    typed = done.tokenizer.encode(text)
    assert {281, 290, 292}.isdisjoint(typed)
    assert done.tokenizer.decode(typed) == text
    assert 290 in done.tokenizer.encode(text, special=True)
    assert done.tokenizer.special_id("<|mdm_mask|>") == done.model.capabilities.mask_id == 290
    assert done.tokenizer.special_id("a") is None
    assert done.model.capabilities.eot_id == 292


def test_the_mask_comes_from_the_config_then_the_tokenizer_then_the_family(tmp_path):
    without = {key: value for key, value in diffusion.LLADA.items() if key != "mask_token_id"}
    weights = diffusion.state(diffusion.LLADA)
    specials = {"<|endoftext|>": 281, "<|mdm_mask|>": 288}
    diffusion.write(tmp_path / "both", diffusion.LLADA, weights)
    with_tokenizer(tmp_path / "both", specials, "<|mdm_mask|>")
    assert load(tmp_path / "both").config.mask_id == 290
    diffusion.write(tmp_path / "tokenizer", without, weights)
    with_tokenizer(tmp_path / "tokenizer", specials, "<|mdm_mask|>")
    assert load(tmp_path / "tokenizer").config.mask_id == 288
    assert load(tmp_path / "tokenizer").config.eot_id is None
    diffusion.write(tmp_path / "neither", without, weights)
    with pytest.raises(ConfigError, match="mask_token_id") as caught:
        load(tmp_path / "neither")
    assert caught.value.field == "mask_id"


def test_released_ids_hold_where_nothing_is_said():
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "mask_token_id", "block_size", "bd_size")
    released = dict.fromkeys(names)
    big = {"vocab_size": 160000, "embedding_size": None, "max_position_embeddings": 4096}
    want = {
        "llada": (126336, 126348, 0, None), "dream": (151666, 151645, 1, None), "sdar": (151669, 151645, 0, 4),
        "llada2": (156895, None, 0, 32), "fast": (151665, 151645, 1, 32),
    }  # fmt: skip
    for name, facts in want.items():
        c = config_from_hf({**diffusion.VARIANTS[name], **released, **big})
        assert (c.mask_id, c.eot_id, c.logit_shift, c.block) == facts


def test_the_released_sizes_are_those_that_are_published():
    llada = {
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
        "embedding_size": 126464, "mask_token_id": 126336, "pad_token_id": 126081, "eos_token_id": 126081,
    }  # fmt: skip
    dream = {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064,
    }  # fmt: skip
    mini = {
        "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": 5120, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "n_group": 8,
        "topk_group": 4, "vocab_size": 157184,
    }  # fmt: skip
    for base, sizes, billions in (
        (diffusion.LLADA, llada, 8.02),
        (diffusion.DREAM, dream, 7.62),
        (diffusion.FAST, {**dream, "layer_types": ["full_attention"] * 28}, 7.62),  # Qwen2.5 7B, as Dream is
        (diffusion.LLADA2, mini, 16.26),
    ):
        assert config_from_hf({**base, **sizes}).parameters / 1e9 == pytest.approx(billions, abs=0.01)


# --- configs that are wrong ---

WRONG = [
    ("llada", "mask_token_id", 300, "mask_id"), ("llada", "mask_token_id", 281, "mask_id"),
    ("llada", "mask_token_id", "x", "mask_token_id"), ("llada", "mask_token_id", -3, "mask_token_id"),
    ("llada", "n_heads", 5, "n_heads"), ("llada", "n_kv_heads", 3, "kv_heads"), ("llada", "block_group_size", 3, "block_group_size"),
    ("llada", "embedding_size", 200, "embedding_size"), ("llada", "block_type", "sequential", "block_type"),
    ("llada", "layer_norm_type", "default", "layer_norm_type"), ("llada", "activation_type", "swiglu", "activation_type"),
    ("llada", "alibi", True, "alibi"), ("llada", "rope", False, "rope"), ("llada", "bias_for_layer_norm", True, "bias_for_layer_norm"),
    ("llada", "rope_theta", None, "rope_theta"), ("llada", "max_sequence_length", None, "max_sequence_length"),
    ("llada", "eos_token_id", 290, "mask_id"), ("llada", "layer_norm_with_affine", False, "layer_norm_with_affine"),
    ("dream", "rope_theta", None, "rope_theta"), ("dream", "rms_norm_eps", None, "rms_norm_eps"),
    ("dream", "use_mrope", True, "use_mrope"), ("dream", "pad_token_id", 290, "mask_id"),
    ("sdar", "block_size", 0, "block"), ("sdar", "block_size", 2.5, "block_size"), ("sdar", "block_size", 129, "block"),
    ("fast", "bd_size", 0, "block"), ("fast", "bd_size", "x", "bd_size"), ("fast", "mask_token_id", 281, "mask_id"),
    ("fast", "layer_types", ["full_attention"], "layer_types"),
    ("llada2", "n_group", 3, "experts.groups"), ("llada2", "n_group", 16, "experts.groups"),
    ("llada2", "topk_group", 5, "experts.active_groups"), ("llada2", "num_experts_per_tok", 9, "experts.active"),
    ("llada2", "num_experts_per_tok", 0, "experts.active"), ("llada2", "score_function", "softmax", "score_function"),
    ("llada2", "routed_scaling_factor", 0, "experts.scale"), ("llada2", "partial_rotary_factor", 0, "rope.partial"),
    ("llada2", "num_experts", -1, "experts.count"), ("llada2", "moe_intermediate_size", None, "moe_intermediate_size"),
    ("llada2", "norm_head", True, "norm_head"), ("llada2", "use_sliding_window", True, "use_sliding_window"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value", "field"), WRONG)
def test_a_wrong_config_is_refused_by_the_name_of_its_field(name, key, value, field):
    with pytest.raises(HastenError) as caught:
        config_from_hf({**diffusion.VARIANTS[name], key: value})
    assert caught.value.field == field
    assert field in str(caught.value)


def test_biased_norms_are_refused_where_null_means_them():
    with pytest.raises(UnsupportedError, match="bias_for_layer_norm"):
        config_from_hf({**diffusion.LLADA, "include_bias": True, "bias_for_layer_norm": None})


def test_no_field_crashes_whatever_it_holds():
    junk = (None, -1, 0, 1, 3, "x", [], {}, True, 2.5, float("nan"), float("inf"), 1e30, [1, "a"], 2**40)
    for name, config in diffusion.VARIANTS.items():
        for key in config:
            if key in ("model_type", "architectures"):
                continue
            for value in junk:
                try:
                    made = config_from_hf({**config, key: value})
                except HastenError as error:
                    assert error.field, (name, key, value)
                else:
                    assert isinstance(made, ModelConfig)


def test_a_causal_config_has_no_mask_and_no_block():
    causal = dataclasses.replace(config_from_hf(diffusion.DREAM), kind="causal", mask_id=None, logit_shift=0)
    for name, value in (("mask_id", 5), ("logit_shift", 1), ("block", 4), ("kind", "other")):
        with pytest.raises(ConfigError) as caught:
            dataclasses.replace(causal, **{name: value})
        assert caught.value.field == name
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(causal, qk_norm=True, qk_norm_whole=True)
    assert caught.value.field == "qk_norm"
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config_from_hf(diffusion.DREAM), logit_shift=2)
    assert caught.value.field == "logit_shift"


@pytest.mark.parametrize("change", ["rows", "experts"])
def test_weights_of_another_shape_are_named(change, tmp_path):
    name, key = (
        ("llada", "model.transformer.wte.weight")
        if change == "rows"
        else ("llada2", "model.layers.1.mlp.experts.3.up_proj.weight")
    )
    config = diffusion.VARIANTS[name]
    diffusion.write(tmp_path, config, diffusion.state(config))
    weights = load_file(tmp_path / "model.safetensors")
    weights[key] = weights[key][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="embed" if change == "rows" else r"experts\.3"):
        load(tmp_path)
