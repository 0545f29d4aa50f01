"""The report of `hasten bench` as one HTML file: tables, plots and sample texts; it asks nothing of any other address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.bench import charts
from hasten.bench.charts import COLOURS, escape, number

_HUES = {
    "light": ("#2563eb", "#c2410c", "#047857", "#7c3aed", "#b91c1c", "#0e7490", "#a16207", "#be185d"),
    "dark": ("#60a5fa", "#fb923c", "#34d399", "#a78bfa", "#f87171", "#22d3ee", "#facc15", "#f472b6"),
}
_BASE = (
    "*{box-sizing:border-box}"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:920px;margin:0 auto;padding:1.2em 1em 3em;"
    "background:var(--back);color:var(--ink)}"
    "h1{font-size:1.5em;line-height:1.25;margin:.2em 0}h2{font-size:1.15em;margin:1.8em 0 .3em}p{margin:.4em 0}"
    "small,.soft{color:var(--soft)}svg{width:100%;height:auto;display:block}"
    "svg text{font:13px system-ui,sans-serif;fill:var(--ink)}svg .name{fill:var(--soft)}"
    "svg .no{font-weight:700;font-size:12px;fill:var(--back)}.grid{stroke:var(--line)}"
    ".front{fill:none;stroke:var(--soft);stroke-dasharray:5 4}.bar{stroke-width:2}.line{fill:none;stroke-width:2}"
    ".empty{fill:var(--line)}.wide{overflow-x:auto}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}"
    "th,td{text-align:right;padding:.3em .6em;border-bottom:1px solid var(--line);vertical-align:top;"
    "white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}"
    ".facts td{white-space:normal;text-align:left;overflow-wrap:anywhere}"
    ".key{display:inline-block;min-width:1.5em;height:1.5em;line-height:1.5em;border-radius:.75em;text-align:center;"
    "font-weight:700;font-size:12px;color:var(--back);margin-right:.4em}"
    ".legend span{white-space:nowrap;margin-right:1em;display:inline-block}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--line);padding:.5em .7em;border-radius:6px;"
    "margin:.3em 0;unicode-bidi:isolate}"
    "details{margin:.5em 0}summary{cursor:pointer}figure{margin:.5em 0}"
    "@media(max-width:600px){svg text{font-size:19px}svg .no{font-size:15px}}"
)


def style() -> str:
    """The style sheet: colours of arms and shades for light and dark screens."""

    def theme(name: str, back: str, ink: str, soft: str, line: str) -> str:
        hues = "".join(f"--s{i}:{hue};" for i, hue in enumerate(_HUES[name]))
        return f":root{{color-scheme:{name};--back:{back};--ink:{ink};--soft:{soft};--line:{line};{hues}}}"

    arms = "".join(
        f".line.s{i},.bar.s{i}{{stroke:var(--s{i})}}.dot.s{i}{{fill:var(--s{i})}}.key.s{i}{{background:var(--s{i})}}"
        for i in range(COLOURS)
    )
    shades = "".join(f".o{i}{{fill:var(--s0);fill-opacity:{0.12 + 0.11 * i:.2f}}}" for i in range(1, charts.SHADES + 1))
    light = theme("light", "#ffffff", "#1b1f24", "#59636e", "#e4e8ec")
    dark = theme("dark", "#0d1117", "#e6edf3", "#9198a1", "#2a313a")
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}{_BASE}{arms}{shades}"


def page(result: Mapping[str, Any]) -> str:
    """The report of a result of `measure`, or of any suite's that has "facts" (name, value) and no arms."""
    model = result["model"]["model"] if isinstance(result["model"], Mapping) else result["model"]
    title = f"{result['suite']} on {model}"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(result.get("about", ""))}</p>']
    if result.get("arms"):
        parts += _comparison(result)
    if result.get("facts"):
        parts += ["<h2>Figures</h2>", _facts(result["facts"])]
    drawn = charts.cost(result.get("pass_ms") or {})
    if drawn:
        parts += ["<h2>Cost of a pass</h2>", f"<figure>{drawn}</figure>"]
        parts.append("<p><small>Dashed: as many passes over one token. Labels: multiples of the first.</small></p>")
    if result.get("texts"):
        parts += _texts(result)
    parts += ["<h2>Conditions</h2>", _facts(_conditions(result))]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style()}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _comparison(result: Mapping[str, Any]) -> list[str]:
    arms: Mapping[str, Any] = result["arms"]
    parts = [f"<p>{escape(headline(result))}</p>", _table(arms)]
    parts.append(
        f"<p><small>Medians over {len(result['seeds'])} seeds, least and greatest below. Quality: "
        f"{escape(result['quality_is'])}. Speed: the first arm's time for the same cases divided by the arm's.</small></p>"
    )
    legend = "".join(f"<span>{_key(i)}{escape(name)}</span>" for i, name in enumerate(arms))
    parts += ["<h2>Quality and time</h2>", f"<figure>{charts.pareto(arms, result['quality_is'])}</figure>"]
    parts.append(f'<p class="legend">{legend}</p><p><small>Better is up and to the left; on the dashed line nothing is '
                 "both faster and better.</small></p>")  # fmt: skip
    groups = list(next(iter(arms.values()))["groups"])
    if len(groups) > 1:
        parts += ["<h2>By group</h2>", _groups(arms, groups)]
    drawn = charts.acceptance(arms)
    if drawn:
        parts += ["<h2>Acceptance by place in the draft</h2>", f"<figure>{drawn}</figure>"]
        parts.append("<p><small>Of the drafts that reach a place, the share that was kept so far.</small></p>")
    maps = [(group, charts.order(arms, group)) for group in groups]
    if any(drawn for _, drawn in maps):
        parts.append("<h2>Order of commits</h2><p><small>Faint places became final early, strong ones late.</small></p>")
        parts += [f"<h3>{escape(group)}</h3><figure>{drawn}</figure>" for group, drawn in maps if drawn]
    return parts


