"""Hidden transfer: exact with any maps, one draft in both modes, the head on the same state as its limit, maps that learn."""

from __future__ import annotations

import pytest
import tiny
import torch
from ahead import by_hand, maps, read, requests, stored, texts, trained_texts
from feature_layers import context, saved

from hasten.draft.hidden_transfer import Config, HiddenTransfer
from hasten.draft.lud import Config as LudConfig
from hasten.draft.lud import Lud
from hasten.engine.cache import Past
from hasten.engine.contracts import Feedback, RowView
from hasten.engine.engine import PLAIN, Parts
from hasten.errors import ConfigError, FormatError, IncompatibleError
from hasten.models.feature import identity
from hasten.models.pseudo import TransferMaps, load_maps
from hasten.union import Union

MODES = ("two-phase", "fused")


def drafter(folder, engine, layers=(1, 2, 2), seed=0, scale=0.1, **settings) -> HiddenTransfer:
    made = maps(engine.backbone, layers, seed, scale)
    return HiddenTransfer(Config(stored(folder, made, engine.backbone), **{"floor": 0.0, **settings}), context(engine))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("config", "batch"), [("plain", 1), ("plain", 4), ("windowed", 5), ("normed", 2)])
def test_text_is_that_of_plain_decoding(tmp_path, mode, sampling, config, batch):
    engine = tiny.engine(tiny.CONFIGS[config], rows=batch)
    own = drafter(tmp_path, engine, mode=mode)
    asked = requests(5, **sampling)
    plain = texts(engine, None, asked)
    for measured in (False, True):
        assert texts(engine, own, asked, budget=12, measured=measured) == plain
    assert not own._tips
    assert engine.scheduler.pool.used_bytes == 0


def test_both_modes_draft_the_same(tmp_path):
    engine = tiny.engine()
    heard = {}
    for mode in MODES:
        own, drafts = drafter(tmp_path, engine, mode=mode), []
        propose = own.propose

        def watched(rows, budgets, propose=propose, drafts=drafts):
            made = propose(rows, budgets)
            drafts += [(row.id % 100, len(row.tokens), one.tokens, one.parents) for row, one in zip(rows, made)]
            return made

        own.propose = watched
        heard[mode] = (texts(engine, own, requests(6), budget=6), [one[1:] for one in drafts])
    assert heard["fused"] == heard["two-phase"]
    assert sum(len(one[1]) for one in heard["fused"][1]) > 30


def test_the_draft_is_the_tree_of_the_dense_forms_guesses(tmp_path):
    engine = tiny.engine()
    own = drafter(tmp_path, engine, nodes=3, ranks=1)
    ids = torch.arange(3, 15)
    cache, hidden = read(engine.backbone, ids)
    own.observe([Feedback(1, (0,), (14,), (), 7, hidden={i: hidden[i][-1:] for i in own.needs.hidden})])
    row = RowView(1, [*ids.tolist(), 7], 9, 0.0, 0, Past(cache))
    [draft] = own.propose([row], [9])
    want = engine.backbone.logits(by_hand(engine.backbone, own.maps, ids, 11, 3))
    assert draft.tokens == tuple(want.argmax(-1).tolist())
    assert draft.parents == (-1, 0, 1)
    assert draft.scores == pytest.approx(want.softmax(-1).amax(-1).tolist(), rel=1e-3)
    full = RowView(1, [*ids.tolist(), 7, 8], 9, 0.0, 0, Past(cache))
    assert not len(own.propose([full], [9])[0])  # the keys do not end with the token whose state was kept


def test_identity_maps_at_the_top_repeat_the_head_on_the_same_state(tmp_path):
    engine = tiny.engine()
    for mode in MODES:
        own = drafter(tmp_path, engine, layers=(3, 3), scale=0.0, k=2, ranks=1, nodes=2, mode=mode)
        drafts = []
        propose = own.propose

        def watched(rows, budgets, propose=propose, drafts=drafts):
            made = propose(rows, budgets)
            drafts += [(row.tokens[-1], one.tokens) for row, one in zip(rows, made) if len(one)]
            return made

        own.propose = watched
        assert texts(engine, own, requests(3), budget=4) == texts(engine, None, requests(3))
        assert drafts
        # greedy: the head on the newest cached state gives the root itself, at each depth
        assert all(tokens == (root, root)[: len(tokens)] for root, tokens in drafts)


@pytest.mark.parametrize("mode", MODES)
def test_no_guesses_is_plain_decoding_pass_by_pass(tmp_path, mode):
    engine = tiny.engine()
    own = drafter(tmp_path, engine, k=0, mode=mode)
    [request] = requests(1)
    plain = engine.run([(request, PLAIN)])[0][0]
    none = engine.run([(request, Parts(own, budget=4))])[0][0]
    assert none.tokens == plain.tokens
    assert (none.usage.forwards, none.usage.computed_tokens) == (plain.usage.forwards, plain.usage.computed_tokens)
    assert own.max_nodes(9) == 0


