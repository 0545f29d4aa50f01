"""The real model: greedy text of transformers, and batches that change nothing."""

from __future__ import annotations

import gguf
import gguf_files
import numpy as np
import pytest
import torch
import transformers

import hasten

PROMPTS = [
    "The capital of France is", "Once upon a time, in a small village,", "def fibonacci(n):\n", "Water boils at",
    "Dear Sir or Madam,", "1, 2, 3, 4,", "The three primary colours are", "In 1969, people first", "import numpy as np\n",
    "Q: What is the largest planet?\nA:", "My favourite recipe begins with", "The mitochondria are", "To be, or not to be,",
    "SELECT name FROM users WHERE", "She opened the door and", "The square root of 144 is", "Photosynthesis is the process",
    "Roses are red,", "Breaking news: scientists", "The opposite of hot is",
]  # fmt: skip


@pytest.fixture(scope="module")
def llm(smollm2_gguf):
    return hasten.load(smollm2_gguf, dtype="float32", cache_bytes=400_000_000)


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    """The same file in transformers, read by the gguf package's own reader."""
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        for t in gguf.GGUFReader(smollm2_gguf).tensors
    }
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        values = tensors[gguf_files._name(name, False)]
        if "q_proj" in name or "k_proj" in name:
            values = gguf_files.halves(values, 9 if "q_proj" in name else 3)
        state[name] = torch.from_numpy(np.ascontiguousarray(values))
    assert set(model.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def test_greedy_text_is_that_of_transformers(llm, reference):
    ids = [llm.encode(prompt) for prompt in PROMPTS]
    ours = llm.generate(ids, max_tokens=64, ignore_eos=True, method="plain")
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    theirs = reference.generate(padded, attention_mask=seen, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert [list(o.tokens) for o in ours] == theirs[:, width:].tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 11}], ids=["greedy", "seeded"])
def test_alone_in_fours_and_ragged_the_tokens_are_the_same(llm, sampling):
    prompts = [PROMPTS[i] * (1 + 3 * (i % 3)) for i in range(8)]
    alone = [llm.generate(p, max_tokens=24, method="plain", **sampling).tokens for p in prompts]
    fours = [
        o.tokens for at in (0, 4) for o in llm.generate(prompts[at : at + 4], max_tokens=24, method="plain", **sampling)
    ]
    ragged = [o.tokens for o in llm.generate(prompts, max_tokens=24, method="prompt-lookup", **sampling)]
    assert fours == alone
    assert ragged == alone


def test_chat_answers_and_stops(llm):
    out = llm.chat([{"role": "user", "content": "What is the capital of France? One word."}], max_tokens=40)
    assert "Paris" in out.text
    assert out.finish_reason == "stop"


def test_score_is_the_log_probability_transformers_gives(llm, reference):
    prompt, text = "The capital of France is", " Paris, of course"
    score = llm.score(prompt, text)
    ids = [*llm.encode(prompt), *score.tokens]
    with torch.no_grad():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(ids) - len(score.tokens)
    want = [float(logprobs[start + i - 1, token]) for i, token in enumerate(score.tokens)]
    assert score.logprobs == pytest.approx(want, abs=1e-3)
    assert score.total == pytest.approx(sum(want), abs=1e-3)


def test_embeddings_of_like_texts_are_closer(llm):
    a, b, c = llm.embed(["The cat sat on the mat.", "A cat was sitting on a mat.", "Interest rates rose in March."])
    assert a @ b > a @ c
