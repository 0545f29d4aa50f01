"""The engine as a state machine: requests come, are aborted, run out of time and share prefixes, in pools that are too small.

After every step all memory is accounted for; in the end each choice has stopped exactly once, and what it wrote is what the
same request writes alone.
"""

from __future__ import annotations

from collections import Counter

import tiny
from canvases import Masked, policy
from drafters import RandomTree
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hasten.engine.engine import PLAIN, Engine, Parts
from hasten.engine.scheduler import QueueFullError
from hasten.errors import MemoryFitError
from hasten.types import Output, Request, SamplingParams

CAUSAL, MASKED = tiny.model(), Masked()
TEXT = tuple(i * 37 % 90 + 1 for i in range(120))  # prompts are cut from one text, so that many begin alike
PARTS = {
    "causal": (PLAIN, Parts(RandomTree(tiny.VOCAB, 1), budget=4)),
    "masked": tuple(
        Parts(canvas=policy(MASKED, *names))
        for names in (("threshold:tau=0.1",), ("reference:block=8,steps=8", "canvas-cache"))
    ),
}
ALONE: dict[tuple[str, int, str], list[Output]] = {}


def alone(kind: str, which: int, request: Request) -> list[Output]:
    """What a request writes with the engine to itself; known ones are not run again."""
    key = (kind, which, repr(request))
    if key not in ALONE:
        engine = Engine(CAUSAL if kind == "causal" else MASKED, cache_bytes=32_000_000)
        ALONE[key] = engine.run([(request, PARTS[kind][which])])[0]
    return ALONE[key]


class States(RuleBasedStateMachine):
    """add / step / abort / time passes / memory fails, in any order."""

    kind = "causal"

    @initialize(rows=st.integers(1, 4), blocks=st.integers(5, 12), share=st.sampled_from([0.0, 0.3, 1.0]))
    def start(self, rows: int, blocks: int, share: float) -> None:
        model = CAUSAL if self.kind == "causal" else MASKED
        size = model.pool(10**9).layout.nbytes(64) * blocks
        self.engine = Engine(model, cache_bytes=size, rows=rows, queue=3, prefix_bytes=int(size * share))
        self.clock = 0.0
        self.engine.trace.now = lambda: self.clock  # type: ignore[method-assign]
        self.asked: dict[int, tuple[int, Request]] = {}
        self.stopped: dict[tuple[int, int], Output] = {}
        self.errors: Counter[tuple[int, int]] = Counter()
        self.ended: set[int] = set()  # by the test: aborted or out of time
        self.deadlines: dict[int, float] = {}
        self.failing = 0
        run = model.run if self.kind == "causal" else model.stack.run

        def scarce(rows, *needs):
            if self.failing:
                self.failing -= 1
                raise MemoryError
            return run(rows, *needs)

        class Scarce:
            name, capabilities, pool = model.name, model.capabilities, model.pool

            run = staticmethod(scarce)

        backbone = Scarce()
        self.engine.backbone = self.engine._loop.backbone = self.engine.canvas_loop.backbone = backbone  # type: ignore[assignment]

    @rule(
        length=st.integers(1, 100), tokens=st.integers(1, 40), n=st.sampled_from([1, 1, 1, 2, 3]), which=st.integers(0, 1),
        warm=st.booleans(), tenant=st.sampled_from(["", "other"]), seconds=st.sampled_from([None, None, 3.0, 20.0]),
    )  # fmt: skip
    def add(self, length: int, tokens: int, n: int, which: int, warm: bool, tenant: str, seconds: float | None) -> None:
        if self.kind == "masked":
            length, tokens = min(length, 30), min(tokens, 20)
        n = min(n, self.engine.scheduler.max_rows)
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, n=n, temperature=0.9 if warm else 0.0, seed=length)
        request = Request(TEXT[:length], sampling, tenant=tenant)
        try:
            number = self.engine.add(request, PARTS[self.kind][which], deadline_s=seconds)
        except (QueueFullError, MemoryFitError):
            return
        assert number not in self.asked
        self.asked[number] = (which, request)
        if seconds is not None:
            self.deadlines[number] = self.clock + seconds

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            open_ = set(self.engine._open)
            late = {number for number, at in self.deadlines.items() if self.clock >= at and number in open_}
            for event in self.engine.step():
                if event.kind == "stop":
                    key = (event.request, event.choice)
                    assert key not in self.stopped
                    self.stopped[key] = event.output
                elif event.kind == "error":
                    self.errors[event.request, event.choice] += 1
            assert not late & set(self.engine._open)
            self.ended |= late
            self.clock += 1.0

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.asked)))
        if self.engine.abort(number):
            self.ended.add(number)
        assert not self.engine.abort(number)

    @rule()
    def run_out_of_memory(self) -> None:
        self.failing = 1

    @invariant()
    def memory_is_accounted_for(self) -> None:
        if not hasattr(self, "engine"):
            return
        pool, prefix = self.engine.scheduler.pool, self.engine.prefix
        kept = prefix.nbytes if prefix is not None else 0
        assert pool.lent_bytes == kept
        assert pool.used_bytes == sum(row.cache.slab.nbytes for row in self.engine.scheduler.running) + kept
        assert pool.held_bytes <= pool.budget_bytes
        assert len(self.engine.scheduler.waiting) <= 3
        assert len(self.engine.scheduler.running) <= self.engine.scheduler.max_rows

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.failing = 0
        for _ in range(3000):
            if self.engine.idle:
                break
            self.step(1)
        self.step(1)
        assert self.engine.idle
        assert not self.engine._open
        assert not self.engine._deadlines
        self.memory_is_accounted_for()
        self.engine.scheduler.pool.shrink()
        assert self.engine.scheduler.pool.held_bytes == 0
        for _, drafter in [(parts, parts.drafter) for parts in PARTS[self.kind] if parts.drafter is not None]:
            assert not drafter.live
        assert set(self.stopped) == {(number, i) for number, (_, one) in self.asked.items() for i in range(one.sampling.n)}
        for (number, choice), output in self.stopped.items():
            which, request = self.asked[number]
            whole = alone(self.kind, which, request)[choice]
            if output.finish_reason == "error":
                assert self.errors[number, choice] == 1
            elif output.finish_reason == "abort":
                assert number in self.ended
                assert output.tokens == whole.tokens[: len(output.tokens)]
            else:
                assert (output.tokens, output.finish_reason, output.seed) == (whole.tokens, whole.finish_reason, whole.seed)


class CanvasStates(States):
    """The same for canvases."""

    kind = "masked"


TestStates = States.TestCase
TestStates.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestCanvasStates = CanvasStates.TestCase
TestCanvasStates.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
