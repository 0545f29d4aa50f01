"""The page: one document that needs nothing else, a policy that allows exactly its own texts, and its use in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hasten.serve.page import document

HERE = Path(__file__).parent / "page"
SOURCES = Path(__file__).parents[2] / "src" / "hasten" / "serve" / "page"
CHROMIUM = os.environ.get("HASTEN_CHROMIUM", "/usr/bin/chromium")
SCENARIOS = (
    "the chat streams and says what it cost",
    "Escape stops an answer, and the button does",
    "regenerate, edit, new chat",
    "hostile answers stay text",
    "errors stand where the answer would",
    "settings reach the server",
    "the canvas fills, and every pass can be replayed",
    "a canvas of 512 places stays smooth",
    "a race ends with a summary",
    "the catalog is searched as one types, and a method is tried",
    "the keyboard is enough",
    "the theme follows the system until it is chosen, and is remembered",
    "without storage nothing is remembered and nothing breaks",
    "360 px are wide enough",
)


class Elements(HTMLParser):
    """Every element of a document, and the text within scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag if tag in self.inline else ""

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inline[self._open].append(data)


@pytest.fixture(scope="module")
def parsed() -> Elements:
    return Elements(document()[0].decode())


def policy() -> dict[str, list[str]]:
    directives = document()[1]["Content-Security-Policy"].split(";")
    return {name: values for name, *values in (directive.split() for directive in directives)}


