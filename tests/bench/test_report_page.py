"""The report of the bench: nothing is asked of other addresses, texts of models stay texts, figures and plots are the result's."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.bench import charts
from hasten.bench.page import headline, page

EVIL = '<script src="https://evil.example/x.js">alert(1)</script>"\'><img src=x onerror=alert(2)> &lt;b&gt; \x00\x1b[31m\u202e \ud800'
TAGS = set(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "p",
        "small",
        "div",
        "table",
        "tr",
        "th",
        "td",
        "span",
        "details",
        "summary",
        "pre",
        "figure",
        "br",
        "svg",
        "line",
        "text",
        "polyline",
        "circle",
        "rect",
    ]
)
ATTRIBUTES = set(
    [
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "dir",
        "viewbox",
        "role",
        "aria-label",
        "x",
        "y",
        "x1",
        "x2",
        "y1",
        "y2",
        "cx",
        "cy",
        "r",
        "width",
        "height",
        "points",
        "text-anchor",
        "transform",
    ]
)


class Reader(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def spread(value: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {"median": value, "min": value if low is None else low, "max": value if high is None else high}


def arm(seconds: float, quality: float, speed: float, **more: Any) -> dict[str, Any]:
    return {
        "methods": [], "peer": False, "quality": spread(quality), "same_text": [1, 2], "tokens": spread(8.0),
        "time": {"seconds": spread(seconds, seconds / 2, seconds * 2), "speedup": spread(speed), "tokens_per_s": spread(1.0),
                 "decoding_speedup": spread(speed), "drafting": spread(0.0)},
        "groups": {"a": {"quality": quality, "time": {"speedup": speed}}, EVIL: {"quality": 0.0, "time": {"speedup": 1.0}}},
        **more,
    }  # fmt: skip


def result(**arms: dict[str, Any]) -> dict[str, Any]:
    answers = {name: {"text": EVIL, "quality": 0.5, "note": EVIL, "forwards": 2, "time": {"seconds": 1.0}} for name in arms}
    return {
        "suite": "canvas", "about": "worlds", "model": {"model": EVIL, "backbone": "native"}, "quality_is": EVIL, "cases": 4,
        "options": {"file": EVIL, "whole": False}, "seeds": [0, 1], "left_out": {"cases": 3, "peers": {"llama.cpp": EVIL}},
        "arms": arms, "texts": [{"seed": 0, "group": EVIL, "prompt": EVIL, "answers": answers}],
        "pass_ms": {"1": 1.0, "2": 1.2, "4": 3.0, "64": 40.0}, "machine": {"cpu": EVIL, "threads": 2, "torch": "2"}, "seconds": 9.0,
    }  # fmt: skip


FULL = result(
    plain=arm(1.0, 90.0, 1.0, commits=[{"group": "a", "places": 4, "order": [0.0, 0.5, None, 1.0]}]),
    quick=arm(
        0.1, 90.0, 10.0, acceptance=[[0.9, 50], [0.5, 20], [0.1, 2]], forwards=spread(3.0), tokens_per_forward=spread(2.0)
    ),
    rough=arm(0.05, 40.0, 20.0, commits=[{"group": "a", "places": 128, "order": [i / 64 for i in range(64)]}]),
)


def test_nothing_of_the_page_leads_anywhere_and_texts_stay_texts():
    text = page(FULL)
    read = Reader(text)
    assert read.open == []
    assert set(read.tags) <= TAGS
    assert {name for name, _ in read.attributes} <= ATTRIBUTES
    outside = re.sub(r"&[a-z#0-9]+;", "", text)
    assert not re.search(
        r"(?i)(src|href|action|data|formaction|srcset|xlink)\s*=\s*[\"']?\w", re.sub(r">[^<]*<", "><", text)
    )
    assert not re.search(r"(?i)url\(|@import|<script|<link|<iframe|javascript:", outside)
    assert "default-src 'none'" in text
    shown = [data for tag, data in read.texts if tag == "pre"]
    assert shown.count(EVIL.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")) == 4
    text.encode("utf-8")


def test_it_reads_on_phones_and_in_the_dark():
    text = page(FULL)
    assert 'name="viewport" content="width=device-width,initial-scale=1"' in text
    assert "prefers-color-scheme:dark" in text
    assert len(text) < 60_000


def test_every_figure_of_the_table_is_the_result_s():
    read = Reader(page(FULL))
    cells = [data for tag, data in read.texts if tag == "td"]
    for shown in ("90", "40", "10x", "20x", "0.1", "1 of 2", "llama.cpp left out", "3, too long for the model"):
        assert shown in cells, shown
    assert {"1", "2", "3"} <= {data for tag, data in read.texts if tag == "span"}


def test_plots_are_drawn_where_there_is_something_to_draw():
    full, bare = page(FULL), page(result(plain=arm(1.0, 50.0, 1.0)) | {"pass_ms": {}, "texts": []})
    for heading in ("Quality and time", "Acceptance by place in the draft", "Order of commits", "Cost of a pass", "Texts"):
        assert heading in full
        assert (heading in bare) == (heading == "Quality and time")
    facts = page({**FULL, "arms": {}, "texts": [], "facts": [["perplexity", "9"]]})
    assert "perplexity" in facts
    assert "Quality and time" not in facts


def test_the_front_is_what_none_is_better_than():
    arms = {"a": arm(1.0, 90.0, 1.0), "b": arm(0.5, 95.0, 2.0), "c": arm(0.2, 50.0, 5.0), "d": arm(2.0, 20.0, 0.5)}
    [points] = re.findall(r'<polyline class="front" points="([^"]+)"', charts.pareto(arms, "x"))
    dots = re.findall(r'<circle class="dot s(\d)" cx="([\d.]+)" cy="([\d.]+)"', charts.pareto(arms, "x"))
    place = {int(i): (float(x), float(y)) for i, x, y in dots}
    corners = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert place[2] in corners
    assert place[1] in corners
    assert place[0] not in corners
    assert place[3] not in corners


def test_acceptance_leaves_out_places_that_few_drafts_reach():
    drawn = charts.acceptance(FULL["arms"])
    assert drawn.count('r="4"') == 2, "the third place was reached by two drafts"
    assert charts.acceptance({"plain": arm(1.0, 1.0, 1.0)}) == ""


def test_the_map_shows_every_cell_in_its_shade():
    drawn = charts.order(FULL["arms"], "a")
    assert re.findall(r'<rect class="(o\d)"', drawn)[:3] == ["o1", "o5", "o8"], (
        "early, middle, late; the third cell stays empty"
    )
    assert charts.order(FULL["arms"], "none") == ""
    widths = [float(w) for w in re.findall(r'<rect class="o\d"[^>]*width="([\d.]+)"', drawn)[3:]]
    assert sum(widths) == pytest.approx(charts.WIDTH - 190 - charts.RIGHT, abs=1)


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ({"plain": (90.0, 1.0), "b": (90.0, 2.5)}, "b is 2.5x as fast as plain at no loss of quality in 4 cases."),
        ({"plain": (90.0, 1.0), "b": (95.0, 0.5)}, "No arm is faster than plain without losing quality in 4 cases."),
        ({"plain": (90.0, 1.0), "b": (80.0, 3.0)}, "Fastest is b, 3x, at a quality of 80 % against 90 %."),
        ({"plain": (0.0, 1.0), "b": (0.0, 3.0)}, "No arm got anything right in 4 cases"),
    ],
)
def test_the_headline_says_what_the_figures_say(arms, says):
    assert says in headline(result(**{name: arm(1.0 / speed, quality, speed) for name, (quality, speed) in arms.items()}))


@given(st.lists(st.tuples(st.floats(1e-6, 1e4), st.floats(0, 100), st.floats(0, 1)), min_size=1, max_size=16))
def test_any_figures_are_drawn_inside_the_plot(points):
    arms = {str(i): arm(seconds, quality, share) for i, (seconds, quality, share) in enumerate(points)}
    drawn = charts.pareto(arms, "x")
    for x in re.findall(r'cx="([^"]+)"', drawn):
        assert charts.LEFT <= float(x) <= charts.WIDTH
    assert "nan" not in drawn
    assert "inf" not in drawn


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_three_digits(value):
    shown = float(charts.number(value).replace(",", ""))
    if 1e-4 < abs(value) < 1e15:
        assert shown == pytest.approx(value, rel=6e-3)
    else:
        assert abs(shown - value) <= 1e-4 or abs(value) >= 1e15


@given(st.text())
def test_escaped_text_holds_no_markup(text):
    assert not set("<>\"'\x00\x1b\x7f") & set(charts.escape(text))
