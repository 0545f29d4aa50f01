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

WINDOW = 2048  # tokens of llama.cpp's context; its prompt lookup keeps the logits of all of them


def transformers_peers(path: Path, dtype: torch.dtype) -> dict[str, Runner]:
    """transformers' `generate`, plain and with its own prompt lookup, on the file's weights in `dtype`."""
    try:
        from plain import peer
    except ImportError as error:
        raise MissingExtraError(f"transformers is not installed ({error})", hint="pip install 'hasten[bench]'") from None
    model = peer(path, dtype)

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


def llama_peers(path: Path, threads: int) -> dict[str, Runner]:
    """llama.cpp on the GGUF file: plain, with and without flash attention, and with its own prompt lookup.

    Raises MissingExtraError where llama-cpp-python is not installed.
    """
    try:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
    except (ImportError, OSError, RuntimeError) as error:  # its shared library may be missing or made for another machine
        raise MissingExtraError(
            f"llama-cpp-python cannot be used ({error})",
            hint="pip install llama-cpp-python, or pip install 'hasten[bench]'",
        ) from None

    def opened(**options: Any) -> Any:
        return llama_cpp.Llama(
            model_path=str(path), n_ctx=WINDOW, n_threads=threads, n_threads_batch=threads, verbose=False, **options
        )

    def plain(model: Any) -> Runner:
        """The least work per token: one pass, and the arg-max of its logits without a sampler."""
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

    def drafted(model: Any) -> Runner:
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

        return answer

    return {
        "llama.cpp": plain(opened()),
        "llama.cpp flash attention": plain(opened(flash_attn=True)),
        "llama.cpp prompt lookup": drafted(opened(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10))),
    }


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
