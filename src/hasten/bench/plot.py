"""A reproduction's figures as one self-contained HTML page: bars with their spread, drawn as inline SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.bench.report import Reproduction

_WIDTH, _LEFT, _ROW, _BAR = 720, 190, 34, 18
_TITLES = {"speedup": "speed of decoding, plain = 1", "tokens_per_pass": "tokens committed per pass of the model"}
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#1b1f24}"
    "svg{width:100%;height:auto}text{font:13px system-ui,sans-serif;fill:currentColor}table{border-collapse:collapse}"
    "td,th{text-align:left;padding:.15em 1em .15em 0;vertical-align:top}small{color:#59636e}"
    "@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}small{color:#9198a1}}"
)


def bars(entries: Sequence[Mapping[str, Any]], title: str) -> str:
    """An SVG of one bar per entry {"label", "median", "min", "max"}: it ends at the median, a line spans the rest."""
    top = max(1.0, *(float(entry["max"]) for entry in entries))
    step = next(s for s in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, top) if top / s <= 8)
    scale = (_WIDTH - _LEFT - 70) / top
    height = _ROW * len(entries) + 52

    def x(value: float) -> str:
        return f"{_LEFT + scale * value:.1f}"

    bottom = height - 22
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(title)}">']
    parts.append(f'<text x="{_LEFT}" y="14">{html.escape(title)}</text>')
    for i in range(int(top / step + 1e-9) + 1):
        at = x(i * step)
        parts.append(f'<line x1="{at}" x2="{at}" y1="24" y2="{bottom}" stroke="#8886" stroke-width="1"/>')
        parts.append(f'<text x="{at}" y="{height - 6}" text-anchor="middle">{i * step:g}</text>')
    for i, entry in enumerate(entries):
        y = 28 + i * _ROW
        middle = y + _BAR / 2
        low, mid, high = (float(entry[name]) for name in ("min", "median", "max"))
        parts.append(f'<text x="{_LEFT - 8}" y="{middle + 4}" text-anchor="end">{html.escape(str(entry["label"]))}</text>')
        width = max(0.0, scale * mid)
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2" fill="#3b82c4"/>')
        parts.append(
            f'<line x1="{x(low)}" x2="{x(high)}" y1="{middle}" y2="{middle}" stroke="currentColor" stroke-width="2"/>'
        )
        parts.append(f'<text x="{float(x(max(high, mid))) + 8:.1f}" y="{middle + 4}">{mid:.2f}</text>')
    return "".join([*parts, "</svg>"])


def page(result: Reproduction, checked: str) -> str:
    """The whole page: what is claimed, what was tried and found, the bars, where it does not help, the machine."""
    verdict = "came out as claimed" if result.direction_holds else "did not come out as claimed"
    extra = result.extra
    entries = list(extra.get("bars", ()))
    if not entries and result.speedup is not None:
        entries = [
            {"label": "baseline", "median": 1, "min": 1, "max": 1},
            {"label": result.slug, **result.speedup.to_dict()},
        ]
    measure = str(extra.get("quality_is", "quality"))
    rows = [
        ("claim", result.claim),
        ("tried here", checked),
        ("direction", verdict + (" (a quick run)" if extra.get("quick") else "")),
        ("speed", "not timed" if result.speedup is None else f"{result.speedup}x the baseline's"),
        (measure, f"baseline {result.quality['baseline']}, method {result.quality['method']}"),
        ("does not help", result.no_help),
        ("seeds", ", ".join(map(str, result.seeds))),
        ("took", f"{result.seconds:.0f} s"),
        *((name.replace("_", " "), str(value)) for name, value in result.machine.items()),
    ]
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    drawn = bars(entries, _TITLES.get(str(extra.get("bars_of")), str(extra.get("bars_of", "speed")))) if entries else ""
    name = html.escape(result.slug)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{name}</h1>{drawn}<p><small>Bars end at the median over seeds; lines span the least and the greatest."
        f"</small></p><table>{cells}</table></body></html>\n"
    )


def write(result: Reproduction, checked: str, folder: Path) -> Path:
    """Write `<slug>.html` into `folder` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.slug}.html"
    path.write_text(page(result, checked), encoding="utf-8")
    return path
