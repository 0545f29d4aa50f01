"""What /metrics says: the list of names, counts against the answers themselves, one registry per app, little time per pass."""

from __future__ import annotations

import time

import prometheus_client
import pytest
from chat_model import write_model
from live import KEY, chat, serving, until
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

import hasten
from hasten.serve.app import build_app
from hasten.serve.metrics import SPECS, Metrics
from hasten.serve.settings import Settings
from hasten.serve.worker import Worker
from hasten.types import Event, Output, Usage

GOLDEN = """
counter hasten_accepted_tokens_total model
histogram hasten_acceptance_ratio model
histogram hasten_batch_rows model
gauge hasten_cache_budget_bytes model
gauge hasten_cache_used_bytes model
counter hasten_cached_tokens_total model
counter hasten_choices_total model reason
counter hasten_committed_tokens_total model
counter hasten_completion_tokens_total model
counter hasten_drafted_tokens_total model
counter hasten_errors_total code
counter hasten_forwards_total model
gauge hasten_grammar_cache_bytes model
counter hasten_grammar_compile_seconds_total model
counter hasten_grammar_mask_seconds_total model
counter hasten_http_disconnects_total
histogram hasten_http_request_seconds route
gauge hasten_http_requests_in_flight
counter hasten_http_requests_total route status
gauge hasten_model_info model kind family backbone dtype
gauge hasten_prefix_bytes model
counter hasten_prefix_hits_total model
counter hasten_process_cpu_seconds_total
gauge hasten_process_resident_memory_bytes
counter hasten_prompt_tokens_total model
histogram hasten_queue_seconds model
histogram hasten_request_seconds model
gauge hasten_requests_waiting model
gauge hasten_rows_running model
gauge hasten_state state
histogram hasten_step_seconds model
histogram hasten_time_per_output_token_seconds model
histogram hasten_time_to_first_token_seconds model
histogram hasten_tokens_per_forward model
"""
LETTERS = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog while the small model reads"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return hasten.load(str(write_model(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def server(tiny):
    with serving({"tiny": tiny, "mini-dlm": lambda: hasten.load("mini-dlm")}) as served:
        yield served


