"""Other programs that answer the same prompts, as runners of `hasten.bench.compare`: transformers and llama.cpp.

Each gets the same token ids, decodes greedily past end tokens, and uses as many threads as torch. What is not installed is
left out, and why is said. llama.cpp runs through llama-cpp-python on the same GGUF file, whose 4-bit weights it computes
with as they are; its prompt lookup is the one that comes with that package.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.bench.compare import Answer, Prompt, Runner
from hasten.errors import MissingExtraError

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
}
WINDOW = 2048  # tokens of llama.cpp's context; its prompt lookup keeps the logits of all of them


def transformers_model(path: Path, dtype: torch.dtype) -> Any:
    """The GGUF file as a transformers LlamaForCausalLM in `dtype`, dequantised by the gguf package."""
    try:
        import gguf
        import transformers
    except ImportError as error:
        raise MissingExtraError(f"transformers is not installed ({error})", hint="pip install 'hasten[hf]'") from None
    reader = gguf.GGUFReader(path)
    stored = {t.name: t for t in reader.tensors}

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = transformers.LlamaConfig(
        vocab_size=len(stored["token_embd.weight"].data),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        tensor = stored[block + _NAMES[".".join(parts[2:] if block else parts)] + ".weight"]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(parts[-1])
        if heads:  # GGUF stores rotary pairs next to each other, transformers as two halves
            rows, columns = weight.shape
            weight = weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        state[name] = torch.from_numpy(np.ascontiguousarray(weight))
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.to(dtype)


def transformers_peers(path: Path, dtype: torch.dtype) -> dict[str, Runner]:
    """transformers' `generate`, plain and with its own prompt lookup, on the file's weights in `dtype`."""
    model = transformers_model(path, dtype)

    def run(options: dict[str, Any]) -> Runner:
        def answer(prompt: Prompt, tokens: int) -> Answer:
            given = torch.tensor([prompt.ids])
            common = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(given)}
            start = time.perf_counter()
            model.generate(given, max_new_tokens=1, **common)
            first = time.perf_counter() - start
            start = time.perf_counter()
            out = model.generate(given, max_new_tokens=tokens, min_new_tokens=tokens, **common, **options)
            seconds = time.perf_counter() - start
            return Answer(tuple(out[0, len(prompt.ids) :].tolist()), seconds, seconds - first)

        return answer

    return {"transformers": run({}), "transformers prompt lookup": run({"prompt_lookup_num_tokens": 10})}


def _llama(path: Path, threads: int, **options: Any) -> Any:
    """The file opened by llama.cpp; raises MissingExtraError where llama-cpp-python is not installed."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # its shared library may be missing or made for another machine
        raise MissingExtraError(
            f"llama-cpp-python cannot be used ({error})",
            hint="pip install llama-cpp-python, or pip install 'hasten[bench]'",
        ) from None
    return llama_cpp.Llama(
        model_path=str(path), n_ctx=WINDOW, n_threads=threads, n_threads_batch=threads, verbose=False, **options
    )


def llama_plain(path: Path, threads: int) -> dict[str, Runner]:
    """llama.cpp on the GGUF file without drafts, with flash attention off and on: one pass and an arg-max per token.

    Raises MissingExtraError where llama-cpp-python is not installed.
    """

    def plain(model: Any) -> Runner:
        vocab = model.n_vocab()

        def best() -> int:
            return int(np.ctypeslib.as_array(model._ctx.get_logits(), shape=(vocab,)).argmax())

        def answer(prompt: Prompt, tokens: int) -> Answer:
            model.reset()
            start = time.perf_counter()
            model.eval(prompt.ids)
            out = [best()]
            first = time.perf_counter()
            while len(out) < tokens:
                model.eval(out[-1:])
                out.append(best())
            end = time.perf_counter()
            return Answer(tuple(out), end - start, end - first, tokens - 1)

        return answer

    return {
        "llama.cpp": plain(_llama(path, threads)),
        "llama.cpp flash attention": plain(_llama(path, threads, flash_attn=True)),
    }


def llama_peers(path: Path, threads: int) -> dict[str, Runner]:
    """llama.cpp on the GGUF file: plain, with and without flash attention, and with its own prompt lookup.

    Raises MissingExtraError where llama-cpp-python is not installed.
    """
    found = llama_plain(path, threads)
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    model = _llama(path, threads, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10))
    passes = 0
    evaluate = model.eval

    def counted(tokens: Any) -> None:
        nonlocal passes
        passes += 1
        evaluate(tokens)

    model.eval = counted

    def answer(prompt: Prompt, tokens: int) -> Answer:
        nonlocal passes
        model.reset()
        start = first = time.perf_counter()
        out: list[int] = []
        for token in model.generate(list(prompt.ids), temp=0.0, repeat_penalty=1.0):
            out.append(int(token))
            if len(out) == 1:
                first, passes = time.perf_counter(), 0
            if len(out) == tokens:
                break
        end = time.perf_counter()
        return Answer(tuple(out), end - start, end - first, passes)

    return {**found, "llama.cpp prompt lookup": answer}


def peers(path: Path, dtype: torch.dtype, wanted: tuple[str, ...] = ("transformers", "llama.cpp")) -> dict[str, Runner]:
    """The runners of all `wanted` peers that are installed; the others are named on stderr with the reason."""
    found: dict[str, Runner] = {}
    makers: dict[str, Callable[[], dict[str, Runner]]] = {
        "transformers": lambda: transformers_peers(path, dtype),
        "llama.cpp": lambda: llama_peers(path, torch.get_num_threads()),
    }
    for name in wanted:
        try:
            found |= makers[name]()
        except MissingExtraError as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    return found
