"""Who may ask: keys on every route, one answer in constant time, loopback by default, no foreign hosts or origins."""

from __future__ import annotations

import ast
import base64
import inspect
import socket
import statistics
import subprocess
import sys
import time

import pytest
from live import KEY, OTHER_KEY, Served, chat, routes

from hasten.errors import ConfigError
from hasten.serve import security
from hasten.serve.settings import Settings

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


def paths(served: Served) -> list[str]:
    found = sorted(path.replace("{model}", "tiny") for path in routes(served.app))
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/tiny", "/ready", "/health",
            "/hasten/methods", "/openapi.json"} <= set(found)  # fmt: skip
    return found


def test_cve_2025_59425_every_route_but_health_needs_the_key(locked):
    with locked.client() as nobody, locked.client(KEY) as somebody:
        for path in paths(locked):
            for method in ("GET", "POST", "HEAD"):
                status = nobody.request(method, path).status_code
                assert (status == 401) == (path != "/health"), (method, path, status)
                assert somebody.request(method, path).status_code != 401
        assert nobody.get("/health").status_code == 200
        assert nobody.get("/health/../v1/models").status_code != 200
        for near in (
            "/health/",
            "//health",
            "/HEALTH",
            "/health%2f",
            "/health;x",
            "/v1/models?x=/health",
            "/v1/models#/health",
        ):
            assert nobody.get(near).status_code == 401, near


WRONG = [
    None, "", "Bearer", "Bearer x", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY.upper()}", f"Token {KEY}", KEY,
    f"Bearer {KEY} {OTHER_KEY}", "Basic", "Basic !!", "Basic " + base64.b64encode(KEY.encode()).decode(),
    "Basic " + base64.b64encode(f"{KEY}:".encode()).decode(), "Basic " + base64.b64encode(b"x:wrong").decode(), "Bearer \u00e9",
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_key_opens_nothing(locked, value):
    headers = {} if value is None else {"Authorization": value.encode("latin-1")}
    with locked.client() as client:
        answer = client.post("/v1/chat/completions", json=chat(), headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert KEY[:6] not in answer.text


def test_both_spellings_of_a_right_key_open(locked):
    basic = {"Authorization": "Basic " + base64.b64encode(f"anybody:{OTHER_KEY}".encode()).decode()}
    with locked.client(KEY) as client, locked.client() as browser:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
        assert browser.get("/v1/models", headers=basic).status_code == 200
        assert browser.get("/v1/models").headers["www-authenticate"].startswith("Basic")
        twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")]
        assert browser.get("/v1/models", headers=twice).status_code == 401


def test_cve_2025_59425_keys_are_compared_in_constant_time():
    """By the source: hashes go through compare_digest, all of them, and no key meets ==, `in` or startswith."""
    tree = ast.parse(inspect.getsource(security))
    tenant = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "_tenant")
    calls = [ast.unparse(node.func) for node in ast.walk(tenant) if isinstance(node, ast.Call)]
    assert "hmac.compare_digest" in calls
    assert "hashlib.sha256" in calls
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            text = ast.unparse(node)
            assert not any(name in text for name in ("digest", "_keys", "given")), text


def test_the_time_of_a_wrong_key_does_not_tell_how_much_of_it_is_right():
    gate = security.Gate(None, Settings(keys=(KEY * 200,)))
    near, far = (f"Bearer {KEY * 199}{KEY[:-1]}x".encode(), f"Bearer {'x' * len(KEY * 200)}".encode())

    def spent(value: bytes) -> float:
        start = time.perf_counter_ns()
        for _ in range(20):
            assert gate._tenant([value]) is None
        return time.perf_counter_ns() - start

    pairs = [(spent(near), spent(far)) for _ in range(300)]
    ratio = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
    assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "fe80::1"])
def test_cve_2025_30202_off_loopback_needs_a_key(host):
    with pytest.raises(ConfigError, match="key") as caught:
        Settings(host=host)
    assert caught.value.field == "host"
    assert not Settings(host=host, keys=(KEY,)).loopback
    assert Settings(host=host, open_network=True).open_network
    with pytest.raises(ConfigError):
        Settings(host=host, keys=("short",))


def test_cve_2025_30202_the_default_is_loopback():
    assert Settings().host == "127.0.0.1"
    assert Settings().loopback


def test_cve_2023_48022_the_command_refuses_an_open_network_without_a_key():
    command = [sys.executable, "-m", "hasten", "serve", "mini-dlm", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "key" in done.stderr
    assert "Traceback" not in done.stderr


def test_cve_2026_27482_only_get_head_and_post_are_served(server):
    for path in paths(server):
        for method in METHODS:
            if method in ("GET", "HEAD", "POST"):
                continue
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            assert server.raw(head).split(b" ")[1] in (b"405", b"400"), (method, path)


def test_no_route_changes_or_ends_the_server(server):
    """vLLM's guide names /invocations, /pause and /update_weights: doors that a key on /v1 did not close."""
    known = {"/", "/health", "/ready", "/metrics", "/openapi.json"}
    assert {path for path in paths(server) if not path.startswith(("/v1/", "/hasten/"))} <= known
    with server.client() as client:
        for path in (
            "/invocations",
            "/pause",
            "/update_weights",
            "/reset_prefix_cache",
            "/docs",
            "/redoc",
            "/shutdown",
            "/v1/files",
        ):
            assert client.post(path).status_code == 404
            assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "", "[::2]", "0.0.0.0"]
)
def test_cve_2025_62593_a_rebound_name_is_refused(server, host):
    """A page whose name was pointed at 127.0.0.1 sends its own name as Host."""
    request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    assert b" 403 " in server.raw(request)[:16]


def test_hosts_of_this_machine_and_those_allowed_are_served(server):
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", "[::1]", f"[::1]:{server.port}", "LOCALHOST"):
        request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        assert b" 200 " in server.raw(request)[:16], host
    assert Settings(hosts=("model.lan",)).names_host("Model.lan:80")
    assert not Settings(hosts=("model.lan",)).names_host("x.model.lan")
    twice = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert server.raw(twice).split(b" ")[1] in (b"400", b"403")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "http://127.0.0.1.evil.example", "x"]
)
def test_cve_2025_62593_a_foreign_origin_is_refused(server, origin):
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=chat(), headers={"Origin": origin}).status_code == 403
        own = f"http://127.0.0.1:{server.port}"
        answer = client.post("/v1/chat/completions", json=chat(), headers={"Origin": own})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_websocket_is_no_way_in(server):
    request = (
        b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), 5) as link:
        link.sendall(request)
        assert b" 101 " not in link.recv(200)[:16]
