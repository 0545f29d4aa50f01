"""Plots of `hasten bench` as inline SVG: quality against time, cost of passes, acceptance by place, order of commits.

Colours are classes (`s0` .. `s7` for arms, `o1` .. `o8` from early to late), which the page's style sheet sets for light
and dark. Every function returns "" where there is nothing to draw.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 88, 24, 16, 48
COLOURS, SHADES = 8, 8
LEAST = 5  # drafts that a place must have reached for its share to be drawn


def escape(text: object) -> str:
    """Text for HTML: markup is shown, control characters are not."""
    shown = "".join(
        char
        if char in "\n\t" or (ord(char) >= 32 and not 127 <= ord(char) < 160 and not 0xD800 <= ord(char) < 0xE000)
        else "\ufffd"
        for char in str(text)
    )
    return html.escape(shown)


def number(value: float) -> str:
    """A figure with three digits that count."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "?"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{min(digits, 6)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


class Axis:
    """A scale from [low, high] to pixels, straight or logarithmic, with its ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.log, self.start, self.end = log, start, end
        if high <= low:
            low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
        self.low, self.high = (math.log(low), math.log(high)) if log else (low, high)

    def __call__(self, value: float) -> float:
        """Pixels of a value; outside the range it is held at the edge."""
        at = (math.log(value) if self.log else value) - self.low
        share = min(1.0, max(0.0, at / (self.high - self.low)))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values in the range, at most about `most`."""
        if self.log:
            low, high = math.exp(self.low), math.exp(self.high)
            powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low * 0.999 <= m * 10.0**p <= high * 1.001]
            return found[:: max(1, -(-len(found) // most))]
        step = 10.0 ** math.floor(math.log10(max(self.high - self.low, 1e-9) / most))
        step = next(step * m for m in (1, 2, 5, 10, 20) if (self.high - self.low) / (step * m) <= most)
        first = math.ceil(self.low / step - 1e-9)
        return [(first + i) * step for i in range(int((self.high - first * step) / step + 1e-9) + 1)]


def _frame(title: str, x: Axis, y: Axis, height: int, across: str, up: str, x_ticks: Sequence[float] = ()) -> list[str]:
    """The beginning of a plot: grid, ticks and the names of its axes."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>']
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks or x.ticks():
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{height - BOTTOM + 18}" text-anchor="middle">{number(tick)}</text>')
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 8}" text-anchor="middle">{escape(across)}</text>'
    )
    turned = f'text-anchor="middle" transform="rotate(-90 14 {middle})"'
    parts.append(f'<text class="name" x="14" y="{middle}" {turned}>{escape(up)}</text>')
    return parts


def pareto(arms: Mapping[str, Mapping[str, Any]], quality_is: str) -> str:
    """Quality of every arm against its seconds per answer, with spreads, and the front that none is better than."""
    points = [(one["time"]["seconds"], one["quality"]) for one in arms.values()]
    if not points:
        return ""
    least, most = min(s["min"] for s, _ in points), max(s["max"] for s, _ in points)
    low, high = min(q["min"] for _, q in points), max(q["max"] for _, q in points)
    height = 360
    log = least > 0 and most / least > 8
    x = Axis(least / 1.15 if log else 0, most * 1.15, LEFT, WIDTH - RIGHT, log)
    pad = max(8.0, (high - low) * 0.15)
    y = Axis(max(0.0, low - pad), min(100.0, high + pad), height - BOTTOM, TOP)
    parts = _frame(
        "quality against time", x, y, height, "seconds per answer" + (", logarithmic" if log else ""), "quality, %"
    )
    front: list[tuple[float, float]] = []
    for seconds, quality in sorted((s["median"], -q["median"]) for s, q in points):
        if not front or -quality > front[-1][1]:
            front.append((seconds, -quality))
    steps = [f"{x(front[0][0])},{y(front[0][1])}"]
    for (_, before), (seconds, quality) in pairwise(front):
        steps += [f"{x(seconds)},{y(before)}", f"{x(seconds)},{y(quality)}"]
    steps.append(f"{WIDTH - RIGHT},{y(front[-1][1])}")
    parts.append(f'<polyline class="front" points="{" ".join(steps)}"/>')
    placed: list[tuple[float, float]] = []
    dots: list[str] = []
    for i, (seconds, quality) in enumerate(points):
        colour, at, up = f"s{i % COLOURS}", x(seconds["median"]), y(quality["median"])
        parts.append(f'<line class="bar {colour}" x1="{x(seconds["min"])}" x2="{x(seconds["max"])}" y1="{up}" y2="{up}"/>')
        parts.append(f'<line class="bar {colour}" x1="{at}" x2="{at}" y1="{y(quality["min"])}" y2="{y(quality["max"])}"/>')
        shown, way = up, 1 if up < TOP + 12 * len(points) else -1
        while any(abs(at - a) < 20 and abs(shown - b) < 20 for a, b in placed):
            shown += way * 21
        placed.append((at, shown))
        parts.append(f'<line class="bar {colour}" x1="{at}" x2="{at}" y1="{up}" y2="{shown}"/>')
        dots.append(f'<circle class="dot {colour}" cx="{at}" cy="{shown}" r="10"/>')
        dots.append(f'<text class="no" x="{at}" y="{shown + 4:.1f}" text-anchor="middle">{i + 1}</text>')
    return "".join([*parts, *dots, "</svg>"])


def cost(pass_ms: Mapping[str, float]) -> str:
    """t(T): milliseconds of a pass over T query tokens, and what T passes over one would take (dashed)."""
    known = sorted((int(tokens), ms) for tokens, ms in pass_ms.items())
    if len(known) < 2:
        return ""
    height, top = 300, max(ms for _, ms in known) * 1.1
    x = Axis(known[0][0], known[-1][0], LEFT, WIDTH - RIGHT, True)
    y = Axis(0, top, height - BOTTOM, TOP)
    ticks = [tokens for tokens, _ in known if (tokens & (tokens - 1)) == 0]
    title = "cost of a pass by its tokens"
    parts = _frame(title, x, y, height, "query tokens of a pass (T), logarithmic", "ms per pass, t(T)", ticks)
    first, one = known[0]
    line = [(tokens, one * tokens / first) for tokens, _ in known]
    line = [(tokens, ms) for tokens, ms in line if ms <= top]
    parts.append(f'<polyline class="front" points="{" ".join(f"{x(t)},{y(ms)}" for t, ms in line)}"/>')
    parts.append(f'<polyline class="line s0" points="{" ".join(f"{x(t)},{y(ms)}" for t, ms in known)}"/>')
    for tokens, ms in known:
        parts.append(f'<circle class="dot s0" cx="{x(tokens)}" cy="{y(ms)}" r="4"/>')
        if tokens in ticks:
            parts.append(f'<text x="{x(tokens)}" y="{y(ms) - 9}" text-anchor="middle">{number(ms / one)}x</text>')
    return "".join([*parts, "</svg>"])


def acceptance(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Share of drafts kept up to each place, of those that reach so far; places that few drafts reach are left out."""
    lines = {}
    for i, one in enumerate(arms.values()):
        kept = [(place, share) for place, (share, count) in enumerate(one.get("acceptance", ()), 1) if count >= LEAST]
        if kept:
            lines[i] = kept
    if not lines:
        return ""
    height, longest = 300, max(place for kept in lines.values() for place, _ in kept)
    x = Axis(1, max(2, longest), LEFT + 12, WIDTH - RIGHT - 12)
    y = Axis(0, 100, height - BOTTOM, TOP)
    ticks = range(1, longest + 1, max(1, -(-longest // 12)))
    parts = _frame(
        "acceptance by place in the draft", x, y, height, "place in the draft", "kept, %", [float(t) for t in ticks]
    )
    for i, kept in lines.items():
        colour = f"s{i % COLOURS}"
        at = [(x(place), y(100 * share)) for place, share in kept]
        parts.append(f'<polyline class="line {colour}" points="{" ".join(f"{a},{b}" for a, b in at)}"/>')
        parts += [f'<circle class="dot {colour}" cx="{a}" cy="{b}" r="4"/>' for a, b in at]
        parts.append(f'<circle class="dot {colour}" cx="{at[-1][0]}" cy="{at[-1][1]}" r="9"/>')
        parts.append(f'<text class="no" x="{at[-1][0]}" y="{at[-1][1] + 4:.1f}" text-anchor="middle">{i + 1}</text>')
    return "".join([*parts, "</svg>"])


def order(arms: Mapping[str, Mapping[str, Any]], group: str) -> str:
    """When the places of a canvas became final, one row per arm: light is early, dark is late, empty is never."""
    rows = []
    for i, (name, one) in enumerate(arms.items()):
        found = next((entry for entry in one.get("commits", ()) if entry["group"] == group and entry["places"]), None)
        if found is not None:
            rows.append((i, name, found))
    if not rows:
        return ""
    left, tall, places = 190, 22, max(entry["places"] for _, _, entry in rows)
    height = TOP + tall * len(rows) + 40
    scale = (WIDTH - left - RIGHT) / places
    title = f"order of commits, {group}"
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>']
    for row, (i, name, entry) in enumerate(rows):
        y = TOP + row * tall
        label = name if len(name) <= 24 else name[:23] + "…"
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{i + 1} {escape(label)}</text>')
        parts.append(f'<rect class="empty" x="{left}" y="{y}" width="{places * scale:.1f}" height="{tall - 4}"/>')
        cells = entry["order"]
        wide = entry["places"] / len(cells)
        shades = [0 if share is None else 1 + min(SHADES - 1, int(share * SHADES)) for share in cells]
        start = 0
        for at in range(1, len(shades) + 1):
            if at == len(shades) or shades[at] != shades[start]:
                if shades[start]:
                    box = f'x="{left + start * wide * scale:.1f}" y="{y}" width="{(at - start) * wide * scale:.1f}"'
                    parts.append(f'<rect class="o{shades[start]}" {box} height="{tall - 4}"/>')
                start = at
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = left + share * places * scale
        parts.append(f'<text x="{at:.1f}" y="{height - 24}" text-anchor="middle">{round(share * places)}</text>')
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{height - 6}" text-anchor="middle">place in the canvas</text>')
    return "".join([*parts, "</svg>"])
