"""The draft model: exact with any second model, right every time when it is the target, and loaded by name with checks."""

from __future__ import annotations

import pytest
import tiny
import toys

from hasten.draft.draft_model import Config, DraftModel
from hasten.engine.contracts import MethodContext
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError
from hasten.models.assistant import Assistant
from hasten.types import Request, SamplingParams


def drafter(engine, seed: int = 1, **knobs) -> DraftModel:
    return DraftModel(Config(**knobs), MethodContext("tiny", engine.backbone), Assistant(tiny.model(seed=seed), tiny.VOCAB))


def requests(**sampling) -> list[Request]:
    return [
        Request(tuple(range(i + 1, 3 * i + 4)), SamplingParams(max_tokens=20, ignore_eos=i % 2 == 0, seed=i, **sampling))
        for i in range(10)
    ]


def texts(engine, asked, parts) -> list[tuple[int, ...]]:
    return [outs[0].tokens for outs in engine.run([(one, parts) for one in asked])]


@pytest.mark.parametrize("batch", [1, 4, 10])
@pytest.mark.parametrize(
    ("knobs", "sampling"),
    [({}, {}), ({"sample": False}, {}), ({"sample": False}, {"temperature": 0.7, "top_p": 0.9})],
    ids=["sampling-greedy", "point-greedy", "point-sampled"],
)
def test_text_is_that_of_plain_decoding(batch, knobs, sampling):
    engine = tiny.engine(rows=batch)
    one = drafter(engine, **knobs)
    asked = requests(**sampling)
    plain = texts(engine, asked, PLAIN)
    for measured in (False, True):
        assert texts(engine, asked, Parts(one, measured=measured)) == plain
    assert not one.assistant._rows
    assert one.assistant.pool.used_bytes == 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("sample", [True, False])
def test_the_target_as_its_own_draft_model(sampling, sample):
    engine = tiny.engine()
    own = DraftModel(
        Config(nodes=4, sample=sample), MethodContext("tiny", engine.backbone), Assistant(engine.backbone, tiny.VOCAB)
    )
    request = Request((5, 9, 13), SamplingParams(max_tokens=41, ignore_eos=True, seed=2, **sampling))
    out = engine.run([(request, Parts(own))])[0][0]
    if sample or not sampling:
        assert out.usage.tokens_per_forward == 5.0
    assert out.usage.accepted_tokens > 0


def test_sampled_text_does_not_depend_on_the_batch_and_repeats():
    engine = tiny.engine()
    one = drafter(engine)
    asked = requests(temperature=0.9)
    together = texts(engine, asked, Parts(one))
    assert together == [texts(engine, [request], Parts(one))[0] for request in asked]


def test_the_law_of_two_tokens_is_the_targets():
    target, other = toys.law(4, 1, 1.2), toys.law(4, 2, 1.2)
    statistic, bound = toys.sample(
        lambda: DraftModel(Config(nodes=2), toys.context(4), toys.ToyAssistant(other)), target, 4, 6000
    )
    assert statistic < bound


@pytest.mark.parametrize(("field", "value"), [("nodes", 0), ("nodes", 33), ("temperature", -0.5), ("cache_mb", 0)])
def test_a_bad_setting_is_refused_by_name_and_value(field, value):
    with pytest.raises(ConfigError, match=f"draft-model.{field}.*{value}"):
        Config(**{field: value})
