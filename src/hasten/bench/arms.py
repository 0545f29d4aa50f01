"""What is compared: arms named as `a,b,c+d`, and other programs as plug-ins.

A comma separates arms, `+` joins the parts of one, and a part's settings follow a colon:
`plain,threshold:tau=0.8+canvas-cache`. A comma before `knob=value` goes on with the settings before it:
`reference:block=16,steps=8,threshold` are two arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hasten import registry
from hasten.bench.compare import Runner, runner
from hasten.errors import ConfigError, IncompatibleError, out_of_range, unknown_name

if TYPE_CHECKING:
    from hasten.llm import LLM

MOST = 16  # arms of one comparison
PROGRAMS = ("transformers", "llama.cpp")  # for models that write from left to right
SAMPLERS = ("llada", "dream", "fast-dllm")  # for models that fill canvases
PEERS = (*PROGRAMS, *SAMPLERS)


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """Arm -> its methods, in order, of "a,b,c+d".

    Nothing is loaded but the methods' modules. Raises ConfigError naming what is empty, repeated or too much, and for
    unknown methods, planned ones, and settings that a method does not take.
    """
    arms: dict[str, tuple[str, ...]] = {}
    pieces: list[str] = []
    for piece in text.split(","):
        head, equals, _ = piece.partition("=")
        if pieces and equals and ":" not in head and ":" in pieces[-1].rpartition("+")[2]:
            pieces[-1] += f",{piece.strip()}"  # goes on with the settings before it
        else:
            pieces.append(piece.strip())
    for piece in pieces:
        names = tuple(part.strip() for part in piece.split("+"))
        if not all(names):
            raise out_of_range("methods", text, "arms joined by commas, each of methods joined by +", "as in plain,a,b+c")
        name = "+".join(names)
        if name in arms:
            raise ConfigError(f"methods names {name!r} twice; every arm must be another", field="methods")
        for one in names:
            _check(one)
        arms[name] = names
    if len(arms) > MOST:
        raise out_of_range("methods", f"{len(arms)} arms", f"at most {MOST} arms")
    return arms


def _check(name: str) -> None:
    slug, settings = registry.parse(name)
    if slug not in registry.PRESETS:
        registry.configure(name)
    elif settings:
        registry.expand((name,))  # which refuses settings of a preset


def runners(llm: LLM, arms: dict[str, tuple[str, ...]], *, fixed: bool, whole: bool = False) -> dict[str, Runner]:
    """A runner for each arm; what its methods cannot do with this model is refused here, before anything is measured.

    `fixed`: answers go on past the model's end tokens. Raises UnknownNameError, UnsupportedError, IncompatibleError.
    """
    for names in arms.values():
        llm.parts(names)
    return {name: runner(llm, names, ends=not fixed, whole=whole) for name, names in arms.items()}


def check_peers(wanted: Sequence[str]) -> tuple[str, ...]:
    """The peers named, in order; "none" among them is none. Raises UnknownNameError."""
    for name in wanted:
        if name not in (*PEERS, "none"):
            raise unknown_name("peer", name, (*PEERS, "none"))
    return tuple(dict.fromkeys(name for name in wanted if name != "none"))


def peers(llm: LLM, wanted: Sequence[str], *, fixed: bool, left_out: dict[str, str]) -> dict[str, Runner]:
    """Runners of other programs on the same weights, and of reference samplers; what cannot be used is in `left_out`, with
    why. Programs run in the precision of the loaded weights."""
    import torch

    from hasten.bench import samplers
    from hasten.bench.peers import peers as programs

    caps = llm.model.capabilities
    found: dict[str, Runner] = {}
    for name in wanted:
        if (name in PROGRAMS) != (caps.kind == "causal"):
            kind = "models that write from left to right" if name in PROGRAMS else "models that fill canvases"
            left_out[name] = f"it is for {kind}"
        elif name in SAMPLERS:
            try:
                found |= samplers.runners(llm, (name,))
            except IncompatibleError as error:
                left_out[name] = str(error)
        else:
            dtype = llm.dtype if isinstance(llm.dtype, torch.dtype) and llm.dtype.is_floating_point else torch.float32
            ends = () if fixed else caps.eos_ids
            found |= programs(Path(llm.source), dtype, (name,), ends, left_out)
    return found
