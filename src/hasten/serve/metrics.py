"""GET /metrics: what the server and its engines do, for Prometheus; every app has a registry of its own.

`SPECS` is the whole list; docs/metrics.md is made from it. What a pass does is counted in the engine's thread at once, with
the series of a model looked up before; gauges are read from the worker when somebody asks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from hasten.errors import IncompatibleError

if TYPE_CHECKING:
    from hasten.llm import LLM
    from hasten.serve.worker import Worker
    from hasten.types import Event, Output

router = APIRouter()
Kind = Literal["counter", "gauge", "histogram"]
_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SLOW = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
_ROWS = (1, 2, 4, 8, 16, 32)
_RATIO = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_SHARE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: its whole name, kind, meaning, labels, and the bounds of a histogram's buckets.

    `live`: counted as it happens; else read from the worker when /metrics is asked for.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    live: bool = True


_M = ("model",)
_ABOUT = ("model", "kind", "family", "backbone", "dtype")
SPECS = (
    Spec("hasten_step_seconds", "histogram", "Time of one turn of an engine: one pass over its rows.", _M, _FAST),
    Spec("hasten_batch_rows", "histogram", "Rows that one pass advanced together.", _M, _ROWS),
    Spec("hasten_forwards_total", "counter", "Passes of the target, counted once for every row in them.", _M),
    Spec("hasten_committed_tokens_total", "counter", "Tokens committed, at once; of a canvas its unused end too.", _M),
    Spec("hasten_drafted_tokens_total", "counter", "Drafted tokens that the target was asked to verify.", _M),
    Spec("hasten_accepted_tokens_total", "counter", "Drafted tokens that the target accepted.", _M),
    Spec("hasten_completion_tokens_total", "counter", "Tokens of the answers that ended.", _M),
    Spec("hasten_prompt_tokens_total", "counter", "Prompt tokens of requests that ended.", _M),
    Spec("hasten_cached_tokens_total", "counter", "Prompt tokens of requests that ended, taken from the prefix cache.", _M),
    Spec("hasten_prefix_hits_total", "counter", "Requests that ended and found the beginning of their prompt kept.", _M),
    Spec("hasten_choices_total", "counter", "Choices that ended, by the reason of their end.", ("model", "reason")),
    Spec("hasten_queue_seconds", "histogram", "Time from adding a request to its first pass.", _M, _SLOW),
    Spec("hasten_time_to_first_token_seconds", "histogram", "Time from adding a request to its first text.", _M, _SLOW),
    Spec("hasten_time_per_output_token_seconds", "histogram", "Time per token of a choice after its first.", _M, _FAST),
    Spec("hasten_request_seconds", "histogram", "Time from adding a request to the end of a choice.", _M, _SLOW),
    Spec("hasten_tokens_per_forward", "histogram", "Tokens per pass of a finished choice.", _M, _RATIO),
    Spec("hasten_acceptance_ratio", "histogram", "Accepted share of the drafted tokens of a finished choice.", _M, _SHARE),
    Spec("hasten_http_requests_total", "counter", "HTTP requests that ended, by route and status.", ("route", "status")),
    Spec("hasten_http_request_seconds", "histogram", "Time from the request's headers to its end.", ("route",), _SLOW),
    Spec("hasten_http_requests_in_flight", "gauge", "HTTP requests that have begun and not ended."),
    Spec("hasten_http_disconnects_total", "counter", "HTTP requests whose client left before the end."),
    Spec("hasten_errors_total", "counter", "Error answers, by their code.", ("code",)),
    Spec("hasten_state", "gauge", "1 for the state that the server is in.", ("state",), live=False),
    Spec("hasten_model_info", "gauge", "1 for every loaded model.", _ABOUT, live=False),
    Spec("hasten_rows_running", "gauge", "Rows that run now.", _M, live=False),
    Spec("hasten_requests_waiting", "gauge", "Requests that wait for rows or memory now.", _M, live=False),
    Spec("hasten_cache_used_bytes", "gauge", "Memory of the keys of rows, and of kept prefixes.", _M, live=False),
    Spec("hasten_cache_budget_bytes", "gauge", "Memory that keys may take.", _M, live=False),
    Spec("hasten_prefix_bytes", "gauge", "Memory of kept prefixes.", _M, live=False),
    Spec("hasten_grammar_compile_seconds_total", "counter", "Time spent on compiling grammars.", _M, live=False),
    Spec("hasten_grammar_mask_seconds_total", "counter", "Time spent on masks of grammars.", _M, live=False),
    Spec("hasten_grammar_cache_bytes", "gauge", "Memory of compiled grammars kept.", _M, live=False),
    Spec("hasten_process_resident_memory_bytes", "gauge", "Memory of the process.", live=False),
    Spec("hasten_process_cpu_seconds_total", "counter", "Processor time of the process.", live=False),
)  # fmt: skip
_CLASSES: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
STATES = ("loading", "ready", "draining", "stopped")


class Metrics:
    """The metrics of one server. `watch` is for `worker.observe`; the rest is for the event loop."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self._worker = worker
        self._live = {spec.name: self._make(spec) for spec in SPECS if spec.live}
        self._series: dict[str, _Series] = {}
        self.registry.register(self)

    def _make(self, spec: Spec) -> Any:
        more = {"buckets": spec.buckets} if spec.buckets else {}
        return _CLASSES[spec.kind](spec.name, spec.help, spec.labels, registry=self.registry, **more)

    def watch(self, model: str, seconds: float, events: Sequence[Event], rows: int, waiting: int) -> None:
        """Count a pass; in the engine's thread."""
        series = self._series.get(model)
        if series is None:
            series = self._series[model] = _Series(model, self._live)
        series.count(seconds, events)

    def opened(self) -> None:
        """An HTTP request has begun."""
        self._live["hasten_http_requests_in_flight"].inc()

    def closed(self, route: str, status: int, seconds: float, code: str, gone: bool) -> None:
        """An HTTP request has ended: with an error `code` ("" for none), or because its client has `gone`."""
        self._live["hasten_http_requests_in_flight"].dec()
        self._live["hasten_http_requests_total"].labels(route, str(status)).inc()
        self._live["hasten_http_request_seconds"].labels(route).observe(seconds)
        if code:
            self._live["hasten_errors_total"].labels(code).inc()
        if gone:
            self._live["hasten_http_disconnects_total"].inc()

    def collect(self) -> Iterator[Any]:
        """What is read now; the registry calls this."""
        values: dict[str, list[tuple[tuple[str, ...], float]]] = {spec.name: [] for spec in SPECS if not spec.live}
        for state in STATES:
            values["hasten_state"].append(((state,), float(state == self._worker.state)))
        for model, llm in self._worker.loaded():
            for name, value in _now(llm).items():
                values[name].append(((model,), value))
            facts = llm.info()
            about = (llm.model.capabilities.kind, *(str(facts[key]) for key in ("family", "backbone", "dtype")))
            values["hasten_model_info"].append(((model, *about), 1.0))
        for name, value in _process().items():
            values[name].append(((), value))
        for spec in SPECS:
            if not spec.live:
                family = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
                made = family(spec.name, spec.help, labels=spec.labels)
                for labels, value in values[spec.name]:
                    made.add_metric(labels, value)
                yield made

    def describe(self) -> Iterator[Any]:
        """What `collect` gives, without asking the worker: the registry wants the names first."""
        return iter(())