def test_the_cache_holds_the_same_for_any_number_of_guesses(tmp_path):
    found = {}
    for k in (0, 1, 3):
        for mode in MODES:
            engine = tiny.engine()
            own = drafter(tmp_path, engine, k=k, mode=mode)
            [request] = requests(1)
            engine.add(request, Parts(own, budget=4))
            engine.step()
            while len(engine.scheduler.running[0].tokens) < 12:
                engine.step()
            row = engine.scheduler.running[0]
            assert row.cache.length == len(row.tokens) - 1
            n = 10
            found[k, mode] = row.cache.slab[:, :, :, :n].clone()
            assert row.cache.positions[:n].tolist() == list(range(n))
    first = found[0, "fused"]
    assert all(torch.allclose(one, first, atol=1e-4) for one in found.values())


def test_when_the_cache_is_nearly_full_it_goes_on_without(tmp_path):
    for mode in MODES:
        engine = tiny.engine()
        own = drafter(tmp_path, engine, mode=mode)
        request = requests(1)[0]
        tight = [(type(request)(tuple(range(1, 45)), request.sampling), Parts(own, budget=4))]
        assert engine.run(tight)[0][0].tokens == engine.run([(tight[0][0], PLAIN)])[0][0].tokens  # 44 + 14 + 4 of 64 slots


def test_maps_learn_from_a_targets_texts_and_beat_heads_on_its_last_state(tmp_path):
    from hasten.models.heads import MedusaHeads
    from hasten.train import ahead, features

    engine, told = trained_texts()
    target = engine.backbone
    learnt, held = told.split(8)
    made = TransferMaps(target, torch.arange(tiny.VOCAB), (1, 1, 1))
    config = ahead.Config(steps=60, tokens=300, lr=3e-3, warmup=5, share=0.5)
    data, last = (ahead.Marked(part, target, made, config, False) for part in (learnt, held))
    before = ahead.agreement(target, made, last)
    ahead.fit(made, target, data, config)
    after = ahead.agreement(target, made, last)
    assert after[0] > before[0] + 0.3
    assert after[0] >= after[2]
    heads = MedusaHeads(target, torch.arange(tiny.VOCAB), 3)
    states = [[one for batch in features.features(target, part, 300) for one in batch] for part in (learnt, held)]
    few = features.Config(steps=60, tokens=300, lr=3e-3, warmup=5)
    features.fit(heads, target, states[0], few, loss=features.medusa_loss)
    assert after[0] > features.medusa_loss(heads, target, *features.pad(states[1]), few, None)[1][0]
    path = stored(tmp_path, made, target)
    own = HiddenTransfer(Config(path, ranks=1, nodes=3), context(engine))
    asked = [type(one)(tuple(ids[:4].tolist()), one.sampling) for (ids, _), one in zip(held.each(), requests(8))]
    drafted = [outs[0] for outs in engine.run([(one, Parts(own, budget=3)) for one in asked])]
    assert [out.tokens for out in drafted] == texts(engine, None, asked)
    assert sum(13 for _ in drafted) / sum(out.usage.forwards for out in drafted) >= 1.3


def test_wrong_files_and_settings_are_refused(tmp_path):
    engine = tiny.engine()
    target = engine.backbone
    path = stored(tmp_path, maps(target), target)
    assert load_maps(path, target).at == (1, 2, 2)
    with pytest.raises(ConfigError, match="trained for model"):
        load_maps(path, tiny.model(seed=3))
    with pytest.raises(ConfigError, match="kind 'eagle', not 'hidden-transfer'"):
        load_maps(saved(tmp_path, "eagle", target), target)
    with pytest.raises(ConfigError, match="at most the 3 maps"):
        HiddenTransfer(Config(path, k=4), context(engine))
    with pytest.raises(ConfigError, match="no weights"):
        HiddenTransfer(Config(), context(engine))
    for layers in ((2, 1), (4,), (-1,)):
        with pytest.raises(ConfigError, match=r"layers = .*in \[0, 3\]"):
            TransferMaps(target, torch.arange(9), layers)
    with pytest.raises(ConfigError, match="count"):
        TransferMaps(target, torch.arange(9), ())
    for knobs in ({"k": -1}, {"k": 17}, {"mode": "both"}, {"nodes": 0}, {"ranks": 33}, {"floor": 1.0}):
        with pytest.raises(ConfigError, match=f"hidden-transfer.{next(iter(knobs))}"):
            Config(**knobs)
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        facts, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for layers in ("1,2", "1,x,2", ""):
        save_file(state, tmp_path / "bad.safetensors", {**facts, "layers": layers})
        with pytest.raises(FormatError, match="layers"):
            load_maps(tmp_path / "bad.safetensors", target)
    save_file({**state, "maps.bias": state["maps.bias"][:9]}, tmp_path / "bad.safetensors", facts)
    with pytest.raises(FormatError, match=r"maps\.bias has shape"):
        load_maps(tmp_path / "bad.safetensors", target)
    save_file({"kept": state["kept"]}, tmp_path / "bad.safetensors", facts)
    with pytest.raises(FormatError, match=r"missing maps\.weight"):
        load_maps(tmp_path / "bad.safetensors", target)
    assert facts["target"] == identity(target, "")


def test_two_that_add_placeholders_are_not_combined(tmp_path):
    from ahead import inputs

    engine = tiny.engine()
    own = drafter(tmp_path, engine, mode="fused")
    other = Lud(LudConfig(stored(tmp_path, inputs(engine.backbone), engine.backbone)), context(engine))
    with pytest.raises(IncompatibleError, match="both add placeholders"):
        Union([own, other])
