"""Names in requests are names: no path leads out of what is served."""

from __future__ import annotations

import pytest
from live import chat

from hasten.errors import ConfigError
from hasten.serve.run import named
from hasten.serve.settings import NAME, Settings

NAMES = [
    "../tiny", "..", ".", "/etc/passwd", "a/../tiny", "./tiny", "tiny/", "tiny\x00", "%2e%2e%2ftiny", "..%2f..%2fetc%2fpasswd",
    "..\\tiny", "C:\\tiny", "C:tiny", "\\\\host\\share", "file:///etc/passwd", "tiny/../../../etc/passwd", "~/x", "$HOME", "tiny\n", " tiny",
    "hf://a/b", "org/model", "/proc/self/environ", "tiny:latest", "sha256:../../x", "CON", "\u2025/\u2025/etc",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_cve_2024_37032_model_names_are_no_paths(server, name):
    """Ollama's digest, Ray's file routes (CVE-2023-6021) and llama.cpp's local media: a name reached the file system."""
    with server.client() as client:
        for path, body in (
            ("/v1/chat/completions", {**chat(), "model": name}), ("/v1/completions", {"model": name, "prompt": "a"}),
            ("/v1/embeddings", {"model": name, "input": "a"}),
        ):  # fmt: skip
            answer = client.post(path, json=body)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"
            assert "root:" not in answer.text


RAW = [
    b"../tiny",
    b"%2e%2e/tiny",
    b"%2e%2e%2ftiny",
    b"..%5ctiny",
    b"%00",
    b"tiny%00",
    b"%c0%ae%c0%ae/x",
    b"//etc/passwd",
    b"..;/x",
    b"%ff",
]


@pytest.mark.parametrize("name", RAW)
def test_cve_2023_6021_paths_of_urls_lead_to_no_file(server, name):
    for start in (b"/v1/models/", b"/", b"/static/", b"/hasten/", b"/page/"):
        request = b"GET " + start + name + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = server.raw(request)
        assert answer.split(b" ")[1] in (b"404", b"400"), answer[:200]
        assert b"root:" not in answer


def test_cve_2024_37032_names_under_which_models_are_served_are_checked():
    for name in NAMES:
        if name != "CON":
            assert not NAME.match(name), name
    for alias in ("../x", "a/b", "", "a b", "-x"):
        with pytest.raises(ConfigError):
            Settings(aliases={alias: "tiny"})
    assert list(named(["/models/some.model.gguf"], {}, {})) == ["some.model"]
    for model in ("/", "..", "/models/..", "/models/a b.gguf"):
        with pytest.raises(ConfigError):
            named([model], {}, {})


def test_cve_2025_62164_tensors_are_not_read_from_requests(server):
    with server.client() as client:
        for field in ("prompt_embeds", "input_embeds", "inputs_embeds", "tensors", "lora_path", "extra_key"):
            for path, body in (("/v1/completions", {"model": "tiny", "prompt": "a"}), ("/v1/chat/completions", chat())):
                answer = client.post(path, json={**body, field: "gAUVAAAAAAAAAIwFcG9zaXg="})
                assert answer.status_code == 400
                assert field in answer.json()["error"]["message"]