class _Series:
    """The series of one model, looked up once."""

    def __init__(self, model: str, live: dict[str, Any]) -> None:
        named = [spec.name for spec in SPECS if spec.live and spec.labels == _M]
        own = {name.removeprefix("hasten_"): live[name].labels(model) for name in named}
        self._step, self._batch = own["step_seconds"].observe, own["batch_rows"].observe
        self._forwards, self._tokens = own["forwards_total"].inc, own["committed_tokens_total"].inc
        self._drafted, self._accepted = own["drafted_tokens_total"].inc, own["accepted_tokens_total"].inc
        self._own, self._model, self._choices = own, model, live["hasten_choices_total"]
        self._first: dict[tuple[int, int], float] = {}  # (request, choice) -> time of its first text

    def count(self, seconds: float, events: Sequence[Event]) -> None:
        """One pass and its events."""
        forwards = chunks = tokens = drafted = accepted = 0
        for event in events:
            kind = event.kind
            if kind == "commit":
                tokens += 1
                if event.text:
                    self._first.setdefault((event.request, event.choice), event.time_s)
            elif kind == "forward":
                forwards += 1
            elif kind == "draft":
                drafted += len(event.tokens)
            elif kind == "accept":
                accepted += len(event.tokens)
            elif kind == "prefill":
                chunks += event.position < event.total  # the last chunk of a prompt is part of a forward
            elif event.output is not None:
                self._ended(event, event.output)
        self._step(seconds)
        if forwards or chunks:
            self._batch(forwards + chunks)
            self._forwards(forwards)
        if tokens:
            self._tokens(tokens)
        if drafted:
            self._drafted(drafted)
            self._accepted(accepted)

    def _ended(self, event: Event, output: Output) -> None:
        own, usage = self._own, output.usage
        text = self._first.pop((event.request, event.choice), None)
        self._choices.labels(self._model, output.finish_reason).inc()
        own["completion_tokens_total"].inc(usage.completion_tokens)
        if event.choice == 0:
            own["prompt_tokens_total"].inc(usage.prompt_tokens)
            own["cached_tokens_total"].inc(usage.cached_tokens)
            own["prefix_hits_total"].inc(usage.cached_tokens > 0)
        own["request_seconds"].observe(event.time_s)
        own["queue_seconds"].observe(max(0.0, event.time_s - usage.prefill_s - usage.decode_s))
        if text is not None:
            own["time_to_first_token_seconds"].observe(text)
            if usage.completion_tokens > 1:
                own["time_per_output_token_seconds"].observe((event.time_s - text) / (usage.completion_tokens - 1))
        if usage.forwards:
            own["tokens_per_forward"].observe(usage.tokens_per_forward)
        if usage.drafted_tokens:
            own["acceptance_ratio"].observe(usage.accepted_tokens / usage.drafted_tokens)


