"""Schemas, regexes and grammars of requests: a broken one costs its own request, a large one is refused before it costs."""

from __future__ import annotations

import json
import os
import threading
import time

import jsonschema
import pytest
from live import chat

from hasten.engine.limits import LIMITS
from hasten.types import Grammar

BROKEN = [
    {"type": "nope"}, {"type": 5}, {"type": []}, {"$ref": "#/nowhere"}, {"$ref": "http://192.0.2.1/x"}, {"$ref": 3}, {"properties": []},
    {"enum": []}, {"enum": 3}, {"required": "a"}, {"minLength": -1}, {"minItems": 2**70, "type": "array"}, {"pattern": "("}, {"pattern": 5},
    {"pattern": "(?=a)b"}, {"pattern": "\\1"}, {"multipleOf": 0}, {"items": 3}, {"anyOf": {}}, {"allOf": []}, {"not": 5}, {"x": 1},
    {"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"minimum": "3"}, {"const": "\ud800"},
]  # fmt: skip
BAD_TOOLS = [[{"type": "nope"}], [{}], [[]], [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 3}}}],
             [{"type": "function", "function": {"name": "f", "parameters": BROKEN[9] | {"type": "object"}}}]]  # fmt: skip


def schema(value, **more):
    return chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}}, **{"model": "ended", **more}
    )


def good(client) -> None:
    answer = client.post("/v1/chat/completions", json=schema({"enum": ["yes", "no"]}, max_tokens=12))
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["choices"][0]["message"]["content"]) in ("yes", "no")


@pytest.mark.parametrize("value", BROKEN, ids=range(len(BROKEN)))
def test_cve_2025_48942_a_broken_schema_costs_its_own_request(server, value):
    """And CVE-2025-48943, for regexes: vLLM's engine ended for everybody."""
    with server.client() as client:
        body = json.dumps(schema(value)).encode()
        answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert "response_format" in (answer.json()["error"]["param"] or "")
        good(client)


