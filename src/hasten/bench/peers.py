"""Other programs that answer the same prompts, as runners of `hasten.bench.compare`: transformers and llama.cpp.

Each gets the same token ids, decodes greedily, past end tokens unless `ends` names some to stop at, and uses as many
threads as torch. What is not installed is left out, and why is said. llama.cpp runs through llama-cpp-python on the same
GGUF file, whose 4-bit weights it computes with as they are; its prompt lookup is the one that comes with that package.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.bench.compare import Answer, Prompt, Runner
from hasten.errors import IncompatibleError, MissingExtraError

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
    if path.suffix != ".gguf":
        raise IncompatibleError(f"transformers gets a folder or a GGUF file, and {path.name} is neither", field="peers")
    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()
    if kind != "llama":
        raise IncompatibleError(f"{path.name} is a GGUF file of {kind!r}; only those of Llama are read here", field="peers")
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


def transformers_peers(path: Path, dtype: torch.dtype, ends: Sequence[int] = ()) -> dict[str, Runner]:
    """transformers' `generate`, plain and with its own prompt lookup, on the weights of a GGUF file or folder in
    `dtype`."""
    model = transformers_folder(path, dtype) if path.is_dir() else transformers_model(path, dtype)

    def run(options: dict[str, Any]) -> Runner:
        def answer(prompt: Prompt, tokens: int) -> Answer:
            given = torch.tensor([prompt.ids])
            common: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(given)}
            common |= {"eos_token_id": list(ends)} if ends else {}
            start = time.perf_counter()
            model.generate(given, max_new_tokens=1, **common)
            first = time.perf_counter() - start
            start = time.perf_counter()
            least = 1 if ends else tokens
            out = model.generate(given, max_new_tokens=tokens, min_new_tokens=least, **common, **options)
            seconds = time.perf_counter() - start
            return Answer(tuple(out[0, len(prompt.ids) :].tolist()), seconds, seconds - first)

        return answer

    return {"transformers": run({}), "transformers prompt lookup": run({"prompt_lookup_num_tokens": 10})}


def transformers_folder(path: Path, dtype: torch.dtype) -> Any:
    """A checkpoint's folder as transformers loads it, its code never run; raises IncompatibleError where it cannot."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(f"transformers is not installed ({error})", hint="pip install 'hasten[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
    except (ValueError, OSError, KeyError) as error:
        raise IncompatibleError(f"transformers cannot load {path.name}: {str(error)[:200]}", field="peers") from None
    model.generation_config.eos_token_id = None
    return model


def _llama(path: Path, threads: int, **options: Any) -> Any:
    """The file opened by llama.cpp; raises IncompatibleError for what is no GGUF file, MissingExtraError without the
    package."""
    if path.suffix != ".gguf":
        raise IncompatibleError(f"llama.cpp reads GGUF files, and {path.name} is none", field="peers")
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


def llama_plain(path: Path, threads: int, ends: Sequence[int] = ()) -> dict[str, Runner]:
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
            while len(out) < tokens and out[-1] not in ends:
                model.eval(out[-1:])
                out.append(best())
            end = time.perf_counter()
            return Answer(tuple(out), end - start, end - first, len(out) - 1)

        return answer

    return {
        "llama.cpp": plain(_llama(path, threads)),
        "llama.cpp flash attention": plain(_llama(path, threads, flash_attn=True)),
    }


def llama_peers(path: Path, threads: int, ends: Sequence[int] = ()) -> dict[str, Runner]:
    """llama.cpp on the GGUF file: plain, with and without flash attention, and with its own prompt lookup.

    Raises MissingExtraError where llama-cpp-python is not installed.
    """
    found = llama_plain(path, threads, ends)
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
            if len(out) == tokens or out[-1] in ends:
                break
        end = time.perf_counter()
        return Answer(tuple(out), end - start, end - first, passes)

    return {**found, "llama.cpp prompt lookup": answer}


def peers(
    path: Path,
    dtype: torch.dtype,
    wanted: tuple[str, ...] = ("transformers", "llama.cpp"),
    ends: Sequence[int] = (),
    left_out: dict[str, str] | None = None,
) -> dict[str, Runner]:
    """The runners of all `wanted` peers that can be used; the others are named with why, in `left_out` or on stderr."""
    found: dict[str, Runner] = {}
    makers: dict[str, Callable[[], dict[str, Runner]]] = {
        "transformers": lambda: transformers_peers(path, dtype, ends),
        "llama.cpp": lambda: llama_peers(path, torch.get_num_threads(), ends),
    }
    for name in wanted:
        try:
            found |= makers[name]()
        except (MissingExtraError, IncompatibleError) as error:
            if left_out is None:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
            else:
                left_out[name] = str(error)
    return found
