"""Draws the figures of docs/concepts.md: `python docs/figures.py` writes docs/images/*.svg.

Masks come from the engine's own rules and the filling canvas from a run of mini-dlm, so that no figure shows what the
code does not do. Colours follow the page: an SVG takes the colour scheme of the element that shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
STYLE = """
:root{--paper:#fff;--ink:#24292f;--soft:#6a737d;--line:#c9d1d9;--off:#eef1f4;--on:#0d9488;--onink:#fff;--warm:#fde7c2;
--no:#fbdada;--noline:#c2410c}
@media(prefers-color-scheme:dark){:root{--paper:#1f2129;--ink:#e2e4ea;--soft:#9aa1ad;--line:#4a4f5c;--off:#2b2e38;
--on:#2dbcae;--onink:#10131a;--warm:#5c4a26;--no:#55292c;--noline:#fb923c}}
text{font:14px system-ui,sans-serif;fill:var(--ink)}.m{font-family:ui-monospace,monospace;text-anchor:middle}
.c{text-anchor:middle}.s{fill:var(--soft);font-size:13px}.b{font-weight:600}
.paper{fill:var(--paper)}.cell{fill:var(--off);stroke:var(--line)}.on{fill:var(--on);stroke:var(--paper)}
.new{fill:var(--warm);stroke:var(--line)}.no{fill:var(--no);stroke:var(--noline);stroke-dasharray:3 2}
.onink{fill:var(--onink)}.edge{stroke:var(--line);stroke-width:1.5;fill:none}.path{stroke:var(--on);stroke-width:3;fill:none}
""".replace("\n", "")


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A drawing on a sheet of its own, readable whatever lies under it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>' + "".join(parts) + "</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words at their baseline."""
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{kind}"' if kind else "") + f">{escape(words)}</text>"


def box(x: float, y: float, w: float, h: float, kind: str, words: str = "", ink: str = "m") -> str:
    """A rounded box with words in its middle."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" class="{kind}"/>'
    return shape + (text(x + w / 2, y + h / 2 + 5, words, f"{ink} onink" if kind == "on" else ink) if words else "")


def visibility() -> str:
    """Five attention rules as masks of eight tokens, computed by engine/masks.py."""
    import torch

    from hasten.engine.masks import CAUSAL, FULL, BlockCausal, PrefixLM, Tree, mask

    n, cell, gap, top = 8, 15, 42, 62
    at = torch.arange(n)
    tree = Tree((-1, 0, 1, 2, 2, 3, 3, 4))
    rules = (
        ("causal", CAUSAL, ("Llama, Qwen, Gemma", "left to right")),
        ("tree", tree, ("a drafted tree: a node", "sees its own path")),
        ("full", FULL, ("LLaDA, Dream: each", "token sees all")),
        ("block-causal", BlockCausal(4), ("SDAR, LLaDA-2: blocks", "in order, full inside")),
        ("prefix", PrefixLM(3), ("the prompt in full,", "then in order")),
    )
    parts = [text(20, 28, "Rows are the tokens that ask, columns those they may see.", "s")]
    for i, (name, rule, words) in enumerate(rules):
        left = 20 + i * (n * cell + gap)
        seen = mask(rule, at, at, 0)
        parts.append(text(left, top - 8, name, "b"))
        for q in range(n):
            for k in range(n):
                kind = "on" if seen is None or bool(seen[q, k]) else "cell"
                parts.append(f'<rect x="{left + k * cell}" y="{top + q * cell}" width="15" height="15" class="{kind}"/>')
        parts += [text(left, top + n * cell + 22 + 18 * j, line, "s") for j, line in enumerate(words)]
    return svg(20 + 5 * n * cell + 4 * gap + 20, top + n * cell + 54, "Attention visibility", parts)


def draft() -> str:
    """A draft tree, the pass that checks it, and what is kept."""
    spots = {
        "The": (60, 130), " cat": (170, 84), " dog": (170, 180), " sat": (280, 56), " ran": (280, 114), " on": (390, 56),
        " at": (390, 114),
    }  # fmt: skip
    edges = (("The", " cat"), ("The", " dog"), (" cat", " sat"), (" cat", " ran"), (" sat", " on"), (" sat", " at"))
    kept = {"The", " cat", " sat"}
    parts = [text(20, 24, "one pass of the model over all seven tokens", "s")]
    for a, b in edges:
        (x, y), (u, v) = spots[a], spots[b]
        parts.append(f'<path d="M{x + 35} {y}L{u - 35} {v}" class="{"path" if {a, b} <= kept else "edge"}"/>')
    for word, (x, y) in spots.items():
        kind = "on" if word in kept else "no" if word in (" on", " at", " dog", " ran") else "cell"
        parts.append(box(x - 35, y - 14, 70, 28, kind, word.strip()))
    parts += [
        text(60, 166, "last token", "s c"),
        text(480, 44, "After “sat” the model chooses “down”: neither", "s"),
        text(480, 62, "“on” nor “at” is right, and both are dropped.", "s"),
        text(480, 92, "The pass commits three tokens: two drafted ones,", "s"),
        text(480, 110, "and the model's own choice behind them.", "s"),
        *(box(480 + i * 84, 134, 76, 28, kind, word) for i, (word, kind) in enumerate(
            (("cat", "on"), ("sat", "on"), ("down", "new")))),
        text(480, 186, "Plain decoding would have needed three passes", "s"),
        text(480, 204, "for the same three tokens.", "s"),
    ]  # fmt: skip
    return svg(820, 224, "A draft tree and its verification", parts)


def cache() -> str:
    """Key slots of one row, left to right and on a canvas."""
    w, h = 44, 28

    def row(y: int, name: str, cells: Sequence[tuple[str, str]], note: str) -> list[str]:
        drawn = [text(20, y + 19, name, "b"), text(200, y + h + 18, note, "s")]
        return drawn + [box(200 + i * w, y, w - 3, h, kind, word) for i, (word, kind) in enumerate(cells)]

    prompt = [("p1", "on"), ("p2", "on"), ("p3", "on"), ("t1", "on")]
    tree = [("cat", "new"), ("dog", "new"), ("sat", "new"), ("ran", "new"), ("on", "new"), ("at", "new")]
    done = [("cat", "on"), ("sat", "on"), ("", "cell"), ("", "cell"), ("", "cell"), ("", "cell")]
    block = [("b1", "new"), ("b2", "new"), ("b3", "new"), ("b4", "new")]
    parts = [
        text(20, 28, "Left to right: one slot per token, written once", "s"),
        *row(44, "a pass of a draft", prompt + tree, "the keys of all nodes stand behind what is committed"),
        *row(112, "after verification", prompt + done, "the accepted path is gathered, the rest is overwritten"),
        text(20, 200, "A canvas: the block is computed anew in every forward, the rest keeps its keys (canvas-cache)", "s"),
        *row(216, "inside a block", prompt + block + [("m", "cell")] * 4, "recomputed: the block; old: masks behind it"),
        *row(284, "at a block's start", [(name, "new") for name, _ in prompt + block] + [("m", "new")] * 4,
             "everything once, so that nothing grows older than one block"),
    ]  # fmt: skip
    for i, (kind, words) in enumerate((("on", "kept"), ("new", "computed in this pass"), ("cell", "free, or old"))):
        parts += [box(20 + i * 200, 350, 22, 16, kind), text(50 + i * 200, 363, words, "s")]
    return svg(780, 384, "Keys and values", parts)


def canvas() -> str:
    """The first block of a canvas of mini-dlm as it fills under a threshold: every commit of a real run."""
    import hasten

    llm = hasten.load("mini-dlm")
    events = list(llm.stream("records: 21 bob 31;22 eve 25\n", max_tokens=64, method="threshold"))
    first, end = next((event.position, event.total) for event in events if event.kind == "block")
    commits = [event for event in events if event.kind == "commit" and event.position < end]
    last, steps = end - 1, sorted({event.step for event in commits})
    w, left, top = 22, 100, 58
    parts = [
        text(
            20,
            28,
            "the first block of mini-dlm's answer to “records: 21 bob 31;22 eve 25”, threshold 0.9; · is a mask",
            "s",
        )
    ]
    known: dict[int, str] = {}
    for i, step in enumerate(steps):
        new = {event.position: event for event in commits if event.step == step}
        known |= {position: llm.decode([event.token]) for position, event in new.items()}
        y = top + i * 62
        parts.append(text(20, y + 18, f"forward {i + 1}", "b"))
        for position in range(first, last + 1):
            kind = "new" if position in new else "on" if position in known else "cell"
            word = known.get(position, "·")
            parts.append(box(left + (position - first) * w, y, w - 2, 26, kind, word))
        sure = [event.confidence for event in new.values()]
        what = f"{len(sure)} tokens, each at 0.9 or more" if min(sure) >= 0.9 else f"only the surest, at {max(sure):.2f}"
        parts.append(text(left, y + 44, f"committed: {what}", "s"))
    parts.append(text(20, top + len(steps) * 62 + 12, f"{len(commits)} tokens in {len(steps)} forwards", "s"))
    return svg(left + (last - first + 1) * w + 20, top + len(steps) * 62 + 30, "A canvas as it fills", parts)


def drawn() -> dict[Path, str]:
    """Path -> drawing of the figures that need no model."""
    return {IMAGES / f"{name.__name__}.svg": name() for name in (visibility, draft, cache)}


def main() -> None:
    """Write all figures."""
    for path, figure in {**drawn(), IMAGES / "canvas.svg": canvas()}.items():
        path.write_text(figure, encoding="utf-8")
        print(f"wrote {path.name}, {len(figure):,} bytes")


if __name__ == "__main__":
    main()
