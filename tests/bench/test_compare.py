"""Comparisons: methods take turns, figures follow from the answers' counts and times, nothing is lost or mixed up."""

from __future__ import annotations

import pytest

from hasten.bench.compare import Answer, Prompt, compare, runner
from hasten.bench.report import Spread
from hasten.errors import ConfigError

OVER = [Prompt(seed, group, (seed + 1, i + 1)) for seed in (0, 1, 2) for i, group in enumerate(("chat", "edit"))]


def fixed(calls: list, name: str, cost: float, passes: int = 10, wrong: int | None = None):
    def run(prompt: Prompt, tokens: int) -> Answer:
        calls.append((name, prompt.seed, prompt.group, tokens))
        seconds = cost * (prompt.seed + 1) * (2 if prompt.group == "edit" else 1)
        text = (9,) * tokens if prompt.seed == wrong else prompt.ids * (tokens // 2)
        return Answer(text, seconds + 1.0, seconds, passes, draft_s=seconds / 4)

    return run


def test_methods_take_turns_and_every_seed_starts_fresh():
    calls: list = []
    seen: list = []
    runners = {name: fixed(calls, name, 1.0) for name in "abc"}
    compare(runners, OVER, 20, lambda *at: seen.append(at), lambda: calls.append("fresh"), "x")
    assert seen == [("x", i, 6) for i in range(7)]
    assert [call for call in calls if call == "fresh"] == ["fresh"] * 3
    warm = [call for call in calls if call != "fresh" and call[3] == 8]
    assert warm == [("a", seed, "chat", 8) for seed in (0, 1, 2)]
    order = "".join(call[0] for call in calls if call != "fresh" and call[3] == 20)
    assert order == "abcbcacababcbcacab"


def test_figures_follow_from_times_and_counts():
    calls: list = []
    runners = {"plain": fixed(calls, "plain", 2.0, 20), "fast": fixed(calls, "fast", 1.0, 8, wrong=1)}
    done = compare(runners, OVER, 20)
    assert (done.names, done.seeds, done.groups) == (("plain", "fast"), (0, 1, 2), ("chat", "edit"))
    assert done.speedup("fast") == Spread(2.0, 2.0, 2.0)
    assert done.speedup("plain", "fast").median == 0.5
    # seed 0: plain 2 + 4 seconds of decoding and 2 of reading, fast 1 + 2 and 2
    assert done.speedup("fast", whole=True) == Spread.of([8 / 5, 14 / 8, 20 / 11])
    assert done.speedup("fast", group="edit", whole=True) == Spread.of([5 / 3, 9 / 5, 13 / 7])
    assert done.tokens_per_pass("fast").median == round(19 / 8, 3)
    assert done.pass_cost("fast").median == 1.25
    assert done.drafting("fast").median == 0.25
    assert done.tokens_per_s("fast", "chat") == Spread.of([19.0, 9.5, 19 / 3])
    assert done.same_text("fast") == (4, 6)
    assert done.same_text("plain") == (6, 6)
    table = done.to_dict()
    assert table["fast"]["same_text"] == [4, 6]
    assert table["fast"]["groups"]["chat"]["speedup"] == {"median": 2.0, "min": 2.0, "max": 2.0}


def test_the_group_that_is_helped_least_is_found():
    def slow_edit(prompt: Prompt, tokens: int) -> Answer:
        return Answer((1,) * tokens, 1.0, 4.0 if prompt.group == "edit" else 0.5, 5)

    def plain(prompt: Prompt, tokens: int) -> Answer:
        return Answer((1,) * tokens, 1.0, 2.0, 10)

    group, ratio = compare({"plain": plain, "slow": slow_edit}, OVER, 10).least_helped("slow")
    assert (group, ratio.median) == ("edit", 0.5)


def test_peers_that_do_not_tell_their_passes_have_no_figures_of_them():
    def peer(prompt: Prompt, tokens: int) -> Answer:
        return Answer((1,) * tokens, 1.0, 1.0)

    figures = compare({"plain": peer, "other": peer}, OVER, 10).figures("other")
    assert set(figures) == {"speedup", "whole_request", "tokens_per_s"}


def test_what_cannot_be_compared_is_refused():
    calls: list = []
    one = {"a": fixed(calls, "a", 1.0)}
    with pytest.raises(ConfigError, match="runners"):
        compare(one, OVER, 10)
    two = {**one, "b": fixed(calls, "b", 1.0)}
    with pytest.raises(ConfigError, match="prompts"):
        compare(two, [], 10)
    done = compare(two, OVER, 10)
    with pytest.raises(ConfigError, match="method 'c'"):
        done.speedup("c")
    with pytest.raises(ConfigError, match="group 'x'"):
        done.speedup("b", group="x")


def test_a_runner_answers_as_the_engine_does():
    import tiny

    from hasten.engine.engine import Parts
    from hasten.llm import LLM

    class Loaded:
        source, tokenizer, dtype, bytes = "", None, None, 0
        model = tiny.model()

    llm = LLM(Loaded(), "tiny", cache_bytes=32_000_000)  # type: ignore[arg-type]
    prompt = Prompt(3, "x", (5, 9, 13))
    plain = runner(llm, "plain")(prompt, 12)
    assert plain.tokens == llm.generate([5, 9, 13], method="plain", max_tokens=12, ignore_eos=True).tokens
    assert (len(plain.tokens), plain.passes, plain.drafted) == (12, 11, 0)
    assert 0 < plain.decode_s < plain.seconds
    drafted = runner(llm, ["prompt-lookup", "token-recycling"])(prompt, 12)
    assert drafted.tokens == plain.tokens
    given = runner(llm, lambda: Parts(llm.parts(("token-recycling",)).drafter))(prompt, 12)
    assert given.tokens == plain.tokens
    assert given.drafted > 0
    whole = runner(llm, "token-recycling", whole=True)(prompt, 12)
    assert whole.tokens == plain.tokens
    assert plain.drafts == plain.commits == whole.commits == ()
    for drafted in (given, whole):
        assert sum(kept for _, kept in drafted.drafts) == drafted.accepted
        assert all(0 <= kept <= depth for depth, kept in drafted.drafts)
        assert sum(depth for depth, _ in drafted.drafts) <= drafted.drafted
    ended = runner(llm, "plain", ends=True)(prompt, 200).tokens
    assert ended == llm.generate([5, 9, 13], method="plain", max_tokens=200).tokens
    sampled = [runner(llm, "plain", temperature=1.0)(prompt, 12).tokens for _ in range(2)]
    assert sampled[0] == sampled[1] != plain.tokens
    before = llm.parts(("token-recycling",))
    cost, known = llm.engine.pass_cost.table(), llm.engine._loop.budget.books
    assert known
    llm.forget()
    assert not known, "nor is a drafter kept alive by what was learnt of it"
    assert llm.engine.pass_cost.table() == cost, "the machine stays as fast as it was"
    assert llm.parts(("token-recycling",)) is not before
