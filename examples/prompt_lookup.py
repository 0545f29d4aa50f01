"""The same text in fewer forwards: drafts copied from the prompt, checked by the model."""

import hasten

llm = hasten.load("smollm2-135m")
prompt = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return"
plain = llm.generate(prompt, method="plain", max_tokens=48)
looked = llm.generate(prompt, method="prompt-lookup:nodes=4", max_tokens=48)
if looked.tokens != plain.tokens:
    raise SystemExit("prompt-lookup is exact, and yet the texts differ")
print(looked.text)
print(f"{plain.usage.forwards} forwards without it, {looked.usage.forwards} with it")