def read(client) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> label values -> value; what no Prometheus could read fails here."""
    out: dict[str, dict[tuple[str, ...], float]] = {}
    for family in parse(client.get("/metrics").text):
        for sample in family.samples:
            out.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return out


def test_names_kinds_and_labels_are_those_of_the_golden_list():
    listed = {" ".join((spec.kind, spec.name, *spec.labels)) for spec in SPECS}
    assert listed == set(GOLDEN.strip().splitlines()), "a renamed metric breaks dashboards: change it on purpose"
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    for spec in SPECS:
        assert spec.name.startswith("hasten_")
        assert (spec.kind == "counter") == spec.name.endswith("_total")
        assert spec.help[0].isupper() or spec.help[0].isdigit()
        assert spec.help.endswith(".")


def test_what_is_exposed_is_what_is_listed(server):
    with server.client() as client:
        client.post("/v1/chat/completions", json=chat())
        found = {
            family.name + ("_total" if family.type == "counter" else "") for family in parse(client.get("/metrics").text)
        }
        kinds = {family.name: family.type for family in parse(client.get("/metrics").text)}
    created = {name for name in found if name.endswith("_created")}
    assert found - created == {spec.name for spec in SPECS}
    assert {spec.name.removesuffix("_total"): spec.kind for spec in SPECS}.items() <= kinds.items()


def test_both_formats_are_served(server):
    with server.client() as client:
        plain = client.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain")
        opened = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert opened.headers["content-type"].startswith("application/openmetrics-text")
        assert {family.name for family in parse_open(opened.text)} >= {"hasten_step_seconds", "hasten_choices"}


def test_two_servers_in_one_process_count_apart_and_touch_no_global_registry(tiny):
    before = prometheus_client.generate_latest()
    one, two = (Worker({"tiny": tiny}, Settings()) for _ in range(2))
    apps = [build_app(worker, Settings()) for worker in (one, two)]
    stop = Event("stop", 1, time_s=0.5, output=Output("", (1,), "stop", Usage(3, 1, 1), 0))
    one.observe[0]("tiny", 0.1, [stop], 1, 0)
    first, second = (prometheus_client.generate_latest(app.state.metrics.registry).decode() for app in apps)
    assert 'hasten_choices_total{model="tiny",reason="stop"} 1.0' in first
    assert "hasten_choices_total{" not in second
    assert b"hasten_" not in prometheus_client.generate_latest()
    assert len(prometheus_client.generate_latest()) == pytest.approx(len(before), rel=0.2)


@pytest.mark.parametrize("method", ["plain", "prompt-lookup"])
def test_the_counts_are_those_of_the_answers(server, method):
    """Every count of the engine against the usage that the answers themselves carry."""
    usages = []
    with server.client() as client:
        before = read(client)
        for n in (1, 3):
            body = chat(LETTERS, max_tokens=30, n=n, temperature=1.2, seed=3, hasten={"method": method})
            answer = client.post("/v1/chat/completions", json=body).json()
            usages.append((n, answer["usage"], answer["hasten"]["usage"]))
        after = read(client)

    def grown(name: str) -> float:
        return sum(after[name].values()) - sum(before.get(name, {}).values())

    cost = {key: sum(one[key] for _, _, one in usages) for key in ("forwards", "drafted_tokens", "accepted_tokens")}
    tokens = sum(usage["completion_tokens"] for _, usage, _ in usages)
    choices = sum(n for n, _, _ in usages)
    assert tokens == 30 * choices
    assert grown("hasten_committed_tokens_total") == grown("hasten_completion_tokens_total") == tokens
    assert grown("hasten_prompt_tokens_total") == sum(usage["prompt_tokens"] for _, usage, _ in usages)
    assert grown("hasten_forwards_total") == cost["forwards"] + choices  # usage leaves the pass out that read the prompt
    assert grown("hasten_drafted_tokens_total") == cost["drafted_tokens"]
    assert grown("hasten_accepted_tokens_total") == cost["accepted_tokens"]
    assert method != "plain" or cost["drafted_tokens"] == 0  # whether drafts of random text pay is for the clock to say
    assert grown("hasten_choices_total") == choices
    for name in ("request_seconds", "time_to_first_token_seconds", "time_per_output_token_seconds", "queue_seconds"):
        assert grown(f"hasten_{name}_count") == choices, name
    assert grown("hasten_tokens_per_forward_count") == choices
    assert grown("hasten_batch_rows_sum") >= grown("hasten_forwards_total")
    assert 0 < grown("hasten_batch_rows_count") <= grown("hasten_step_seconds_count")
    first, whole = grown("hasten_time_to_first_token_seconds_sum"), grown("hasten_request_seconds_sum")
    later = grown("hasten_time_per_output_token_seconds_sum") * 29
    assert first + later == pytest.approx(whole, rel=1e-3)


def test_a_canvas_is_counted_too(server):
    with server.client() as client:
        before = read(client)
        body = {"model": "mini-dlm", "prompt": "3+4=", "max_tokens": 16, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        after = read(client)
    key = ("mini-dlm",)
    passes = after["hasten_forwards_total"][key] - before.get("hasten_forwards_total", {}).get(key, 0)
    assert passes == answer["hasten"]["usage"]["forwards"] > 0
    tokens = after["hasten_completion_tokens_total"][key] - before.get("hasten_completion_tokens_total", {}).get(key, 0)
    assert tokens == answer["usage"]["completion_tokens"]
    assert {labels for labels in after["hasten_model_info"] if "mini-dlm" in labels and "masked" in labels}
    assert len(after["hasten_model_info"]) == 2
    assert after["hasten_cache_budget_bytes"][key] > 0


def test_requests_are_counted_by_route_and_status_and_never_by_what_callers_invent(server):
    with server.client() as client:
        before = read(client)
        for path in ("/nope", "/v1/models/nope", "/v1/models/tiny", "/v1/chat/completions/../secret", "/%0ax"):
            client.get(path)
        client.post("/v1/chat/completions", json=chat(n=99))
        client.post("/v1/chat/completions", content=b"{")
        client.get("/v1/models", headers={"Host": "evil.example"})
        after = read(client)

    def grown(name: str, *labels: str) -> float:
        return after[name].get(labels, 0.0) - before.get(name, {}).get(labels, 0.0)

    assert grown("hasten_http_requests_total", "/v1/models/{model}", "200") == 1
    assert grown("hasten_http_requests_total", "/v1/models/{model}", "404") == 1
    assert grown("hasten_http_requests_total", "/v1/chat/completions", "400") == 2
    assert grown("hasten_http_requests_total", "other", "404") == 3
    assert grown("hasten_http_requests_total", "other", "403") == 1
    assert grown("hasten_errors_total", "host_not_allowed") == 1
    assert grown("hasten_errors_total", "model_not_found") == 1
    assert grown("hasten_errors_total", "invalid_value") == 2
    assert {route for route, _ in after["hasten_http_requests_total"]} <= {*server.app.openapi()["paths"], "other"}
    assert after["hasten_http_requests_in_flight"][()] == 1  # this one


def test_a_client_that_leaves_is_counted_and_its_request_ends_as_aborted(server):
    with server.client() as client:
        before = read(client)
        body = chat(LETTERS, max_tokens=400, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            next(stream.iter_lines())
        assert until(lambda: not server.worker.busy)
        client.post("/v1/chat/completions", json=chat())  # whose pass brings the end of the aborted one along
        after = read(client)
    aborted = ("tiny", "abort")
    assert after["hasten_choices_total"][aborted] == before["hasten_choices_total"].get(aborted, 0) + 1
    assert after["hasten_http_disconnects_total"][()] == before["hasten_http_disconnects_total"][()] + 1
    assert after["hasten_rows_running"][("tiny",)] == 0


def test_metrics_are_behind_the_key_and_count_who_had_none(tmp_path):
    with (
        serving({"tiny": hasten.load(write_model(tmp_path))}, Settings(keys=(KEY,))) as served,
        served.client() as nobody,
        served.client(KEY) as somebody,
    ):
        assert nobody.get("/metrics").status_code == 401
        assert read(somebody)["hasten_errors_total"][("invalid_api_key",)] == 1
        assert KEY not in somebody.get("/metrics").text


def test_a_server_that_loads_has_metrics_already():
    metrics = Metrics(Worker({}, Settings()))
    text = prometheus_client.generate_latest(metrics.registry).decode()
    assert 'hasten_state{state="loading"} 1.0' in text
    assert 'hasten_state{state="ready"} 0.0' in text


def test_counting_a_pass_takes_microseconds():
    """A pass of a 3 M parameter model takes about a millisecond; counting one of eight rows must not be seen in it."""
    metrics = Metrics(Worker({}, Settings()))
    events = []
    for row in range(8):
        events += [Event("draft", row, tokens=(1, 2, 3)), Event("forward", row, total=4), Event("accept", row, tokens=(1,))]
        events += [Event("commit", row, token=1, text="a"), Event("commit", row, token=2, text="b")]
    times = []
    for _ in range(300):
        started = time.perf_counter()
        metrics.watch("m", 0.001, events, 8, 0)
        times.append(time.perf_counter() - started)
    print(f"{min(times) * 1e6:.1f} us for 8 rows and {len(events)} events")
    assert min(times) < 100e-6
