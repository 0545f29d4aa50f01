"""TVD++'s drafter: exact with any weights, the target's law by rejection, and chains that stop where they promise little."""

from __future__ import annotations

import pytest
import tiny
import torch
import toys

from hasten.draft.draft_model import Config as PlainConfig
from hasten.draft.draft_model import DraftModel
from hasten.draft.tvdpp import Config, Tvdpp
from hasten.engine.contracts import MethodContext, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError, IncompatibleError
from hasten.models.feature import identity
from hasten.models.small import Shape, SmallLM
from hasten.types import Request, SamplingParams


def stored(folder, target, kept: int = tiny.VOCAB, seed: int = 0) -> str:
    """A file with a random small model that drafts the first `kept` ids."""
    model = SmallLM(target, torch.arange(kept), Shape(hidden=32, layers=2, ffn=40, window=16)).reset(seed)
    model.back.data *= 8  # sharp enough that it is sometimes right and sometimes wrong
    path = folder / f"tvdpp-{kept}.safetensors"
    model.save(path, identity(target, ""), {})
    return str(path)


def drafter(engine, folder, kept: int = tiny.VOCAB, **knobs) -> Tvdpp:
    context = MethodContext("tiny", engine.backbone)
    return Tvdpp(Config(stored(folder, engine.backbone, kept), **knobs), context)


def requests(**sampling) -> list[Request]:
    return [
        Request(tuple(range(i + 1, 3 * i + 4)), SamplingParams(max_tokens=20, ignore_eos=i % 2 == 0, seed=i, **sampling))
        for i in range(8)
    ]


def texts(engine, asked, parts) -> list[tuple[int, ...]]:
    return [outs[0].tokens for outs in engine.run([(one, parts) for one in asked])]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("knobs", "sampling"),
    [({}, {}), ({"sample": False}, {}), ({"sample": False}, {"temperature": 0.7, "top_p": 0.9})],
    ids=["sampling-greedy", "point-greedy", "point-sampled"],
)
def test_text_is_that_of_plain_decoding(tmp_path, batch, knobs, sampling):
    engine = tiny.engine(rows=batch)
    asked = requests(**sampling)
    plain = texts(engine, asked, PLAIN)
    for kept in (tiny.VOCAB, 40):
        own = drafter(engine, tmp_path, kept, floor=0.0, **knobs)
        for measured in (False, True):
            assert texts(engine, asked, Parts(own, measured=measured)) == plain
        assert not own.assistant._rows
        assert own.assistant.pool.used_bytes == 0


def test_sampled_text_does_not_depend_on_the_batch(tmp_path):
    engine = tiny.engine()
    own = drafter(engine, tmp_path, 40)
    asked = requests(temperature=0.9)
    together = texts(engine, asked, Parts(own))
    assert together == [texts(engine, [request], Parts(own))[0] for request in asked]


def test_q_is_what_was_drawn_from_and_nothing_outside_the_draft_vocabulary(tmp_path):
    engine = tiny.engine()
    own = drafter(engine, tmp_path, 40, nodes=3)
    small = own.assistant.model
    seen = torch.zeros(tiny.VOCAB)
    for seed in range(60):
        own.open(seed, (5, 50, 90))
        [draft] = own.propose([RowView(seed, [5, 50, 90], 9, 0.8, seed)], [3])
        own.close(seed)
        assert len(draft) == 3
        assert draft.scores is None
        for parent, q in draft.q.items():
            assert q.shape == (tiny.VOCAB,)
            assert float(q[40:].sum()) == 0.0
            assert float(q.sum()) == pytest.approx(1.0, abs=1e-5)
            assert float(q[draft.tokens[parent + 1]]) > 0
        seen[draft.tokens[0]] += 1
    with torch.no_grad():
        text = torch.tensor([5, 50, 90])
        h = small.run([tiny_input(text)]).logits[0]
    assert torch.allclose(draft.q[-1], (h / 0.8).softmax(-1), atol=1e-5)
    assert int((seen > 0).sum()) > 3


def tiny_input(ids):
    from hasten.engine.contracts import RowInput

    return RowInput(ids, torch.arange(len(ids)))


@pytest.mark.parametrize("temperature", [-1.0, 0.6, 0.0])
@pytest.mark.parametrize("method", ["tvdpp", "draft-model"])
def test_the_law_of_two_tokens_is_the_targets(method, temperature):
    target, other = toys.law(4, 1, 1.2), toys.law(4, 2, 1.2)

    def near(text):  # a draft model with a reduced vocabulary: token 3 is never drafted
        return other(text).clone().index_fill_(0, torch.tensor([3]), -torch.inf)

    def make():
        if method == "tvdpp":
            return Tvdpp(Config(nodes=2, temperature=temperature), toys.context(4), toys.ToyAssistant(near))
        return DraftModel(PlainConfig(nodes=2, temperature=temperature), toys.context(4), toys.ToyAssistant(near))

    statistic, bound = toys.sample(make, target, 4, 4000)
    assert statistic < bound


def test_a_draft_that_lies_about_q_is_found_out():
    target, other = toys.law(4, 1, 1.2), toys.law(4, 2, 1.2)

    def flat(draft):
        return type(draft)(draft.tokens, draft.parents, {k: torch.full((4,), 0.25) for k in draft.q})

    def make():
        return Tvdpp(Config(nodes=2), toys.context(4), toys.ToyAssistant(other))

    statistic, bound = toys.sample(make, target, 4, 4000, spoil=flat)
    assert statistic > 2 * bound


def test_a_chain_of_best_tokens_stops_at_the_floor_and_a_sampled_one_never():
    model = toys.law(4, 2, 2.0)
    chances = []
    text = [1, 0]
    for _ in range(6):
        share = model(text).softmax(-1)
        chances.append(float(share.max()))
        text.append(int(share.argmax()))
    reach = [torch.tensor(chances[: i + 1]).prod().item() for i in range(6)]
    for floor in (0.0, 0.1, 0.3, 0.99):
        own = Tvdpp(Config(nodes=6, floor=floor), toys.context(4), toys.ToyAssistant(model))
        own.open(1, (1, 0))
        [greedy] = own.propose([RowView(1, [1, 0], 9, 0.0, 0)], [6])
        assert len(greedy) == sum(value >= floor for value in reach)
        assert list(greedy.tokens) == text[2 : 2 + len(greedy)]
        [sampled] = own.propose([RowView(1, [1, 0], 9, 1.0, 0)], [6])
        assert len(sampled) == 6


def test_wrong_settings_and_models_are_refused(tmp_path):
    for field, value in (("nodes", 0), ("nodes", 33), ("temperature", -0.5), ("floor", 1.0), ("cache_mb", 0)):
        with pytest.raises(ConfigError, match=f"tvdpp.{field}.*{value}"):
            Config(**{field: value})
    with pytest.raises(IncompatibleError, match="toy"):
        Tvdpp(Config(), toys.context(4))
    engine = tiny.engine()
    with pytest.raises(ConfigError, match="hasten train tvdpp"):
        Tvdpp(Config(), MethodContext("tiny", engine.backbone))
