"""Every drafter there is, on 210 prompts: the tokens of plain decoding, one row at a time, four, and rows that come and go.

A new drafter gets a line in MAKERS; one without it fails here by name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ahead
import numpy as np
import pytest
import tiny
import torch
from drafters import RandomTree, Stub
from feature_layers import context, saved

from hasten import registry
from hasten.draft import aded, draft_model, eagle, fspad, hidden_transfer, lud, medusa, rsd, tvdpp
from hasten.draft._trigrams import Trigrams
from hasten.engine.contracts import Draft, RowView
from hasten.engine.engine import PLAIN, Engine, Parts
from hasten.errors import ConfigError
from hasten.models.assistant import Assistant
from hasten.models.feature import identity
from hasten.models.heads import MedusaHeads
from hasten.models.small import Shape, SmallLM
from hasten.types import Request, SamplingParams

PROMPTS = 210
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {}, "match": {"temperature": 0.7, "top_p": 0.9}}
BATCHES = {"one": 1, "four": 4, "ragged": 7}


def _aded(engine: Engine, folder: Path) -> Any:
    r = random.Random(2)
    texts = [np.array([r.randrange(tiny.VOCAB) for _ in range(900)])]
    return aded.Aded(aded.Config(table="none", iterations=12), context(engine), Trigrams.build(texts, tiny.VOCAB))


def _medusa(engine: Engine, folder: Path) -> Any:
    heads = MedusaHeads(engine.backbone, torch.arange(tiny.VOCAB), 3)
    generator = torch.Generator().manual_seed(0)
    for _, p in heads.trained():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    path = folder / "medusa.safetensors"
    heads.save(path, identity(engine.backbone, ""), {})
    return medusa.Medusa(medusa.Config(str(path), floor=0.0), context(engine))


def _hidden_transfer(engine: Engine, folder: Path) -> Any:
    path = ahead.stored(folder, ahead.maps(engine.backbone), engine.backbone)
    return hidden_transfer.HiddenTransfer(hidden_transfer.Config(path, floor=0.0), context(engine))


def _lud(engine: Engine, folder: Path) -> Any:
    path = ahead.stored(folder, ahead.inputs(engine.backbone), engine.backbone)
    return lud.Lud(lud.Config(path, beta=0.0), context(engine))


def _tvdpp(engine: Engine, folder: Path) -> Any:
    small = SmallLM(engine.backbone, torch.arange(tiny.VOCAB), Shape(hidden=32, layers=2, ffn=40, window=16)).reset(0)
    small.back.data *= 8  # sharp enough that it is sometimes right and sometimes wrong
    path = folder / "tvdpp.safetensors"
    small.save(path, identity(engine.backbone, ""), {})
    return tvdpp.Tvdpp(tvdpp.Config(str(path), sample=False, floor=0.0), context(engine))


def _small(seed: int = 1) -> Assistant:
    return Assistant(tiny.model(seed=seed), tiny.VOCAB)


# slug -> the drafter for an engine; a draft model that samples is judged by rejection where the request samples, which keeps
# the distribution and not the tokens, so it takes part in the sampled comparison with chains of its best tokens
MAKERS: dict[str, Callable[[Engine, Path], Any]] = {
    "aded": _aded,
    "draft-model": lambda e, _: draft_model.DraftModel(draft_model.Config(sample=False), context(e), _small()),
    "eagle": lambda e, f: eagle.Eagle(eagle.Config(str(saved(f, "eagle", e.backbone)), floor=0.0), context(e)),
    "fspad": lambda e, f: fspad.Fspad(fspad.Config(str(saved(f, "fspad", e.backbone)), floor=0.0), context(e)),
    "medusa": _medusa,
    "hidden-transfer": _hidden_transfer,
    "lud": _lud,
    "tvdpp": _tvdpp,
    "rsd": lambda e, _: rsd.Rsd(rsd.Config(width=2, length=2), context(e), _small()),
}
SLUGS = [slug for slug, module in registry.modules().items() if module.startswith("hasten.draft.")]


def make(slug: str, engine: Engine, folder: Path) -> Any:
    """The drafter `slug` over a tiny engine."""
    if slug in MAKERS:
        return MAKERS[slug](engine, folder)
    try:
        return registry.build(slug, context(engine))
    except ConfigError as error:
        pytest.fail(f"give {slug!r} a line in MAKERS of this file: {error}")


@cache
def requests(sampling: str) -> tuple[Request, ...]:
    """Prompts of 1 to 30 tokens, half of them repetitive, with answers of 1 to 14 tokens; a third stop at end tokens."""
    r = random.Random(7)
    out = []
    for i in range(PROMPTS):
        n = r.randint(1, 30)
        base = [r.randrange(tiny.VOCAB) for _ in range(r.randint(1, 5) if i % 2 else n)]
        params = SamplingParams(max_tokens=r.randint(1, 14), seed=i, ignore_eos=i % 3 > 0, **SAMPLINGS[sampling])
        out.append(Request(tuple((base * n)[:n]), params))
    return tuple(out)


@cache
def plain(sampling: str) -> tuple[tuple[int, ...], ...]:
    """The tokens of plain decoding, every prompt alone."""
    engine = tiny.engine()
    return tuple(engine.run([(request, PLAIN)])[0][0].tokens for request in requests(sampling))


def compare(slug: str, sampling: str, batch: str, folder: Path) -> None:
    engine = tiny.engine(rows=BATCHES[batch])
    drafter = make(slug, engine, folder)
    if sampling == "match" and drafter.draws != "point":
        pytest.skip("sampled drafts keep the distribution; chi-square tests judge them")
    parts = Parts(drafter, budget=8, measured=batch == "four")
    done = [outs[0] for outs in engine.run([(request, parts) for request in requests(sampling)])]
    wrong = [i for i, (out, text) in enumerate(zip(done, plain(sampling), strict=True)) if out.tokens != text]
    assert wrong == []
    if not parts.measured:  # the measured budget may find that nothing pays
        assert sum(out.usage.drafted_tokens for out in done) > 300, "it drafted, so the comparison means something"
    assert engine.scheduler.pool.used_bytes == 0


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
@pytest.mark.parametrize("slug", SLUGS)
def test_text_is_that_of_plain_decoding_as_rows_come_and_go(slug, sampling, tmp_path):
    assert len(set(plain(sampling))) > 150
    compare(slug, sampling, "ragged", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["one", "four"])
@pytest.mark.parametrize("sampling", list(SAMPLINGS))
@pytest.mark.parametrize("slug", SLUGS)
def test_text_is_that_of_plain_decoding_alone_and_by_four(slug, sampling, batch, tmp_path):
    compare(slug, sampling, batch, tmp_path)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_text_may_fill_the_window(slug, tmp_path):
    """Drafts deeper than what is left of the context are cut, and the text is plain decoding's to the last token."""
    engine = tiny.engine()
    r = random.Random(1)
    window = engine.backbone.capabilities.max_len
    for left in (1, 2, 5):
        prompt = tuple(r.randrange(1, tiny.VOCAB) for _ in range(window - left))
        request = Request(prompt, SamplingParams(ignore_eos=True))
        wanted = engine.run([(request, PLAIN)])[0][0].tokens
        got = engine.run([(request, Parts(make(slug, engine, tmp_path), budget=8))])[0][0].tokens
        assert len(wanted) == left
        assert got == wanted


