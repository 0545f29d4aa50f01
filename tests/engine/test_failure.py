"""What goes wrong with one request ends that request: its memory is free, the others' tokens are what they are alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from canvases import Masked, policy
from drafters import Stub

from hasten.engine.contracts import Draft, RowInput
from hasten.engine.engine import PLAIN, Engine, Parts
from hasten.errors import BusyError, ConfigError, HastenError, MemoryFitError
from hasten.failure import out_of_memory
from hasten.types import Event, Request, SamplingParams

MODEL = tiny.model()
MASKED = Masked()
CANVAS = Parts(canvas=policy(MASKED))


def request(first: int, tokens: int = 12, **sampling: object) -> Request:
    return Request((first, 5, 6), SamplingParams(max_tokens=tokens, ignore_eos=True, seed=3, **sampling))  # type: ignore[arg-type]


def engine_of(kind: str, **options: object) -> tuple[Engine, Parts]:
    if kind == "masked":
        return Engine(MASKED, cache_bytes=8_000_000, **options), CANVAS  # type: ignore[arg-type]
    return Engine(MODEL, cache_bytes=8_000_000, **options), PLAIN  # type: ignore[arg-type]


def alone(kind: str, one: Request) -> list[tuple[int, ...]]:
    engine, parts = engine_of(kind)
    return [out.tokens for out in engine.run([(one, parts)])[0]]


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    for _ in range(2000):
        events += engine.step()
        if engine.idle:
            return events + engine.step()
    raise AssertionError("the engine does not come to an end")


def outputs(events: Sequence[Event]) -> dict[int, object]:
    stopped = [event for event in events if event.kind == "stop"]
    assert len({(event.request, event.choice) for event in stopped}) == len(stopped)
    return {event.request: event.output for event in stopped}


class Breaks:
    """Stands before a backbone's `run`: raises what `when` gives for the rows of a pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, when) -> None:
        run = engine.backbone.run

        def broken(rows: Sequence[RowInput], *needs: object):
            error = when(rows)
            if error is not None:
                raise error
            return run(rows, *needs)

        monkeypatch.setattr(engine.backbone, "run", broken, raising=False)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_row_that_breaks_every_pass_it_is_in_ends_alone(kind, monkeypatch, caplog):
    engine, parts = engine_of(kind)
    good = [request(first) for first in (7, 8, 11)]
    expected = [alone(kind, one)[0] for one in good]
    ids = [engine.add(one, parts) for one in (good[0], request(9), *good[1:])]
    odd = ZeroDivisionError("odd")
    Breaks(
        monkeypatch, engine, lambda rows: odd if any(row.positions[0] == 0 and row.tokens[0] == 9 for row in rows) else None
    )
    events = drain(engine)
    done = outputs(events)
    assert done[ids[1]].finish_reason == "error"
    assert [event.text for event in events if event.kind == "error"] == ["the pass failed (ZeroDivisionError: odd)"]
    assert "ZeroDivisionError" in caplog.text  # and its trace is in the log
    assert [done[ids[i]].tokens for i in (0, 2, 3)] == expected
    assert engine.scheduler.pool.used_bytes == 0


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_pass_that_raises_once_changes_no_row(kind, monkeypatch):
    engine, parts = engine_of(kind)
    both = [request(7), request(8)]
    expected = [alone(kind, one)[0] for one in both]
    seen: list[int] = []

    def fourth(rows: Sequence[RowInput]) -> Exception | None:
        seen.append(len(rows))
        return HastenError("once") if len(seen) == 4 else None

    Breaks(monkeypatch, engine, fourth)
    outs = engine.run([(one, parts) for one in both])
    assert [out[0].tokens for out in outs] == expected
    assert seen[3:6] == [2, 1, 1]  # each has its pass alone, then both go on together
    assert 2 in seen[6:]


def test_a_backbone_that_always_raises_loses_no_row_and_the_engine_stays_usable(monkeypatch):
    engine, _ = engine_of("causal")
    expected = alone("causal", request(7))[0]
    ids = [engine.add(request(first)) for first in (7, 8)]
    engine.step()
    with monkeypatch.context() as patch:
        Breaks(patch, engine, lambda rows: HastenError("no"))
        events = engine.step()
        assert {event.request: event.output.finish_reason for event in events if event.output} == dict.fromkeys(
            ids, "error"
        )
        assert engine.idle
        assert engine.scheduler.pool.used_bytes == 0
        with pytest.raises(HastenError, match="no"):  # in a library call it is what it is
            engine.run([(request(7), PLAIN), (request(8), PLAIN)])
    assert engine.idle
    assert not any(engine.abort(number) for number in ids)
    assert engine.run([(request(7), PLAIN)])[0][0].tokens == expected


