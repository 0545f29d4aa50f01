"""EAGLE drafting with any layer is exact; its cached beam search equals one written out without a cache."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import tiny
import torch
from feature_layers import context, layer, saved

from hasten.draft.eagle import Config, Eagle
from hasten.engine.contracts import Feedback, Needs, RowInput, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError, FormatError, IncompatibleError
from hasten.models.feature import identity, load_feature_model, weights_path
from hasten.types import Request, SamplingParams


def requests(count: int, **sampling) -> list[Request]:
    r = random.Random(7)
    return [
        Request(
            tuple(r.randrange(tiny.VOCAB) for _ in range(r.randint(1, 30))),
            SamplingParams(max_tokens=20, seed=i, ignore_eos=i % 2 == 0, **sampling),
        )
        for i in range(count)
    ]


def texts(engine, batch, parts) -> list[tuple[int, ...]]:
    return [outs[0].tokens for outs in engine.run([(request, parts) for request in batch])]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 4, 12])
@pytest.mark.parametrize("config", ["plain", "windowed", "normed"])
def test_text_is_that_of_plain_decoding(tmp_path, sampling, batch, config):
    engine = tiny.engine(tiny.CONFIGS[config], rows=batch)
    eagle = Eagle(Config(str(saved(tmp_path, "eagle", engine.backbone)), floor=0.0), context(engine))
    asked = requests(8, **sampling)
    plain = texts(engine, asked, PLAIN)
    assert texts(engine, asked, Parts(eagle, budget=12)) == plain
    assert texts(engine, asked, Parts(eagle, budget=12, measured=True)) == plain
    assert not eagle._rows
    assert eagle._pool.used_bytes == 0


def by_hand(model, target, tokens: list[int], depth: int, width: int, count: int) -> list[tuple[int, ...]]:
    """EAGLE-2's tree without a cache: every path recomputed from the whole text."""
    with torch.no_grad():
        _, taps = target(torch.tensor([tokens]), hidden=[len(target.layers)])
        true = target.norm(taps[len(target.layers)])[0, :-1]

        def children(path: tuple[int, ...], fed: list[torch.Tensor]):
            feats = torch.cat((true, *(f[None] for f in fed)))
            following = torch.tensor([*tokens[1:], *path])
            out = model.dense(feats[None], target.embeddings(following)[None])[0, -1]
            share = model.head(model.norm(out)[None])[0].softmax(-1)
            best = share.topk(width)
            return list(zip(best.indices.tolist(), best.values.tolist(), strict=True)), model.fed_back(out)

        beam: list[tuple[float, tuple[int, ...], list[torch.Tensor]]] = [(1.0, (), [])]
        found: list[tuple[float, tuple[int, ...]]] = []
        for _ in range(depth):
            new = []
            for reach, path, fed in beam:
                options, state = children(path, fed)
                new += [(reach * chance, (*path, token), [*fed, state]) for token, chance in options]
            found += [(reach, path) for reach, path, _ in new]
            beam = sorted(new, key=lambda entry: -entry[0])[:width]
    return [path for _, path in sorted(found, key=lambda entry: -entry[0])[:count]]


@pytest.mark.parametrize("kind", ["eagle", "fspad"])
@pytest.mark.parametrize("chunks", [[12], [5, 6, 1], [3, 1, 1, 7]])
def test_the_cached_search_is_the_one_written_out(tmp_path, kind, chunks):
    """Features may come in any pieces: prompt chunks, single tokens, or many after passes without a draft."""
    from hasten.draft.fspad import Fspad

    engine = tiny.engine()
    target = engine.backbone
    model = layer(kind, target, seed=3)
    for _, p in model.trained():
        if p.ndim == 2:
            p.data *= 12  # far from uniform, so that ties and rounding decide nothing
    path = tmp_path / "one.safetensors"
    model.save(path, identity(target, ""), {})
    method = Eagle if kind == "eagle" else Fspad
    drafter = method(Config(str(path), nodes=9, depth=3, width=3, floor=0.0), context(engine))
    r = random.Random(1)
    tokens = [r.randrange(tiny.VOCAB) for _ in range(13)]
    done = target.run([RowInput(torch.tensor(tokens), torch.arange(13))], Needs(final_hidden=True))
    drafter.open(1, tokens[:4])
    at = 0
    for chunk in chunks:
        drafter.observe([Feedback(1, (), tuple(tokens[at : at + chunk]), (), 0, final=done.final_hidden[at : at + chunk])])
        at += chunk
        reread = load_feature_model(path, kind, target)
        [draft] = drafter.propose([RowView(1, tokens[: at + 1], 50, 0.0, 0)], [9])
        drafted: list[tuple[int, ...]] = []
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            drafted.append((*(drafted[parent] if parent >= 0 else ()), token))
        assert drafted == by_hand(reread, target, tokens[: at + 1], 3, 3, 9)