def test_random_trees_and_repeated_siblings_on_all_prompts():
    engine = tiny.engine(rows=7)
    for sampling in SAMPLINGS:
        parts = Parts(RandomTree(tiny.VOCAB), budget=8)
        done = engine.run([(request, parts) for request in requests(sampling)])
        assert tuple(outs[0].tokens for outs in done) == plain(sampling)


class Wrong(Stub):
    """Proposes what a drafter must not: `spoil` makes it from a row and its budget."""

    def __init__(self, spoil: Callable[[RowView, int], Draft]) -> None:
        super().__init__()
        self.spoil = spoil

    def draft(self, row: RowView, budget: int) -> Draft:
        return self.spoil(row, budget)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda row, budget: Draft((1,) * (budget + 1), tuple(range(-1, budget))), "budget"),
        (lambda row, budget: Draft((tiny.VOCAB,), (-1,)), "vocabulary"),
        (lambda row, budget: Draft((1, 2), (1, -1)), "parents come before"),
        (lambda row, budget: Draft((1, 2), (-1,)), "2 tokens and 1 parents"),
    ],
    ids=["wide", "foreign", "upside-down", "torn"],
)
def test_a_drafter_that_breaks_its_contract_is_named_and_leaves_nothing_wrong_behind(spoil, says):
    engine = tiny.engine()
    request = requests("greedy")[4]
    with pytest.raises(ConfigError, match=says):
        engine.run([(request, Parts(Wrong(spoil), budget=4))])
    for open_ in list(engine._open):
        engine.abort(open_)
    assert engine.run([(request, PLAIN)])[0][0].tokens == plain("greedy")[4]


def test_sampled_drafts_without_their_distribution_are_refused():
    engine = tiny.engine()
    drafter = Wrong(lambda row, budget: Draft((1,), (-1,)))
    drafter.draws = "swor"
    request = Request((5, 6), SamplingParams(max_tokens=4, temperature=1.0, seed=1))
    with pytest.raises(ConfigError, match="distribution q"):
        engine.run([(request, Parts(drafter))])