def test_cve_2025_48942_a_schema_that_turns_out_to_lead_nowhere_is_the_request_s_fault(server):
    """A definition that is nothing but itself is seen when the answer gets there: a 400 then, and no 5xx."""
    endless = {
        "type": "object",
        "properties": {"a": {"$ref": "#/properties/a"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=schema(endless, max_tokens=60))
        assert answer.status_code == 400, answer.text
        assert "grammar" in answer.json()["error"]["message"]
        good(client)


@pytest.mark.parametrize(
    "source",
    ["(", "[", "a{99999999}", "(?<=a)b", "(?P<n>a)(?P=n)", "*", "\\", "a{5,1}", "[b-a]", "(" * 5000 + ")" * 5000, ""],
)
def test_cve_2025_48943_a_broken_regex_costs_its_own_request(server, source):
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=chat(model="ended", hasten={"regex": source}))
        assert answer.status_code == 400, answer.text
        assert "regex" in answer.json()["error"]["param"]
        good(client)


@pytest.mark.parametrize("tools", BAD_TOOLS, ids=range(len(BAD_TOOLS)))
def test_cve_2025_48944_broken_tools_cost_their_own_request(server, tools):
    with server.client() as client:
        for more in ({}, {"tool_choice": "required"}):
            answer = client.post("/v1/chat/completions", json=chat(model="ended", tools=tools, **more))
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"].startswith("tools[0]")
        good(client)


def test_ghsa_mgrm_fgjv_mhv8_what_is_kept_of_schemas_is_bounded(server):
    """And CVE-2025-32381: caches keyed by what users send need a size."""
    grammars = server.worker.llm("ended").grammars
    with server.client() as client:
        for i in range(60):
            body = schema(
                {"type": "object", "properties": {f"p{i}_{j}": {"type": "integer"} for j in range(40)}}, max_tokens=1
            )
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert 0 < grammars.counts().kept_bytes <= LIMITS.grammar_cache_bytes


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_ghsa_mgrm_fgjv_mhv8_ten_thousand_schemas(server):
    llm = server.worker.llm("ended")
    before = 0
    for i in range(10_000):
        llm.compile(
            Grammar.json_schema(
                {"type": "object", "properties": {f"p{i}": {"type": "integer", "minimum": i}}, "required": [f"p{i}"]}
            )
        )
        if i == 2_000:  # by then the cache is full, and what a process needs once it has
            before = resident()
    counts = llm.grammars.counts()
    assert counts.kept_bytes <= LIMITS.grammar_cache_bytes
    assert counts.kept <= 1024
    assert resident() - before < 50_000_000


DEEP_ARRAY: dict = {"type": "integer"}
for _ in range(2 * LIMITS.grammar_depth):
    DEEP_ARRAY = {"type": "array", "items": DEEP_ARRAY}
LARGE = [
    ("cve_2025_57809 nested", schema(DEEP_ARRAY)), ("cve_2025_57809 groups", chat(model="ended", hasten={"regex": "(" * 60_000 + "a" + ")" * 60_000})),
    ("llama.cpp 26600 lark", chat(model="ended", hasten={"lark": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000})),
    ("cve_2025_58446 enum", schema({"enum": list(range(LIMITS.enum_values + 1))})),
    ("cve_2025_58446 choice", chat(model="ended", hasten={"choice": [str(i) for i in range(LIMITS.enum_values + 1)]})),
    ("bytes", schema({"enum": ["x" * LIMITS.grammar_bytes]})), ("repeat", chat(model="ended", hasten={"regex": "((a{1000}){1000}){1000}"})),
    ("rules", chat(model="ended", hasten={"lark": "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(3000)) + '\na3000: "x"'})),
]  # fmt: skip


@pytest.mark.parametrize("body", [body for _, body in LARGE], ids=[name for name, _ in LARGE])
def test_cve_2025_57809_deep_and_large_grammars_are_refused(server, body):
    """And CVE-2025-58446, ggml-org/llama.cpp#26600: recursion on nested groups, huge enums."""
    with server.client() as client:
        start = time.perf_counter()
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400, answer.text
        assert time.perf_counter() - start < 2 * LIMITS.compile_s + 4
        good(client)


@pytest.mark.parametrize("source", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*)*x", "([a-z]+)*1", "(a{0,50}){0,50}b"])
def test_cve_2025_48887_regexes_of_users_take_linear_time(server, source):
    """Masks of a row stay quick whatever the pattern: twice the tokens take about twice the time, never 2**n."""
    grammars = server.worker.llm("ended").grammars
    with server.client() as client:
        for tokens in (8, 40):
            before = grammars.counts()
            answer = client.post(
                "/v1/chat/completions", json=chat(model="ended", max_tokens=tokens, hasten={"regex": source})
            )
            assert answer.status_code in (200, 400), answer.text
            after = grammars.counts()
            masks = after.masks - before.masks
            assert after.mask_s - before.mask_s < 0.05 * max(1, masks)


def test_llama_cpp_19051_no_keyword_is_ignored(server):
    """And ollama/ollama#17929, sgl-project/sglang#37707: fail closed. tests/logits has the table of all keywords."""
    with server.client() as client:
        for keyword, value in (
            ("unevaluatedProperties", False),
            ("dependentRequired", {"a": ["b"]}),
            ("contentEncoding", "base64"),
            ("if", {}),
            ("madeUp", 1),
        ):
            answer = client.post(
                "/v1/chat/completions", json=schema({"type": "object", "properties": {"a": {keyword: value}}})
            )
            if answer.status_code == 400:
                assert f"properties.a.{keyword}" in answer.json()["error"]["message"]
            else:
                assert answer.status_code == 200
                text = answer.json()["choices"][0]
                if text["finish_reason"] == "stop":
                    jsonschema.validate(
                        json.loads(text["message"]["content"]), {"type": "object", "properties": {"a": {keyword: value}}}
                    )
        assert client.post("/v1/chat/completions", json=schema({"madeUp": 1})).status_code == 400


def test_grammars_are_compiled_beside_the_event_loop(server):
    """A slow compilation delays neither other requests nor the health check."""
    slow = schema(
        {"type": "object", "properties": {f"p{i}": {"enum": [f"v{j}" for j in range(40)]} for i in range(150)}},
        max_tokens=1,
    )
    done: list[int] = []

    def ask() -> None:
        with server.client() as client:
            done.append(client.post("/v1/chat/completions", json=slow).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    times = []
    with server.client() as client:
        while thread.is_alive():
            start = time.perf_counter()
            assert client.get("/health").status_code == 200
            times.append(time.perf_counter() - start)
            time.sleep(0.01)
    thread.join()
    assert done[0] in (200, 400)
    assert max(times) < 1
