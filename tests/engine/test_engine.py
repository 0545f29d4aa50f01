"""The engine as its users see it: stops, limits, aborts, streams, traces, errors - and no memory left behind."""

from __future__ import annotations

import math
import random

import pytest
import tiny
import torch
from drafters import RandomTree

from hasten.engine.engine import PLAIN, Engine, Parts
from hasten.engine.scheduler import QueueFullError
from hasten.errors import ConfigError, ContextLengthError, MemoryFitError
from hasten.scoring import score
from hasten.text import StopText
from hasten.types import Request, SamplingParams, commit_log


class Letters:
    """A decoder whose token i is one letter; token 1 is silent until the next, like half a character."""

    def __init__(self) -> None:
        self.waiting = ""

    def push(self, token: int) -> str:
        if token == 1:
            self.waiting += "~"
            return ""
        out, self.waiting = self.waiting + chr(ord("a") + token % 26), ""
        return out

    def flush(self) -> str:
        out, self.waiting = self.waiting, ""
        return out


def request(prompt: tuple[int, ...] = (4, 5, 6), **sampling: object) -> Request:
    return Request(prompt, SamplingParams(**{"max_tokens": 16, "ignore_eos": True, **sampling}))  # type: ignore[arg-type]


@pytest.fixture
def engine() -> Engine:
    return tiny.engine(decoder=Letters)


def test_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    plain = engine.run([(request(), PLAIN)])[0][0]
    stop = plain.text[5:7]
    first = plain.text.index(stop)
    out = engine.run([(request(stop=("never", stop)), PLAIN)])[0][0]
    assert out.text == plain.text[:first]
    assert out.finish_reason == "stop"
    assert out.stop == stop
    assert len(out.tokens) < len(plain.tokens)
    drafted = engine.run([(request(stop=("never", stop)), Parts(RandomTree(tiny.VOCAB), budget=5))])[0][0]
    assert (drafted.text, drafted.tokens) == (out.text, out.tokens)


def test_stop_ids_and_eos(engine: Engine) -> None:
    plain = engine.run([(request(), PLAIN)])[0][0]
    token = plain.tokens[6]
    out = engine.run([(request(stop_ids=(token,)), PLAIN)])[0][0]
    cut = plain.tokens.index(token)
    assert out.tokens == plain.tokens[: cut + 1]
    assert out.stop == token
    eos = engine.run([(request(logit_bias={0: 100.0}, ignore_eos=False), PLAIN)])[0][0]
    assert eos.tokens == (0,)
    assert eos.text == ""
    assert eos.finish_reason == "stop"


@pytest.mark.parametrize("pieces", [["ab", "cab", "c"], ["a", "b", "c", "d"], ["abcabd"], ["", "abc", "abd"]])
def test_held_back_text_is_never_lost_or_shown_too_early(pieces: list[str]) -> None:
    class Feed:
        def push(self, token: int) -> str:
            return pieces[token]

        def flush(self) -> str:
            return ""

    for stops in (("abd",), ("zz", "b"), ("abcabdx",), ()):
        text, shown = StopText(Feed(), stops), ""
        for i in range(len(pieces)):
            shown += text.push(i)
            assert shown == text.text
            if text.found:
                break
        shown += text.finish()
        whole = "".join(pieces)
        hits = [whole.index(stop) for stop in stops if stop in whole]
        assert shown == whole[: min(hits)] if hits else shown == whole


def test_stream_text_adds_up_and_closing_it_frees_the_row(engine: Engine) -> None:
    events = list(engine.stream(request()))
    out = events[-1].output
    assert out is not None
    assert "".join(event.text for event in events if event.kind == "commit") == out.text
    assert [event.token for event in events if event.kind == "commit"] == list(out.tokens)
    assert [event.position for event in events if event.kind == "commit"] == list(range(3, 19))
    assert all(0 <= event.confidence <= 1 for event in events if event.kind == "commit")
    assert [row[1] for row in commit_log(events)[0]] == list(range(3, 19))
    stream = engine.stream(request(max_tokens=200))
    next(stream)
    assert engine.scheduler.pool.used_bytes > 0
    stream.close()
    assert engine.idle
    assert engine.scheduler.pool.used_bytes == 0


def test_two_streams_at_once_do_not_lose_events(engine: Engine) -> None:
    one, two = engine.stream(request()), engine.stream(request((9, 9), temperature=1.0, seed=3))
    seen: tuple[list, list] = ([], [])
    random.seed(0)
    streams = [one, two]
    open_ = [True, True]
    while any(open_):
        i = random.choice([i for i in (0, 1) if open_[i]])
        try:
            seen[i].append(next(streams[i]))
        except StopIteration:
            open_[i] = False
    alone = list(engine.stream(request((9, 9), temperature=1.0, seed=3)))
    assert [e.token for e in seen[1] if e.kind == "commit"] == [e.token for e in alone if e.kind == "commit"]
    assert seen[0][-1].kind == seen[1][-1].kind == "stop"


def test_choices_share_the_prompt_and_differ(engine: Engine) -> None:
    prompt = tuple(range(1, 40))
    outs = engine.run([(request(prompt, n=4, temperature=1.0, seed=9), PLAIN)])[0]
    assert [out.choice for out in outs] == [0, 1, 2, 3]
    assert len({out.tokens for out in outs}) == 4
    assert outs[0].tokens == engine.run([(request(prompt, temperature=1.0, seed=9), PLAIN)])[0][0].tokens
    assert outs[0].usage.computed_tokens == 39 + 15
    assert outs[1].usage.computed_tokens == 1 + 15  # the prompt was read once
    for out in outs:  # each choice can be repeated alone from the seed it reports
        assert engine.run([(request(prompt, temperature=1.0, seed=out.seed), PLAIN)])[0][0].tokens == out.tokens