def test_the_document_needs_nothing_else(parsed):
    text = document()[0].decode()
    assert re.findall(r"\b(?:https?|wss?|ftp)://\w[^\s\"')]*", text) == []
    assert re.findall(r"@import|url\(|<!--(?:style|theme|script)-->", text) == []
    for tag, attributes in parsed.tags:
        assert tag not in ("iframe", "object", "embed", "base", "img"), tag
        assert not attributes.keys() & {"src", "srcset", "action", "style"}, (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        address = attributes.get("href") or "#"
        assert address[0] == "#" or address == "data:," or re.fullmatch(r"/\w+", address), address


def test_the_policy_allows_exactly_the_inline_texts(parsed):
    allowed = policy()
    for kind in ("script", "style"):
        texts = parsed.inline[kind]
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert sorted(allowed[f"{kind}-src"]) == sorted(f"'sha256-{one}'" for one in hashes)
    assert len(parsed.inline["script"]) == 2
    assert allowed["default-src"] == ["'none'"]
    assert allowed["connect-src"] == ["'self'"]
    assert allowed["img-src"] == ["data:"]
    for name in ("frame-ancestors", "base-uri", "form-action", "trusted-types"):
        assert allowed[name] == ["'none'"]
    assert allowed["require-trusted-types-for"] == ["'script'"]


def test_the_headers_keep_the_page_to_itself():
    headers = document()[1]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["Accept-Ranges"] == "none"
    assert document() is document(), "put together once"


def test_no_script_makes_markup_out_of_text():
    """What would let a model's text become elements or code is in none of the files."""
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|\beval\(|new Function|srcdoc|setHTML"
    files = sorted(SOURCES.glob("*.js"))
    assert len(files) > 10
    for file in files:
        assert re.findall(sinks, file.read_text(encoding="utf-8")) == [], file.name
    assert re.search(sinks, "node.innerHTML = text")


def test_every_module_is_in_the_document_once_and_no_name_is_taken_twice(parsed):
    script = next(text for text in parsed.inline["script"] if len(text) > 10_000)
    assert re.findall(r"^\s*(?:import|export)\b.*", script, re.MULTILINE) == []
    for file in SOURCES.glob("*.js"):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert document()[0].decode().count(first) == 1, file.name
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", script, re.MULTILINE)
    names += re.findall(r"^const \[(\w+), (\w+)\]", script, re.MULTILINE)
    assert len(names) > 50
    assert sorted({name for name in names if names.count(name) > 1}) == []


def node() -> str:
    """The path of a Node that reads modules as they are; skips without one."""
    found = shutil.which("node")
    if not found:
        pytest.skip("Node is not installed (the page's own scripts are tested with it)")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    if tuple(map(int, version.strip().lstrip("v").split(".")[:2])) < (20, 19):
        pytest.skip(f"Node {version.strip()} is too old to tell modules by their content (20.19 can)")
    return found


def test_the_scripts_without_a_browser():
    """Stream parser, Markdown, trace model and race summary: units.mjs."""
    done = subprocess.run([node(), "--test", str(HERE / "units.mjs")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"pass (\d+)", done.stdout)
    assert passed
    assert int(passed[1]) >= 9


def test_the_page_finds_what_the_command_finds():
    """search.js over what the server hands out gives the order of registry.search, query by query."""
    from hasten import registry
    from hasten.serve import models

    assert models.methods() == registry.served()
    served = json.loads(json.dumps(registry.served()))
    assert served["methods"] == json.loads(json.dumps(registry.catalog()))
    queries = ["", "threshold", "Token Recycling", "2509.26432", "needs=full", "needs=none state=works", "folder=bench survey",
               "short canvases", "vicinity", "(", "1.5x", "hasten/draft/rsd.py", "zzzz", "2025-10 lossy", "d"]  # fmt: skip
    program = """
      import { readFileSync } from "node:fs";
      const { findMethods } = await import(process.argv[1]);
      const { methods, searched, queries } = JSON.parse(readFileSync(0, "utf8"));
      console.log(JSON.stringify(queries.map((query) => findMethods(methods, query, searched).map((one) => one.slug))));
    """
    command = [node(), "--input-type=module", "-e", program, (SOURCES / "search.js").as_uri()]
    given = json.dumps({**served, "queries": queries})
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = [[one["slug"] for one in registry.search(registry.catalog(), q.split(), registry.SEARCHED)] for q in queries]
    assert json.loads(done.stdout) == wanted
    assert sum(map(bool, wanted)) >= 12


def browse(url: str, **environment: str) -> dict[str, str]:
    """Run browser.mjs against `url`; scenario -> "ok" or what failed. Skips when a browser or its driver is missing."""
    if not Path(CHROMIUM).is_file():
        pytest.skip(f"no browser at {CHROMIUM} (HASTEN_CHROMIUM names another)")
    program = [node(), str(HERE / "browser.mjs"), url, *filter(None, [os.environ.get("HASTEN_SHOTS")])]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    if "Cannot find module 'playwright-core'" in done.stderr:
        pytest.skip("playwright-core is not installed (npm install playwright-core; HASTEN_PLAYWRIGHT names its folder)")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def browsed() -> dict[str, str]:
    from page.fixture import FixtureServer

    with FixtureServer() as server:
        found = browse(f"http://127.0.0.1:{server.server_port}/")
        assert server.gone >= 2, "stopping an answer hangs up"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_in_a_browser(browsed, scenario):
    assert browsed[scenario] == "ok"


@pytest.mark.slow
def test_every_scenario_is_listed(browsed):
    assert sorted(browsed) == sorted(SCENARIOS)


@pytest.mark.slow
def test_the_page_and_the_real_server_agree(tmp_path):
    from chat_model import write_model
    from official import load, serving

    with serving({"tiny-chat": load(write_model(tmp_path)), "mini-dlm": load("mini-dlm")}) as served:
        found = browse(f"{served.base}/", HASTEN_PAGE_REAL="1")
    assert found == dict.fromkeys(found, "ok")
    assert len(found) == 3


@pytest.mark.slow
def test_a_key_is_asked_for_in_the_browser():
    from page.fixture import FixtureServer

    key = "a-key-of-the-fixture"
    with FixtureServer(key=key) as server:
        found = browse(f"http://127.0.0.1:{server.server_port}/", HASTEN_PAGE_KEY=key)
    assert found == {"a key is asked for": "ok"}
