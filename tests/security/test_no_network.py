"""The server opens no connection, whatever a request says: texts with links, image URLs, settings of the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from live import chat

SEEN: list[str] = []
_ON = [False]


def _watch(event: str, given: tuple) -> None:
    if _ON[0] and event in (
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "urllib.Request",
        "subprocess.Popen",
    ):
        SEEN.append(f"{event} {given!r}")


@pytest.fixture
def watched(server):
    """Connections and look-ups of this process but those to the server itself; an audit hook cannot be removed."""
    if not getattr(sys, "_hasten_watch", False):
        sys.addaudithook(_watch)
        sys._hasten_watch = True
    SEEN.clear()
    _ON[0] = True
    yield lambda: [
        one
        for one in SEEN
        if f"'127.0.0.1', {server.port})" not in one and not one.startswith("socket.getaddrinfo ('127.0.0.1'")
    ]
    _ON[0] = False


LINKS = [
    "![x](http://192.0.2.1/a.png)", "[x](https://192.0.2.1/)", '<img src="http://192.0.2.1/a.png">', "http://169.254.169.254/latest/meta-data/",
    "file:///etc/passwd", "![](//192.0.2.1/x)", "data:image/png;base64,AAAA", "gopher://192.0.2.1:1/_x", "\\\\192.0.2.1\\share\\x",
]  # fmt: skip
URLS = [
    "http://192.0.2.1/x.png", "https://localhost:1/x.png", "http://127.0.0.1\\@192.0.2.1/", "http://2130706433/", "http://[::ffff:7f00:1]/",
    "http://user@192.0.2.1/", "file:///etc/passwd", "data:image/png;base64,iVBORw0KGgo=", "ftp://192.0.2.1/x", "/etc/passwd",
]  # fmt: skip


def test_the_hook_sees_connections(watched):
    import socket

    with pytest.raises(OSError), socket.socket() as link:
        link.settimeout(0.01)
        link.connect(("192.0.2.1", 9))
    assert any("192.0.2.1" in one for one in watched())


@pytest.mark.parametrize("text", LINKS)
def test_cve_2026_0599_links_in_text_open_no_socket(server, watched, text):
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=chat(text)).status_code == 200
        assert (
            client.post(
                "/v1/chat/completions",
                json=chat(
                    [{"role": "system", "content": text}, {"role": "user", "content": [{"type": "text", "text": text}]}]
                ),
            ).status_code
            == 200
        )
        assert client.post("/v1/completions", json={"model": "tiny", "prompt": text, "max_tokens": 2}).status_code == 200
        assert client.post("/v1/embeddings", json={"model": "tiny", "input": [text]}).status_code == 200
    assert watched() == []


@pytest.mark.parametrize("url", URLS)
def test_cve_2026_24779_image_urls_are_refused_unread(server, watched, url):
    """And GHSA-3f6c-7fw2-ppm4: with no fetching there is no second URL parser to disagree with."""
    parts = [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url}, {"type": "input_image", "image_url": url},
        {"type": "video_url", "video_url": {"url": url}}, {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, {"type": "file", "file": {"file_data": url}},
    ]  # fmt: skip
    with server.client() as client:
        for part in parts:
            answer = client.post("/v1/chat/completions", json=chat([{"role": "user", "content": [part]}]))
            assert answer.status_code == 400, part
            assert answer.json()["error"]["param"].startswith("messages[0].content")
    assert watched() == []


def test_no_telemetry_even_where_the_environment_asks_for_it():
    """FastAPI and OpenTelemetry read these variables; a server with them connects nowhere."""
    program = (
        "import sys, asyncio\nseen = []\n"
        "sys.addaudithook(lambda e, a: seen.append((e, a)) if e in ('socket.connect', 'socket.getaddrinfo') else None)\n"
        "import hasten, httpx\nfrom hasten.serve.app import build_app\nfrom hasten.serve.settings import Settings\n"
        "from hasten.serve.worker import Worker\n"
        "app = build_app(Worker({'mini-dlm': lambda: hasten.load('mini-dlm')}, Settings()), Settings(), drain_s=0.1)\n"
        "async def main():\n"
        "    async with app.router.lifespan_context(app):\n"
        "        transport = httpx.ASGITransport(app=app)\n"
        "        async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:\n"
        "            for _ in range(3):\n"
        "                await client.get('/v1/models')\n"
        "                await client.get('/nope')\n"
        "asyncio.run(main())\n"
        "assert getattr(app, '_telemetry', {'auto_configure': False})['auto_configure'] is False\n"
        "print(seen)\n"
    )
    environment = {
        **os.environ, "FASTAPI_OTEL_AUTO_CONFIGURE": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://192.0.2.1:4318",
        "OTEL_BSP_SCHEDULE_DELAY": "10",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
