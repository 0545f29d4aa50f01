"""`hasten doctor`: what this machine has, and what will be slow and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hasten.cli._shared import as_json


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("doctor")(doctor)


def doctor(json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False) -> None:
    """Print versions, CPU, memory, models present and every limit."""
    facts = _facts()
    if json:
        typer.echo(as_json(facts))
        return
    for name, value in facts.items():
        if isinstance(value, list):
            print(f"{name}:")
            for entry in value:
                print(f"  {_line(name, entry)}")
        else:
            print(f"{name}: {value}")


def _line(name: str, entry: Any) -> str:
    if name == "limits":
        return f"{entry['name']} = {entry['value']} {entry['unit']}: {entry['reason']}"
    if name == "models":
        return f"{entry['name']} ({entry['license']}): {entry['path'] or 'not fetched yet'}"
    return str(entry)


def _facts() -> dict[str, Any]:
    import os
    import platform
    from importlib import metadata

    import torch

    from hasten import __version__
    from hasten.bench.report import processor
    from hasten.engine.limits import LIMITS
    from hasten.kernels import library
    from hasten.models import catalog
    from hasten.models.linear import packs
    from hasten.models.memory import available_bytes

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    notes = [f"native stack: {library.missing()}; models run on torch, many times slower"] if library.missing() else []
    if not packs(torch.float32):
        notes.append("float32 on torch: this build cannot pack weights; expect prompts to be read more slowly")
    if not packs(torch.bfloat16):
        notes.append("bfloat16 on torch: no hardware support here; good for single tokens, slow for prompts")
    cpu, features = processor()
    return {
        "hasten": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "tokenizers", "gguf", "transformers")},
        "cpu": cpu,
        "cpu_features": features,
        "native": "missing" if library.missing() else library.level(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "free_memory_gb": round(available_bytes() / 1e9, 1),
        "notes": notes,
        "models": [entry.to_dict() for entry in catalog.entries()],
        "limits": [
            {"name": n, "value": v, "unit": u, "reason": r} for n, v, u, r in LIMITS.rows_for_people()
        ],
    }  # fmt: skip
