"""The documentation site: it builds without a warning, every link leads somewhere, and a browser fetches nothing else."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
from xml.etree import ElementTree

import pytest
from source_tree import ROOT

DOCS = ROOT / "docs"
FETCHED = {"src", "srcset", "data", "poster", "action", "background"}  # attributes whose address a browser fetches
LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
TAGS = frozenset(
    re.findall(
        r"\w+",
        "a article b body br button circle code dd details div dl dt em figure footer form g h1 h2 h3 h4 h5 h6 head header "
        "hr html i img input label li line link main meta nav noscript ol p path pre rect script section small span strong "
        "style sub summary sup svg table tbody td template text th thead time title tr ul",
    )
)
ADDRESS = re.compile(r"""(?:https?:)?//[^\s"'`<>()\\,;]+""")


class Page(HTMLParser):
    """Ids, links to follow, and addresses that are fetched by itself, of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self._style = tag == "style"
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and LINKS & set(values.get("rel", "").split()):
            self.fetched.append(values["href"])
        self.fetched += [value for name, value in values.items() if name in FETCHED]
        self.fetched += styled(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._style:
            self.fetched += styled(data)


def styled(css: str) -> list[str]:
    """Addresses that a style sheet fetches."""
    found = re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", css)
    return [one or other for one, other in found]


def foreign(addresses: list[str]) -> list[str]:
    """Addresses beyond the site."""
    return [one for one in addresses if urlsplit(one).netloc or urlsplit(one).scheme not in ("", "data")]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly, with no proxy to reach anything through."""
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_of_the_documentation_is_on_the_site(site, pages):
    written = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert len(written) > 40
    assert {site / path for path in written} <= set(pages)
    home = pages[site / "index.html"]
    reached = {urldefrag(link).url for link in home.links}
    assert {path.as_posix() for path in written} <= reached | {"index.html"}, "the navigation leads to every page"


def test_no_word_in_angle_brackets_became_a_tag(pages):
    for path, page in pages.items():
        assert page.tags <= TAGS, path.name


def test_links_and_anchors_lead_somewhere(site, pages):
    lost = []
    for path, page in pages.items():
        for link in page.links + page.fetched:
            if foreign([link]) or link.startswith("data:") or path.name == "404.html":
                continue
            address, anchor = urldefrag(link)
            target = (path.parent / unquote(address)).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target)
            if not target.is_file() or (anchor and known and unquote(anchor) not in known.ids and anchor != "__top"):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert lost == []


def test_a_browser_fetches_nothing_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert foreign(page.fetched) == [], path.relative_to(site)
    for path in site.rglob("*.css"):
        assert foreign(styled(path.read_text(encoding="utf-8"))) == [], path.name
    folder = site / "assets" / "javascripts"  # its lunr/ holds languages of the search that are not used
    scripts = [path.read_text(encoding="utf-8") for path in (*folder.glob("*.js"), *folder.glob("workers/*.js"))]
    assert len(scripts) == 2
    hosts = {
        host
        for text in scripts
        for host in re.findall(r"https?://([\w.-]+)", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))
    }
    # The theme asks the first for a star count where the settings name a repository, which these do not; the second
    # stands in the words of an error.
    assert hosts <= {"api.github.com", "bit.ly"}
    assert "repo_url" not in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_what_is_fetched_is_found():
    text = (
        '<link rel="stylesheet" href="https://a/x.css"><link rel="canonical" href="https://b/"><img src="//c/i.png">'
        '<a href="https://d/">d</a><script src="e.js"></script><p style="background: url(https://f/)"></p>'
        "<style>@import 'https://g/';p{background:url(data:image/png,)}</style>"
    )
    assert foreign(Page(text).fetched) == ["https://a/x.css", "//c/i.png", "https://f/", "https://g/"]


@pytest.mark.parametrize("path", sorted((DOCS / "images").glob("*.svg")), ids=lambda path: path.name)
def test_figures_are_small_drawings_of_their_own_in_two_colour_schemes(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 30_000
    tree = ElementTree.fromstring(text)
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert tags <= {"svg", "title", "style", "rect", "text", "path"}, "nothing that loads or runs"
    assert set(ADDRESS.findall(text)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme:dark" in text


def hooks():
    """docs/hooks.py as a module."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_page_finds_its_place_by_itself():
    pages = ["index.md", "new.md", "guide/ray.md", "guide/new.md", "methods/a.md", "methods/b.md", "methods/c.md", "cli.md"]
    made = hooks().nav(pages, {"a": "draft", "b": "unmask", "c": "bench"})
    assert made == [
        {"Start": ["index.md"]},
        {"Guides": ["guide/ray.md", "guide/new.md"]},
        {
            "Methods": [
                {"Drafters": ["methods/a.md"]},
                {"Filling a canvas": ["methods/b.md"]},
                {"Works beside these": ["methods/c.md"]},
            ]
        },
        {"Reference": ["cli.md", "new.md"]},
    ]
