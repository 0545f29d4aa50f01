"""The tables of docs/choosing.md and docs/methods.md, from cards and kept results; docs/generate.py puts them in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "bench" / "results"
TO = "\u2011"  # a hyphen at which no line breaks
FOLDERS = {
    "draft": ("Drafters", "guess tokens that the model then checks in one pass; for models that write from left to right"),
    "unmask": ("Filling a canvas", "decide which predictions become final; for masked-diffusion models"),
    "logits": ("Forms of answers", "forbid what does not belong to the form that was asked for"),
    "compress": ("Smaller weights", "make weights smaller or sparser"),
    "reduce": ("Fewer visual tokens", "drop or merge tokens of images and videos"),
    "arch": ("Architectures", "models, and conversions of models"),
    "embed": ("Embeddings", "representations out of decoders"),
    "privacy": ("Privacy", "statistics that say nothing about one person"),
    "train": ("Training", "make models, or make them better at something"),
    "serve": ("Serving", "spread the work of a model over processes and machines"),
    "bench": ("Measuring", "measure models and methods"),
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def _machine(about: dict[str, Any]) -> str:
    return f"{about['threads']} thread{'s' if about['threads'] > 1 else ''} of {about['cpu']}, {about['date']}"


def drafters() -> str:
    """Speed of every drafter by kind of task and setting of the native stack; the best of a row in bold."""
    result = _read("spec.json")
    setups: list[str] = result["setups"]
    names = [n for n in result[setups[0]]["all"] if n != "plain" and not n.startswith(("llama.cpp", "transformers"))]
    rows: list[tuple[str, ...]] = []
    for group in (group for group in result[setups[0]] if group != "pass_ms"):
        for setup in setups:
            speeds = {name: result[setup][group][name]["decode_ratio"] for name in names}
            best = max(1.0, *(one["mean"] for one in speeds.values()))
            cells = []
            for one in speeds.values():
                mean = f"**{one['mean']:.2f}x**" if one["mean"] == best else f"{one['mean']:.2f}x"
                cells.append(f"{mean}<br>{one['low']:.2f}{TO}{one['high']:.2f}")
            rows.append((group, setup, *cells))
    text = (
        f"Decoding of smollm2-135m, greedy, batch 1: the time of plain decoding divided by that of the method; mean over "
        f"{result['prompts_per_group']} prompts, quartiles below, the best above 1 in bold. "
        f"{_machine(result['machine'])}; [all figures](speculative.md#measured)."
    )
    return f"{text}\n\n{table(('task', 'setting', *(f'`{name}`' for name in names)), rows)}"


def passes() -> str:
    """What a pass over several tokens costs, for every file that was measured."""
    rows = []
    sizes = ("2", "4", "8", "16", "32")
    about: dict[str, Any] = {}
    for path in sorted(RESULTS.glob("kernels-*.json")):
        result = _read(path.name)
        about = result["machine"]
        for mode in ("exact", "int8"):
            costs = result[f"hasten {mode}"]["ratio_to_one"]
            rows.append((path.stem.removeprefix("kernels-"), mode, *(f"{costs[size]:g}x" for size in sizes)))
    text = f"A pass over n tokens, in passes over one ({_machine(about)}):"
    return f"{text}\n\n{table(('file', 'activations', *(f'{size} tokens' for size in sizes)), rows)}"


def canvases() -> str:
    """Speed and right answers of the presets, each canvas a column."""
    result = _read("canvas.json")
    rows = []
    for name, methods in result["arms"].items():
        cells = []
        for arms in result["canvases"].values():
            one = arms[name]
            cells += [
                f"{one['speedup']['median']:.1f}x",
                f"{one['nfe']['median']:.1f}",
                f"{one['accuracy']['median']:.3g}<br>{one['accuracy']['min']:.3g}{TO}{one['accuracy']['max']:.3g}",
            ]
        rows.append((f"{name} (" + ", ".join(f"`{method}`" for method in methods) + ")", *cells))
    heads = [head for size in result["canvases"] for head in (f"{size}: speed", f"{size}: forwards", f"{size}: right, %")]
    text = (
        f"{result['model']} on canvases of {', '.join(result['canvases'])} tokens, against the reference sampler "
        "without a cache; medians over seeds, least and greatest below, every answer verified. "
        f"{_machine(result['machine'])}; [by world](diffusion.md#measured)."
    )
    return f"{text}\n\n{table(('method', *heads), rows)}"


def served() -> str:
    """Tokens per second of hasten's server, drafting and plain, by the number of chats at once."""
    result = _read("serve.json")["against"]
    rows = []
    for name, words in (("hasten", "`auto`"), ("hasten plain", "`plain`")):
        cells = [one["tokens_per_s"] for one in result[name].values()]
        rows.append((words, *(f"{one['median']:.0f} ({one['min']:.0f}-{one['max']:.0f})" for one in cells)))
    heads = tuple(f"{count} at once, tokens/s" for count in result["hasten"])
    text = f"Streamed chats of smollm2-135m, {result['tokens']} tokens each, medians of {result['rounds']} rounds (range):"
    return f"{text}\n\n{table(('method', *heads), rows)}"


def forms() -> str:
    """What a grammar guarantees and costs, from random schemas."""
    result = _read("structure.json")
    rows = []
    for name, one in result["models"].items():
        asked, plain, drafted = (one["methods"][arm] for arm in ("without", "plain", "auto"))
        rows.append(
            (
                name,
                f"{plain['valid']} of {plain['finished']}",
                f"{asked['valid']} of {asked['finished']}",
                f"{one['speed']['mask_share_of_plain']:.1%}",
                f"{plain['forwards']:,} / {drafted['forwards']:,}",
            )
        )
    schemas = next(iter(result["models"].values()))["schemas"]
    head = ("model", "valid with a grammar", "valid when only asked for", "time in masks", "forwards, plain / with drafts")
    text = f"{schemas} random JSON schemas; of the answers that ended by themselves, as many were valid:"
    return f"{text}\n\n{table(head, rows)}"


def kept(slug: str) -> str:
    """One line about the kept result of a work ("" where there is none): verdict, speed and quality on both sides."""
    from hasten.bench import report

    path = DOCS / "results" / f"{slug}.json"
    if not path.is_file():
        return ""
    one = report.read(path)
    verdict = "as claimed" if one.direction_holds else "short of the claim"
    speed = "not timed" if one.speedup is None else f"{one.speedup}x the baseline's speed"
    sides = f"{one.quality['baseline']:g} -> {one.quality['method']:g}"
    quick = ", quick run" if one.extra.get("quick") else ""
    return f"{verdict}: {speed}; {one.extra.get('quality_is', 'quality')}: {sides}{quick}"


def cards() -> str:
    """All methods by folder: exactness, title, what was measured here."""
    from hasten.registry import cards as known
    from hasten.registry import modules

    parts = []
    ours = [card for card in known() if modules().get(card.slug, "hasten.").startswith("hasten.")]
    for folder, (heading, words) in FOLDERS.items():
        rows = []
        for card in (card for card in ours if card.plugs_into == folder):
            result = kept(card.slug)
            measured = f"[{result}](results.md#{card.slug})" if result else ""
            name = f"[{card.slug}](methods/{card.slug}.md)<br>{card.title}"
            rows.append((name, card.exactness, card.no_help, measured))
        if rows:
            head = ("method", "exactness", "does not help", "measured here")
            parts += [f"## {heading}", f"They {words}.", table(head, rows)]
    return "\n\n".join(parts)


TABLES = {"drafters": drafters, "passes": passes, "canvases": canvases, "served": served, "forms": forms, "cards": cards}
