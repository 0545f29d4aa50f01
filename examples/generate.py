"""Continue a text, and read what the answer cost."""

import hasten

llm = hasten.load("smollm2-135m")
out = llm.generate("The capital of France is", max_tokens=12)
print(out.text)
print(f"{out.usage.completion_tokens} tokens, {out.usage.tokens_per_s:.1f} tokens/s, ended by {out.finish_reason}")
