"""Print a chat answer while it is made, and stop early without leaving anything behind."""

from contextlib import closing

import hasten

llm = hasten.load("smollm2-135m")
messages = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "Why is the sky blue?"},
]
seen = 0
with closing(llm.chat_stream(messages, max_tokens=60)) as events:  # closing the iterator aborts the request
    for event in events:
        if event.kind == "commit":
            print(event.text, end="", flush=True)
            seen += 1
            if seen == 40:
                break
print()