def _now(llm: LLM) -> dict[str, float]:
    """Gauges of one model."""
    scheduler, pool = llm.engine.scheduler, llm.engine.scheduler.pool
    prefix = llm.engine.prefix
    compile_s = mask_s = kept_bytes = 0.0
    with contextlib.suppress(IncompatibleError):  # masked models, and models without an end token
        spent = llm.grammars.counts()
        compile_s, mask_s, kept_bytes = spent.compile_s, spent.mask_s, spent.kept_bytes
    return {
        "hasten_rows_running": len(scheduler.running),
        "hasten_requests_waiting": len(scheduler.waiting),
        "hasten_cache_used_bytes": pool.used_bytes,
        "hasten_cache_budget_bytes": pool.budget_bytes,
        "hasten_prefix_bytes": prefix.nbytes if prefix is not None else 0,
        "hasten_grammar_compile_seconds_total": compile_s,
        "hasten_grammar_mask_seconds_total": mask_s,
        "hasten_grammar_cache_bytes": kept_bytes,
    }


def _process() -> dict[str, float]:
    """Memory and time of this process; no memory where the system does not say."""
    spent = os.times()
    out = {"hasten_process_cpu_seconds_total": spent.user + spent.system}
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            out["hasten_process_resident_memory_bytes"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    return out


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """The metrics, in the format that the asker reads; in a thread of its own, as this takes milliseconds."""
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.metrics.registry), media_type=kind)