def test_a_choice_whose_lead_ends_or_is_cut_still_runs(engine: Engine) -> None:
    outs = engine.run([(request((3,), n=3, temperature=1.0, seed=1, max_tokens=1), PLAIN)])[0]
    assert [len(out.tokens) for out in outs] == [1, 1, 1]
    assert engine.scheduler.pool.used_bytes == 0


def test_long_prompts_are_read_in_chunks_without_changing_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.engine import ar
    from hasten.engine.limits import Limits

    engine = tiny.engine()
    prompt = tuple(i * 7 % tiny.VOCAB for i in range(150))
    whole = engine.run([(request(prompt), PLAIN)])[0][0]
    monkeypatch.setattr(ar, "LIMITS", Limits(prefill_chunk=32, step_tokens=40))
    events = []
    pieces = engine.run([(request(prompt), PLAIN), (request((1, 2)), PLAIN)], events.append)
    assert pieces[0][0].tokens == whole.tokens
    assert pieces[1][0].tokens == engine.run([(request((1, 2)), PLAIN)])[0][0].tokens
    assert sum(e.kind == "prefill" for e in events if e.request == events[0].request) == 5


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    out = engine.run([(request(logprobs=3, temperature=0.8, seed=2, max_tokens=8), PLAIN)])[0][0]
    full = [4, 5, 6, *out.tokens]
    with torch.no_grad():
        table = engine.backbone(torch.tensor([full]))[0].log_softmax(-1)
    assert out.logprobs is not None
    for i, entry in enumerate(out.logprobs):
        assert entry.token == out.tokens[i]
        assert entry.logprob == pytest.approx(float(table[2 + i, entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == table[2 + i].topk(3).indices.tolist()
    scored = score(engine.backbone, engine.scheduler.pool, full, 3)
    assert scored == pytest.approx([entry.logprob for entry in out.logprobs], abs=1e-4)


def test_scoring_in_chunks_equals_scoring_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten import scoring
    from hasten.engine.limits import Limits

    tokens = [i * 5 % tiny.VOCAB for i in range(50)]
    whole = score(engine.backbone, engine.scheduler.pool, tokens, 1)
    assert len(whole) == 49
    monkeypatch.setattr(scoring, "LIMITS", Limits(prefill_chunk=8))
    for start in (1, 7, 8, 9, 33, 49, 50):
        assert score(engine.backbone, engine.scheduler.pool, tokens, start) == pytest.approx(whole[start - 1 :], abs=1e-4)
    with pytest.raises(ConfigError, match="start"):
        score(engine.backbone, engine.scheduler.pool, tokens, 0)


def test_refusals_name_the_field_and_leave_nothing_behind(engine: Engine) -> None:
    cases = [
        (request(tuple(range(90)) * 3), ContextLengthError, "prompt"),
        (request(max_tokens=254), ContextLengthError, "max_tokens"),
        (request((tiny.VOCAB,)), ConfigError, "prompt"),
        (request(stop_ids=(tiny.VOCAB,)), ConfigError, "stop_ids"),
        (request(logit_bias={tiny.VOCAB: 1}), ConfigError, "logit_bias"),
    ]
    for bad, kind, field in cases:
        with pytest.raises(kind) as error:
            engine.add(bad)
        assert error.value.field == field
    with pytest.raises(ConfigError, match="tokenizer"):
        tiny.engine().add(request(stop=("x",)))
    with pytest.raises(ConfigError, match="prompt"):
        Request(())
    small = tiny.engine(cache_bytes=100_000, rows=2, queue=1)
    with pytest.raises(MemoryFitError, match="whole cache"):
        small.add(request(max_tokens=250))
    with pytest.raises(ConfigError, match="n = 3"):
        small.add(request(n=3))
    small.add(request())
    with pytest.raises(QueueFullError):
        small.add(request())
    with pytest.raises(ContextLengthError):  # one bad request among good ones: none runs
        engine.run([(request(), PLAIN), (request(max_tokens=254), PLAIN)])
    assert engine.idle


def test_without_max_tokens_the_window_or_the_cache_is_the_limit() -> None:
    out = tiny.engine().run([(Request((3,), SamplingParams(ignore_eos=True)), PLAIN)])[0][0]
    assert len(out.tokens) == 255
    assert out.finish_reason == "length"
    small = tiny.engine(cache_bytes=100_000)
    out = small.run([(Request((3,), SamplingParams(ignore_eos=True)), PLAIN)])[0][0]
    assert 32 <= len(out.tokens) < 255


def test_logits_that_are_not_finite_fail_one_row_only() -> None:
    engine = tiny.engine()
    good = engine.run([(request((7, 8)), PLAIN)])[0][0]
    with torch.no_grad():
        engine.backbone.embed.weight[50] = float("nan")
        head = engine.backbone.embed.weight.clone()
        head[50] = 0
    engine.backbone.head.weight = torch.nn.Parameter(head, requires_grad=False)
    events = []
    outs = engine.run([(request((50, 1)), PLAIN), (request((7, 8)), PLAIN)], events.append)
    assert outs[0][0].finish_reason == "error"
    assert any(e.kind == "error" and "not finite" in e.text for e in events)
    if 50 not in good.tokens:
        assert outs[1][0].tokens == good.tokens
    assert engine.scheduler.pool.used_bytes == 0


def test_confidence_is_a_probability(engine: Engine) -> None:
    events = [e for e in engine.stream(request(temperature=2.0, seed=1)) if e.kind == "commit"]
    assert all(math.isfinite(e.confidence) and 0 < e.confidence < 1 for e in events)
