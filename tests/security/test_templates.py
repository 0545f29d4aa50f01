"""Chat templates are programs of strangers: sandboxed, bounded, and out of the reach of requests."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from chat_model import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from live import chat, serving

import hasten
from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, HastenError
from hasten.models.templates import ChatTemplate

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ joiner.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__ }}", "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__['sys'] }}", "{{ lipsum.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}", "{{ '{0.__class__.__mro__}'.format(messages) }}", "{{ ('%s' * 9) % messages }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}", "{{ messages.append(1) }}{{ messages.clear() }}",
    "{% set x = messages.__iter__().__reduce__() %}{{ x }}", "{{ (1).__class__.from_bytes }}", "{{ raise_exception.__code__.co_consts }}",
    "{% include 'x' %}", "{% import 'os' as os %}", "{% extends '/etc/passwd' %}", "{{ config }}{{ request }}{{ url_for.__globals__ }}",
]  # fmt: skip
ENDLESS = [
    "{% for i in range(10**9) %}{% endfor %}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(99999)|list|map('string')|join('x' * 9999) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
]  # fmt: skip
SECRETS = ("<class", "function", "subclass", "uid=", "root:", "module 'os'", "mappingproxy", "_hasten", "built-in")


@pytest.mark.parametrize("source", ESCAPES)
def test_cve_2024_34359_known_escapes_of_the_sandbox_give_nothing(source):
    """And CVE-2026-5760, CVE-2025-61620: templates of GGUF files and of model folders go the same way."""
    try:
        pieces = ChatTemplate(source, ["<s>"], {}).render([{"role": "user", "content": "x"}], True)
    except HastenError:
        return
    shown = "".join(text for text, _ in pieces)
    assert not any(secret in shown for secret in SECRETS), shown


@pytest.mark.parametrize("source", ENDLESS)
def test_cve_2025_61620_endless_templates_stop_at_the_cap(source):
    start = time.monotonic()
    with pytest.raises(ConfigError):
        ChatTemplate(source, ["<s>"], {}).render([{"role": "user", "content": "x"}], True)
    assert time.monotonic() - start < LIMITS.template_s + 4


def test_cve_2026_5760_a_hostile_template_in_a_model_folder_costs_its_own_requests_only(tmp_path, monkeypatch):
    # long enough that a slow machine answers others meanwhile
    monkeypatch.setattr("hasten.models.templates.LIMITS", replace(LIMITS, template_s=8 * LIMITS.template_s))
    folders = {name: tmp_path / name for name in ("bad", "tiny")}
    for name, folder in folders.items():
        folder.mkdir()
        write_model(folder, **({"template": ENDLESS[1]} if name == "bad" else {}))
    loaded = {name: hasten.load(str(folder)) for name, folder in folders.items()}
    with serving(loaded) as server, server.client() as client, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(client.post, "/v1/chat/completions", json={**chat(), "model": "bad"})
        beside = 0
        while not slow.done():
            assert client.get("/health").status_code == 200
            assert client.post("/v1/chat/completions", json=chat()).status_code == 200
            beside += not slow.done()
        assert slow.result().status_code == 400
        assert "template" in slow.result().json()["error"]["message"]
        assert beside  # whole answers of the other model came while the template ran


KEYS = ["messages", "tools", "chat_template", "template", "tokenize", "add_generation_prompt", "enable_thinking", "documents",
        "__class__", "bos_token", "return_dict", "raise_exception", "", "x" * 300]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(kwargs=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON)
def test_cve_2025_62426_no_template_kwarg_of_a_request_reaches_anything_else(server, kwargs):
    with server.client() as client:
        plain = client.post("/v1/chat/completions", json=chat(temperature=0)).json()["choices"][0]["message"]["content"]
        answer = client.post("/v1/chat/completions", json=chat(temperature=0, chat_template_kwargs=kwargs))
    harmless = not kwargs or (
        isinstance(kwargs, dict)
        and set(kwargs) <= {"add_generation_prompt", "enable_thinking"}
        and kwargs.get("add_generation_prompt", True) is True
        and not kwargs.get("enable_thinking")
    )
    if answer.status_code == 200:
        same = answer.json()["choices"][0]["message"]["content"] == plain
        assert same or kwargs.get("add_generation_prompt") is False
        assert harmless or kwargs.get("add_generation_prompt") is False
    else:
        assert answer.status_code == 400, answer.text
        assert len(answer.content) <= LIMITS.error_bytes


def test_cve_2025_62426_other_requests_go_on_while_kwargs_are_refused(server):
    big = {"chat_template_kwargs": {"messages": ["x" * 1000] * 1000}}
    with server.client() as client, ThreadPoolExecutor(4) as pool:
        bad = [pool.submit(client.post, "/v1/chat/completions", json=chat(**big)) for _ in range(8)]
        start = time.perf_counter()
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
        assert time.perf_counter() - start < 3
        assert {one.result().status_code for one in bad} == {400}


def test_no_request_brings_a_template(server):
    with server.client() as client:
        for field in ("chat_template", "template", "prompt_template"):
            answer = client.post("/v1/chat/completions", json=chat(**{field: "{{ 7 * 7 }}"}))
            assert answer.status_code == 400
            assert field in answer.json()["error"]["message"]
        told = client.post("/v1/chat/completions", json=chat(temperature=0)).json()["usage"]["prompt_tokens"]
        for text in ("{{ 7 * 7 }}", "{% for i in range(99) %}x{% endfor %}"):
            answer = client.post("/v1/chat/completions", json=chat(text, temperature=0))
            assert answer.json()["usage"]["prompt_tokens"] > told
