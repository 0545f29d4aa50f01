"""hasten runs language models faster, smaller and under control, on the machine you have.

    import hasten
    llm = hasten.load("smollm2-135m")
    print(llm.generate("The capital of France is", max_tokens=16).text)

From here: `llm.py` is what you call, `engine/` what runs, `models/` what is run, `draft/` and its sister folders hold one
method per file. Everything is imported on first use; `import hasten` itself stays light.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError
from hasten.types import Event, Grammar, MethodCard, Output, Request, SamplingParams, Usage

if TYPE_CHECKING:
    from hasten.llm import LLM, Score, load

# torch's threads (GNU OpenMP) otherwise spin for milliseconds after each operation and take a core from the native stack's.
# Read when torch is loaded: without effect where it was loaded before hasten, and never overriding what is set already.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Event",
    "Grammar",
    "HastenError",
    "MethodCard",
    "Output",
    "Request",
    "SamplingParams",
    "Score",
    "Usage",
    "load",
    "methods",
]


def methods() -> list[MethodCard]:
    """The cards of all methods of this version, by slug."""
    from hasten.registry import cards

    return cards()


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Score", "load"):
        from hasten import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'hasten' has no attribute {name!r}")