def test_rows_are_drafted_alike_alone_and_together(tmp_path):
    engine = tiny.engine()
    path = saved(tmp_path, "eagle", engine.backbone, seed=5)
    asked = requests(6)

    class Recorder(Eagle):
        drafts: dict[tuple[int, ...], tuple[int, ...]]

        def propose(self, rows, budgets):
            out = super().propose(rows, budgets)
            for row, draft in zip(rows, out, strict=True):
                assert self.drafts.setdefault(tuple(row.tokens), draft.tokens) == draft.tokens
            return out

    recorder = Recorder(Config(str(path), floor=0.0), context(engine))
    recorder.drafts = {}
    for batch in (1, 6):
        for start in range(0, 6, batch):
            texts(engine, asked[start : start + batch], Parts(recorder, budget=8))
    assert sum(map(len, recorder.drafts.values())) > 100


def test_no_room_means_no_draft_and_further_choices_draft_nothing(tmp_path):
    engine = tiny.engine()
    path = saved(tmp_path, "eagle", engine.backbone)
    eagle = Eagle(Config(str(path), cache_mb=1), context(engine))
    eagle._pool.budget_bytes = eagle._pool.layout.nbytes(64)
    long = Request(tuple(range(1, 60)), SamplingParams(max_tokens=60, ignore_eos=True))
    output = engine.run([(long, Parts(eagle, budget=8))])[0][0]
    assert output.usage.drafted_tokens == 0
    assert output.tokens == engine.run([(long, PLAIN)])[0][0].tokens
    many = Request((5, 6, 7), SamplingParams(max_tokens=10, n=3, temperature=0.8, seed=1, ignore_eos=True))
    assert [o.tokens for o in engine.run([(many, Parts(eagle, budget=8))])[0]] == [
        o.tokens for o in engine.run([(many, PLAIN)])[0]
    ]


def test_a_reduced_vocabulary_drafts_only_its_ids(tmp_path):
    engine = tiny.engine()
    eagle = Eagle(Config(str(saved(tmp_path, "eagle", engine.backbone, kept=11)), floor=0.0), context(engine))
    seen: set[int] = set()
    propose = eagle.propose
    eagle.propose = lambda rows, budgets: [seen.update(d.tokens) or d for d in propose(rows, budgets)]
    texts(engine, requests(4), Parts(eagle, budget=8))
    assert seen
    assert max(seen) < 11


@pytest.mark.parametrize(
    ("field", "value"),
    [("nodes", 0), ("nodes", 257), ("depth", 0), ("width", 33), ("floor", 1.0), ("floor", -0.1), ("cache_mb", 0)],
)
def test_a_bad_setting_is_refused_by_name_and_value(field, value):
    with pytest.raises(ConfigError, match=f"eagle.{field}.*{value}"):
        Config(**{field: value})


def test_a_layer_of_another_kind_model_or_shape_is_refused(tmp_path, monkeypatch):
    engine = tiny.engine()
    eagle = saved(tmp_path, "eagle", engine.backbone)
    with pytest.raises(ConfigError, match=r"eagle.*fspad"):
        load_feature_model(eagle, "fspad", engine.backbone)
    assert identity(tiny.model(), "x") == identity(engine.backbone, "y")
    assert identity(tiny.model(seed=7), "x") != identity(engine.backbone, "x")
    with pytest.raises(ConfigError, match=r"trained for model 'llama-\w+', not 'llama-\w+'"):
        load_feature_model(eagle, "eagle", tiny.model(seed=7))
    wide = tiny.model(dataclasses.replace(tiny.PLAIN, hidden=60, head_dim=16))
    layer("eagle", engine.backbone).save(tmp_path / "wide.safetensors", identity(wide, ""), {})
    with pytest.raises(FormatError, match="shape"):
        load_feature_model(tmp_path / "wide.safetensors", "eagle", wide)
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match="hasten train eagle tiny"):
        weights_path("eagle", engine.backbone, "tiny")
    blob = eagle.read_bytes()
    for cut in (0, 7, len(blob) // 2, len(blob) - 1):
        (tmp_path / "cut.safetensors").write_bytes(blob[:cut])
        with pytest.raises(FormatError, match=r"cut\.safetensors"):
            load_feature_model(tmp_path / "cut.safetensors", "eagle", engine.backbone)
    with pytest.raises(IncompatibleError, match=r"eagle.*transformers"):
        Eagle(Config(), type(context(engine))("tiny", SimpleNamespace(name="transformers")))
