"""Who gets how much of a step: prompts beside rows that decode, canvases among canvases, small requests and large ones."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
from canvases import Masked, policy
from hypothesis import given
from hypothesis import strategies as st

from hasten.budget import shares
from hasten.engine import canvas as canvas_loop
from hasten.engine.cache import CacheLayout
from hasten.engine.engine import PLAIN, Engine, Parts
from hasten.engine.limits import Limits
from hasten.engine.scheduler import _PASSES
from hasten.pass_cost import ReadingCost
from hasten.types import Event, Request, SamplingParams

MODEL = tiny.model()
MASKED = Masked()
CANVAS = Parts(canvas=policy(MASKED))


def request(prompt: int | tuple[int, ...], tokens: int = 12, **sampling: object) -> Request:
    prompt = tuple(i * 7 % tiny.VOCAB for i in range(prompt)) if isinstance(prompt, int) else prompt
    return Request(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, seed=3, **sampling))  # type: ignore[arg-type]


def alone(one: Request, backbone: object = MODEL, parts: Parts = PLAIN) -> tuple[int, ...]:
    return Engine(backbone, cache_bytes=32_000_000).run([(one, parts)])[0][0].tokens  # type: ignore[arg-type]


# --- prompts ---


@given(st.lists(st.integers(2, 600), max_size=8), st.integers(0, 700), st.integers(1, 300))
def test_shares_fill_the_room_and_the_first_has_half_of_it(pending, room, most):
    given_ = shares(pending, room, most)
    assert all(0 <= got <= min(want, most) for got, want in zip(given_, pending, strict=True))
    assert sum(given_) == min(room, sum(min(want, most) for want in pending))
    if pending:
        assert given_[0] >= min(pending[0], most, room / 2)
    for i, one in enumerate(pending[1:], 1):  # who is shorter than another gets no less of what it wants
        for j, other in enumerate(pending[1:], 1):
            if one < other and given_[j]:
                assert given_[i] == min(one, most)


@given(st.lists(st.integers(2, 300), min_size=1, max_size=6), st.integers(1, 64))
def test_no_prompt_starves_while_short_ones_keep_coming(pending, room):
    """The first is read after at most twice as many steps as it takes alone, whatever comes after it."""
    first, steps = pending[0], 0
    while first > 0:
        first -= shares([first, *pending[1:], 2, 2, 2], room, 512)[0]
        steps += 1
    assert steps <= 2 * -(-pending[0] // room) + 10


def test_reading_is_bounded_by_what_it_costs():
    cost = ReadingCost()
    assert cost.room(0.01) == cost.room(0.0) == 64  # nothing is known yet
    cost.record(8, 1.0)  # too few to tell
    assert cost.room(0.01) == 64
    cost.record(100, 0.1)
    assert cost.room(0.1) == 300
    assert cost.room(1e-9) == 32
    for _ in range(30):
        cost.record(100, 0.2)
    assert cost.room(0.1) == pytest.approx(150, abs=3)


def test_rows_that_decode_keep_moving_while_a_long_prompt_is_read(monkeypatch):
    """On a machine with a written-out cost no pass takes longer than four plain ones once reading was measured."""
    engine = Engine(MODEL, cache_bytes=32_000_000)
    clock, passes = [0.0], []

    def timed(rows, needs, run=engine.backbone.run):
        seconds = 0.010 + 0.001 * sum(row.queries for row in rows)
        passes.append((sum(row.queries == 1 for row in rows), seconds))
        clock[0] += seconds
        return run(rows, needs)

    monkeypatch.setattr(engine.backbone, "run", timed, raising=False)
    monkeypatch.setattr(engine.trace, "now", lambda: clock[0], raising=False)
    first = engine.add(request((4, 5, 6), 60))
    for _ in range(10):
        engine.step()
    long, short = engine.add(request(240)), engine.add(request(9))
    events: list[Event] = []
    mark = len(passes)
    while not engine.idle:
        events += engine.step()
    beside = [seconds for rows, seconds in passes[mark + 1 :] if rows]
    assert max(beside[1:]) <= 4.1 * 0.013
    ends = {event.request: event for event in events if event.kind == "stop"}
    assert ends[first].output.tokens == alone(request((4, 5, 6), 60))
    assert ends[long].output.tokens == alone(request(240))
    assert ends[short].output.tokens == alone(request(9))
    started = [event.request for event in events if event.kind == "prefill" and event.position == event.total]
    assert started == [short, long]  # in the room that is left the short one comes first
    steps = [event.step for event in events if event.kind == "commit" and event.request == first]
    assert steps == list(range(steps[0], steps[0] + len(steps)))  # the first row commits in every step
    read = [event.step for event in events if event.kind == "prefill" and event.request == long]
    assert read == list(range(read[0], read[0] + len(read)))  # and so does the long prompt go on in every step
    assert len(read) >= 5


def test_without_rows_that_decode_a_prompt_takes_whole_chunks(monkeypatch):
    from hasten.engine import ar

    monkeypatch.setattr(ar, "LIMITS", Limits(prefill_chunk=100))
    events: list[Event] = []
    Engine(MODEL, cache_bytes=32_000_000).run([(request(240), PLAIN)], events.append)
    assert [event.position for event in events if event.kind == "prefill"] == [100, 200, 240]


# --- canvases ---


def drive(engine: Engine) -> tuple[list[list[int]], dict[int, tuple[int, ...]]]:
    """(requests that had a forward, by step; tokens by request)."""
    forwards, done = [], {}
    for _ in range(3000):
        events = engine.step()
        forwards.append([event.request for event in events if event.kind == "forward"])
        done |= {event.request: event.output.tokens for event in events if event.kind == "stop"}
        if engine.idle:
            return forwards, done
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize(
    "names", [("reference",), ("threshold:tau=0.2",), ("reference:block=8", "canvas-cache"), ("freedave",)]
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_canvas_in_subset_passes_is_the_canvas_alone(monkeypatch, names, temperature):
    parts = Parts(canvas=policy(MASKED, *names))
    many = [request((first, 6), tokens, temperature=temperature) for first, tokens in ((5, 40), (7, 8), (8, 17), (9, 24))]
    expected = [alone(one, MASKED, parts) for one in many]
    monkeypatch.setattr(canvas_loop, "LIMITS", Limits(step_tokens=60))
    monkeypatch.setattr(canvas_loop, "_AHEAD", 30)
    engine = Engine(MASKED, cache_bytes=32_000_000)
    ids = [engine.add(one, parts) for one in many]
    forwards, done = drive(engine)
    assert [done[number] for number in ids] == expected
    assert any(0 < len(one) < len(many) for one in forwards[:5])


def test_a_pass_holds_what_the_limit_says_and_at_least_one(monkeypatch):
    monkeypatch.setattr(canvas_loop, "LIMITS", Limits(step_tokens=60))
    engine = Engine(MASKED, cache_bytes=32_000_000)
    sizes = {engine.add(request((5, 6), tokens), CANVAS): tokens + 2 for tokens in (100, 28, 20, 30, 18)}
    forwards, _ = drive(engine)
    for together in forwards:
        assert len(together) <= 1 or sum(sizes[number] for number in together) <= 60
    assert all(forwards[:-1])  # in the last step one finds that nothing is left


def test_a_long_canvas_holds_no_short_one_back():
    """Both get as many query tokens while both run: the short one has ten forwards to one of the long one."""
    engine = Engine(MASKED, cache_bytes=32_000_000)
    long = engine.add(request((5, 6), 238), CANVAS)
    for _ in range(4):
        engine.step()
    short = engine.add(request((7, 8), 22), CANVAS)
    steps: Counter[int] = Counter()
    while short in engine._open:
        events = engine.step()
        steps["all"] += 1
        steps.update(event.request for event in events if event.kind == "forward")
    assert steps[short] == 22
    assert steps["all"] <= 23  # it ran in every step
    assert 1 <= steps[long] <= 6  # 22 x 24 query tokens in passes of 240, and 512 ahead
    forwards, done = drive(engine)
    assert done[long] == alone(request((5, 6), 238), MASKED, CANVAS)
    assert all(forwards[:-1])


def test_a_canvas_that_joins_late_owes_nothing_and_is_owed_nothing():
    engine = Engine(MASKED, cache_bytes=32_000_000)
    old = engine.add(request((5, 6), 60), CANVAS)
    for _ in range(20):
        engine.step()
    young = engine.add(request((7, 8), 60), CANVAS)
    for _ in range(20):
        assert {event.request for event in engine.step() if event.kind == "forward"} == {old, young}


# --- admission ---


def test_small_requests_pass_a_large_one_a_bounded_number_of_times():
    layout: CacheLayout = MODEL.pool(10**8).layout
    engine = Engine(MODEL, cache_bytes=layout.nbytes(320), rows=8)
    first = engine.add(request((4, 5), 70))
    engine.step()
    large = engine.add(request((4, 6), 250))  # 256 of 320 slots, and 128 are taken
    small = [engine.add(request((4, 7 + i), 20 + i)) for i in range(3 * _PASSES)]
    order: list[int] = []
    done = {}
    for _ in range(3000):
        events = engine.step()
        order += [event.request for event in events if event.kind == "prefill"]
        done |= {event.request: event.output.tokens for event in events if event.kind == "stop"}
        if engine.idle:
            break
    assert order.index(large) == _PASSES
    assert [number for number in order if number != large] == small  # in order among themselves
    assert done[large] == alone(request((4, 6), 250))
    assert done[first] == alone(request((4, 5), 70))


def test_a_large_request_is_not_passed_for_rows_either():
    engine = Engine(MODEL, cache_bytes=32_000_000, rows=4)
    engine.add(request((4, 5), 30))
    engine.step()
    large = engine.add(request((4, 6), 10, n=4))
    small = [engine.add(request((4, 7 + i), 10)) for i in range(30)]
    started: list[int] = []
    for _ in range(3000):
        started += [event.request for event in engine.step() if event.kind == "prefill" and event.choice == 0]
        if engine.idle:
            break
    assert started.index(large) == _PASSES
    assert len(started) == 1 + len(small)


def test_choices_that_fit_only_in_slabs_of_their_own_size_are_not_waited_for_in_vain():
    """A freed slab twice as large as needed must not take the place of the choices that follow."""
    layout: CacheLayout = MODEL.pool(10**8).layout
    engine = Engine(MODEL, cache_bytes=layout.nbytes(256))
    engine.run([(request((4, 5), 120), PLAIN)])  # leaves a slab of 128
    outs = engine.run([(request((4, 5), 30, n=4, temperature=1.0), PLAIN)])[0]
    assert len({out.tokens for out in outs}) == 4


def test_what_rounding_makes_too_large_is_refused_instead_of_waiting_for_ever():
    from hasten.errors import MemoryFitError

    layout: CacheLayout = MODEL.pool(10**8).layout
    engine = Engine(MODEL, cache_bytes=layout.nbytes(576))
    with pytest.raises(MemoryFitError):
        engine.add(request((4, 5), 63, n=8))  # 8 x 65 tokens would fit as one row, not as eight of 128 slots
