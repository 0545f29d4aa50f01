"""How drafters with a draft model come by it."""

from __future__ import annotations

from hasten.engine.contracts import MethodContext
from hasten.errors import ConfigError
from hasten.models.assistant import Assistant, check_vocabularies
from hasten.models.load import load


def open_assistant(slug: str, name: str, cache_mb: int, context: MethodContext) -> Assistant:
    """The draft model `name`, loaded in the target's precision and checked against its vocabulary.

    Raises ConfigError when no name is given, IncompatibleError naming the first token that differs, and as `load` does.
    """
    if not name:
        raise ConfigError(
            f"{slug}.model is empty; {slug}.model must name the draft model",
            hint=f"--method {slug}:model=NAME",
            field=f"{slug}.model",
        )
    dtype = str(getattr(context.backbone, "dtype", "auto")).removeprefix("torch.")
    loaded = load(name, dtype=dtype)
    size = context.capabilities.vocab_size
    check_vocabularies(context.tokenizer, loaded.tokenizer, size, loaded.model.capabilities.vocab_size, name)
    loaded.model.pack()
    return Assistant(loaded.model, size, cache_mb * 1_000_000)
