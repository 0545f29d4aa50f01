"""Metrics of several replicas as one page: every series keeps its labels and gets those that say where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def merged(pages: Iterable[tuple[Mapping[str, str], str]]) -> str:
    """One page in Prometheus' text format from many: (labels to add, page) each. A family keeps its first head."""
    heads: dict[str, list[str]] = {}
    series: dict[str, list[str]] = {}
    for labels, page in pages:
        added = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
        family, own = "", set()
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                if name != family:
                    family = name
                    own = set() if family in heads else {family}
                if family in own or family not in heads:
                    heads.setdefault(family, []).append(line)
            elif line and not line.startswith("#"):
                series.setdefault(family, []).append(_labelled(line, added))
    lines = [line for family in series for line in (*heads.get(family, ()), *series[family])]
    return "\n".join(lines) + "\n" if lines else ""


def _labelled(line: str, added: str) -> str:
    """A sample with further labels: behind the brace, or between the name and the value."""
    brace, space = line.find("{"), line.find(" ")
    if 0 <= brace < space:
        return f"{line[: brace + 1]}{added}{'' if line[brace + 1] == '}' else ','}{line[brace + 1 :]}"
    return f"{line[:space]}{{{added}}}{line[space:]}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