def headline(result: Mapping[str, Any]) -> str:
    """One sentence: the fastest arm that is no worse than the first, and the fastest of all where that is another."""
    arms = result["arms"]
    first = next(iter(arms))
    speed = {name: one["time"]["speedup"]["median"] for name, one in arms.items()}
    quality = {name: one["quality"]["median"] for name, one in arms.items()}
    fine = max((name for name in arms if quality[name] >= quality[first]), key=lambda name: speed[name])
    fastest = max(arms, key=lambda name: speed[name])
    if not any(quality.values()):
        return f"No arm got anything right in {result['cases']} cases, so that speed says little here."
    said = (
        f"No arm is faster than {first} without losing quality in {result['cases']} cases."
        if fine == first
        else f"{fine} is {number(speed[fine])}x as fast as {first} at no loss of quality in {result['cases']} cases."
    )
    if fastest not in (fine, first):
        said += f" Fastest is {fastest}, {number(speed[fastest])}x, at a quality of {number(quality[fastest])} % against "
        said += f"{number(quality[first])} %."
    return said


def _key(i: int) -> str:
    return f'<span class="key s{i % COLOURS}">{i + 1}</span>'


def _spread(one: Mapping[str, float] | None, unit: str = "") -> str:
    if one is None:
        return "-"
    middle = f"{number(one['median'])}{unit}"
    return middle if one["min"] == one["max"] else f"{middle}<br><small>{number(one['min'])}-{number(one['max'])}</small>"


def _table(arms: Mapping[str, Any]) -> str:
    heads = ("arm", "quality, %", "speed", "s per answer", "forwards", "tokens per forward", "same text")
    rows = []
    for i, (name, one) in enumerate(arms.items()):
        same, of = one["same_text"]
        cells = (
            _key(i) + escape(name),
            _spread(one["quality"]),
            _spread(one["time"]["speedup"], "x"),
            _spread(one["time"]["seconds"]),
            _spread(one.get("forwards")),
            _spread(one.get("tokens_per_forward")),
            f"{same} of {of}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _groups(arms: Mapping[str, Any], groups: Sequence[str]) -> str:
    head = "".join(f"<th>{_key(i)}</th>" for i in range(len(arms)))
    rows = []
    for group in groups:
        cells = [one["groups"][group] for one in arms.values()]
        shown = "".join(
            f"<td>{number(cell['quality'])} %<br><small>{number(cell['time']['speedup'])}x</small></td>" for cell in cells
        )
        rows.append(f"<tr><td>{escape(group)}</td>{shown}</tr>")
    return f'<div class="wide"><table><tr><th>group</th>{head}</tr>{"".join(rows)}</table></div>'


def _texts(result: Mapping[str, Any]) -> list[str]:
    parts = ["<h2>Texts</h2>"]
    for one in result["texts"]:
        prompt = one["prompt"]
        shown = prompt if len(prompt) <= 80 else prompt[:79] + "…"
        answers = "".join(
            f"<p>{_key(i)}{escape(name)} <small>{number(100 * answer['quality'])} %{', ' if answer['note'] else ''}"
            f'{escape(answer["note"])}</small></p><pre dir="auto">{escape(answer["text"])}</pre>'
            for i, (name, answer) in enumerate(one["answers"].items())
        )
        parts.append(
            f"<details><summary>{escape(one['group'])}, seed {one['seed']}: {escape(shown)}</summary>"
            f'<pre dir="auto">{escape(prompt)}</pre>{answers}</details>'
        )
    return parts


def _facts(rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{cells}</table>'


def _conditions(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = result["model"] if isinstance(result["model"], Mapping) else {"model": result["model"]}
    left_out = result.get("left_out", {})
    rows: list[tuple[str, Any]] = [
        *((name.replace("_", " "), value) for name, value in model.items()),
        *((f"option {name}", value) for name, value in result.get("options", {}).items() if value not in ("", None)),
        ("seeds", ", ".join(map(str, result.get("seeds", ())))),
        ("cases", result.get("cases", "")),
        *([("cases left out", f"{left_out['cases']}, too long for the model")] if left_out.get("cases") else []),
        *((f"{name} left out", why) for name, why in left_out.get("peers", {}).items()),
        *((name.replace("_", " "), value) for name, value in result["machine"].items()),
        ("took", f"{result['seconds']:.0f} s" if "seconds" in result else ""),
    ]
    return [(name, str(value)) for name, value in rows if value != ""]
