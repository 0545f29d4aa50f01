"""docs/families.md: the registry of diffusion families as tables, all of it from the code."""

from __future__ import annotations

import re
from collections.abc import Callable

from hasten.bench import dllm_survey
from hasten.bench.dllm_survey import AXES, FACTS, Family

INTRO = (
    "What is known of diffusion language models: how they are noised, what a position sees, which ids they use, whether "
    "keys can be kept, and which parts of hasten such a model takes. `?` is unknown, `none` is known to be absent. "
    "`hasten methods --families` searches this, by words or by questions such as `cache=exact` or `allows=freedave`; "
    "[dllm-survey](methods/dllm-survey.md) says how it is made and kept true."
)


def page(note: str, table: Callable[[tuple[str, ...], list[tuple[str, ...]]], str]) -> str:
    """The whole page; `table` makes a Markdown table of a head and rows."""
    families = dllm_survey.families()
    rows = [tuple(f"`{cell}`" if i == 0 else cell for i, cell in enumerate(dllm_survey.cells(one))) for one in families]
    head = tuple(name.replace("_", " ") for name in dllm_survey.COLUMNS)
    words = [(axis, f"`{word}`", meaning) for axis, meanings in AXES.items() for word, meaning in meanings.items()]
    parts = [note, "# Families of diffusion models", INTRO, table(head, rows)]
    parts += ["## Which parts are legal", *verdicts(families)]
    parts += ["## The words", table(("field", "word", "meaning"), words)]
    parts += [
        "## Facts and sources",
        "What each source - arXiv id, released config, class or address - says; sizes are in billions of weights.",
    ]
    parts += [facts(one) for one in families]
    return "\n\n".join(parts) + "\n"


def verdicts(families: list[Family]) -> list[str]:
    """What the parts say, families with equal verdicts together; what holds everywhere is said once."""
    groups: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
    for one in families:
        said = tuple(
            (state, ", ".join(f"`{slug}`" for slug in slugs), plain(reason, one.name))
            for state, slugs, reason in dllm_survey.grouped(one.name)
        )
        groups.setdefault(said, []).append(one.name)
    judged = [set(said) for said in groups if said[0][0] != "unknown"]
    always = set.intersection(*judged)
    out = ["Each part was asked, with what such a model declares; nothing here is a list kept by hand."]
    out += [f"Everywhere {state}: {slugs}; each {reason}." for state, slugs, reason in sorted(always)]
    for said, names in groups.items():
        lines = [
            f"- {state}: {slugs}{f' - {reason}' if reason else ''}"
            for state, slugs, reason in said
            if (state, slugs, reason) not in always
        ]
        out += [f"**{', '.join(names)}**", "\n".join(lines)]
    return out


def plain(reason: str, name: str) -> str:
    """A reason without the model's name, the numbers of its blocks and the hint."""
    text = re.sub(r" \((choose|leave|load|use)\b.*\)$", "", reason)
    text = text.replace(f"model {name!r}", "the model").replace(repr(name), "the model").replace(f" {name},", " MODEL,")
    return re.sub(r"blocks of \d+", "blocks of its own", text)


def facts(one: Family) -> str:
    """One family in full: what it is, its facts by source, and what is unknown."""
    paper = f", [arXiv {one.paper}](https://arxiv.org/abs/{one.paper})" if one.paper else ""
    by_source: dict[str, list[str]] = {}
    for field in FACTS:
        if (fact := one.facts[field]) is not None:
            by_source.setdefault(fact.source, []).append(f"{field.replace('_', ' ')} {dllm_survey.shown(fact)}")
    unknown = ", ".join(field.replace("_", " ") for field in FACTS if one.facts[field] is None)
    lines = [f"**{one.name}**: {one.title} ({one.year}{paper}). {one.note}".rstrip(), ""]
    lines += [f"- {source}: {', '.join(told)}" for source, told in by_source.items()]
    return "\n".join([*lines, *([f"- unknown: {unknown}"] if unknown else [])])