class Fails(Stub):
    """A drafter that raises in one of its calls for one prompt."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def draft(self, row, budget: int) -> Draft:
        if self.where == "propose" and row.tokens[0] == 9:
            raise KeyError("lost")
        return Draft((4,), (-1,))

    def observe(self, feedback) -> None:
        if self.where == "observe" and len(self.heard) > 3:
            raise KeyError("lost")
        super().observe(feedback)

    def close(self, row: int) -> None:
        super().close(row)
        if self.where == "close":
            raise KeyError("lost")


@pytest.mark.parametrize(("where", "wrong"), [("propose", "error"), ("observe", "error"), ("close", "length")])
def test_a_drafter_that_raises_costs_its_own_rows_at_most(where, wrong):
    engine, _ = engine_of("causal")
    expected = alone("causal", request(7))[0]
    ids = [engine.add(request(7)), engine.add(request(9), Parts(Fails(where), budget=2))]
    done = outputs(drain(engine))
    assert done[ids[0]].tokens == expected
    assert done[ids[1]].finish_reason == wrong
    assert engine.scheduler.pool.used_bytes == 0


class Spoilt:
    """A decoder that cannot spell one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def push(self, token: int) -> str:
        if token == self.token:
            raise UnicodeError("half a character")
        return "x"

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_what_fails_after_a_pass_fails_one_row(kind):
    first, second = (alone(kind, request(number))[0] for number in (7, 8))
    token = next(token for token in first if token not in second)
    engine, parts = engine_of(kind, decoder=lambda: Spoilt(token))
    ids = [engine.add(request(number), parts) for number in (7, 8)]
    done = outputs(drain(engine))
    assert done[ids[0]].finish_reason == "error"
    assert done[ids[1]].tokens == second


# --- memory ---


ERRORS = [
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    RuntimeError("not enough memory: you tried to allocate 140737488355328 bytes."),
    HastenError("native stack: no memory for a workspace of 99 bytes"),
]


def test_what_an_allocation_that_fails_looks_like():
    assert all(map(out_of_memory, ERRORS))
    assert not out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**55)
    assert out_of_memory(caught.value)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_out_of_memory_ends_the_largest_row_and_no_other(kind, error, monkeypatch):
    engine, parts = engine_of(kind)
    small = [request(7), request(8)]
    expected = [alone(kind, one)[0] for one in small]
    large = Request(tuple(range(1, 90)), SamplingParams(max_tokens=40, ignore_eos=True, seed=3))
    ids = [engine.add(one, parts) for one in (small[0], large, small[1])]
    Breaks(monkeypatch, engine, lambda rows: error if sum(row.queries for row in rows) > 60 else None)
    events = drain(engine)
    done = outputs(events)
    assert done[ids[1]].finish_reason == "error"
    assert "memory" in next(event.text for event in events if event.kind == "error")
    assert [done[ids[0]].tokens, done[ids[2]].tokens] == expected
    assert engine.scheduler.pool.used_bytes == 0


def test_of_rows_alike_the_newest_ends(monkeypatch):
    engine, _ = engine_of("causal")
    ids = [engine.add(request(first)) for first in (7, 8, 9)]
    Breaks(monkeypatch, engine, lambda rows: MemoryError() if len(rows) > 2 else None)
    done = outputs(drain(engine))
    assert [done[number].finish_reason for number in ids] == ["length", "length", "error"]


def test_what_is_merely_kept_goes_before_any_row(monkeypatch):
    engine = Engine(MODEL, cache_bytes=8_000_000, prefix_bytes=2_000_000)
    long = Request(tuple(range(1, 81)), SamplingParams(max_tokens=8, ignore_eos=True))
    expected = engine.run([(long, PLAIN)])[0][0].tokens
    assert engine.prefix.nbytes > 0
    errors = [MemoryError()]
    Breaks(monkeypatch, engine, lambda rows: errors.pop() if errors else None)
    out = engine.run([(long, PLAIN)])[0][0]
    assert (out.tokens, out.finish_reason) == (expected, "length")


def test_memory_that_is_not_there_for_the_cache_lets_a_request_wait(monkeypatch):
    engine, _ = engine_of("causal")
    first, second = engine.add(request(7)), engine.add(request(8))
    zeros, opened = torch.zeros, []

    def scarce(*args, **kwargs):
        if kwargs.get("dtype") is not None and len(args[0]) == 5:
            opened.append(args[0])
            if len(opened) == 2:
                raise MemoryError
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", scarce)
    assert [event.kind for event in engine.step() if event.kind == "error"] == []
    assert len(engine.scheduler.waiting) == 1
    done = outputs(drain(engine))
    assert {done[first].finish_reason, done[second].finish_reason} == {"length"}


def test_the_estimate_counts_what_a_request_allocates():
    engine, _ = engine_of("causal")
    pool = engine.scheduler.pool
    one = engine.need(request(7))
    engine.add(request(7))
    engine.step()
    assert pool.used_bytes < one < 4 * pool.used_bytes
    assert 2 * one < engine.need(request(7, n=3)) < 3 * one  # the prompt is read once
    assert engine.need(request(7, tokens=200)) > one + pool.layout.nbytes(128)
    masked, parts = engine_of("masked")
    assert masked.need(request(7, tokens=200), parts) > 200 * tiny.VOCAB * 4


