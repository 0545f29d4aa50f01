"""The server: the OpenAI API over one process, a page to look at, metrics; and replicas of it on Ray.

A request goes through `security` (host, key, sizes) and a route of `app`, is read by `protocol` and made into engine
requests by `chat`, `completions` or `embeddings`, and waits for its events at the `worker`, the one thread that owns the
models. Nothing else touches a model; what takes time off the engine (tokenising, templates, grammars) runs in a small pool.
"""