def test_a_request_that_does_not_fit_now_is_told_when_to_come_back():
    free = 10_000_000
    engine = Engine(MODEL, cache_bytes=8_000_000, available=lambda: free)
    need = engine.need(request(7))
    engine.add(request(7))
    free = need - 1
    with pytest.raises(BusyError, match=str(free)) as caught:
        engine.add(request(8))
    assert caught.value.retry_after_s >= 1
    assert not isinstance(caught.value, ValueError)  # nothing is wrong with the request
    with pytest.raises(MemoryFitError):  # what never fits is told so
        Engine(MODEL, cache_bytes=100_000, available=lambda: 0).add(request(7, tokens=250))
    drain(engine)
    engine.add(request(8))  # the slab of the first is there to be used again
    assert len(outputs(drain(engine))) == 1


# --- deadlines and places in the queue ---


def test_a_deadline_ends_rows_and_waiting_requests_at_the_next_step(monkeypatch):
    clock = 100.0
    engine = Engine(MODEL, cache_bytes=8_000_000, rows=2)
    monkeypatch.setattr(engine.trace, "now", lambda: clock, raising=False)
    expected = alone("causal", request(8))[0]
    late, fine, waiting, last = (
        engine.add(request(first, n=n), deadline_s=seconds)
        for first, n, seconds in ((7, 1, 5), (8, 1, 50), (9, 2, 5), (11, 1, None))
    )
    for _ in range(4):
        engine.step()
    clock = 105.0
    events = engine.step()
    ended = [event for event in events if event.kind == "stop"]
    assert [(event.request, event.choice) for event in ended] == [(late, 0), (waiting, 0), (waiting, 1)]
    assert {event.output.finish_reason for event in ended} == {"abort"}
    assert all("deadline of 5 seconds" in event.text for event in events if event.kind == "error")
    assert sum(event.kind == "error" for event in events) == 3
    assert 3 <= len(ended[0].output.tokens) <= 4
    assert (ended[1].output.tokens, ended[1].output.usage.prompt_tokens) == ((), 3)
    done = outputs(drain(engine))
    assert done[fine].tokens == expected
    assert done[last].finish_reason == "length"
    assert engine.scheduler.pool.used_bytes == 0


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_deadline_lies_ahead(seconds):
    with pytest.raises(ConfigError, match="deadline_s"):
        engine_of("causal")[0].add(request(7), deadline_s=seconds)


def test_a_request_is_told_its_place_and_a_waiting_one_stops_like_any_other():
    engine = Engine(MODEL, cache_bytes=8_000_000, rows=1)
    ids = [engine.add(request(first)) for first in (7, 8)]
    events = engine.step()
    ids.append(engine.add(request(9, n=1)))
    assert engine.abort(ids[2])
    assert not engine.abort(ids[2])
    events += drain(engine)
    places = {event.request: (event.position, event.total) for event in events if event.kind == "queue"}
    assert places == {ids[0]: (0, 0), ids[1]: (1, 0), ids[2]: (1, 1)}
    done = outputs(events)
    assert [done[number].finish_reason for number in ids] == ["length", "length", "abort"]


# --- the cost of a canvas ---


def test_a_canvas_may_cost_so_much_and_no_more(monkeypatch):
    from hasten.engine import engine as module
    from hasten.engine.limits import Limits

    engine, parts = engine_of("masked")
    monkeypatch.setattr(module, "LIMITS", Limits(canvas_steps=40 * 40))
    engine.add(request(7, tokens=40), parts)
    with pytest.raises(ConfigError, match="canvas_steps allows 1600") as caught:
        engine.add(request(7, tokens=41), parts)
    assert caught.value.field == "max_tokens"
    with pytest.raises(ConfigError, match="2 times"):
        engine.add(request(7, tokens=40, n=2), parts)
    quick = Parts(canvas=policy(MASKED, "reference:steps=8,block=8"))
    engine.add(request(7, tokens=64), quick)  # eight steps of 64 tokens
    many = Parts(canvas=policy(MASKED, "reference:steps=4000"))
    engine.add(request(7, tokens=40), many)  # no canvas takes more steps than it has tokens
    drain(engine)


def test_the_limit_admits_the_largest_default_canvas():
    from hasten.engine.limits import LIMITS

    assert LIMITS.canvas_steps == 512 * 512


def test_choices_do_not_take_over_what_a_failed_first_one_read(monkeypatch):
    import dataclasses

    engine, _ = engine_of("causal")
    one = request(7, temperature=0.9, n=3)
    expected = alone("causal", one)
    run, passes = engine.backbone.run, []

    def spoilt(rows, needs):
        done = run(rows, needs)
        passes.append(rows)
        if len(passes) == 1:
            done = dataclasses.replace(done, logits=torch.full_like(done.logits, torch.nan))
        return done

    monkeypatch.setattr(engine.backbone, "run", spoilt, raising=False)
    outs = engine.run([(one, PLAIN)])[0]
    assert outs[0].finish_reason == "error"
    assert [out.tokens for out in outs[1:]] == expected[1:]
