"""The profile of pass times: measured in bounded time, kept, read back, and used by the engine's budget."""

from __future__ import annotations

import json
import time

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from hasten.kernels import library
from hasten.models import cost
from hasten.models.cost import PassTimes
from hasten.pass_cost import PassCost

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    return tmp_path


def test_it_measures_every_size_and_stops_in_time():
    started = time.perf_counter()
    times = cost.measure(tiny.native(tiny.model()), budget_s=0.3)
    assert time.perf_counter() - started < 5  # a generous bound: other work may be going on
    for table in times.times.values():
        assert set(table) <= set(cost.SIZES)
        assert 1 in table
        assert all(seconds > 0 for seconds in table.values())


def test_a_profile_is_kept_and_read_back_and_a_damaged_one_made_anew(home, monkeypatch):
    native = tiny.native(tiny.model())
    first = cost.profile(native, "tiny")
    (file,) = (home / "profiles").iterdir()
    monkeypatch.setattr(cost, "measure", lambda model: pytest.fail("measured again"))
    assert cost.profile(native, "tiny").times == first.times
    monkeypatch.undo()
    monkeypatch.setenv("HASTEN_HOME", str(home))
    for damage in (
        "",
        "[]",
        "{",
        json.dumps({"other": {}}),
        json.dumps({key: {"a": 1} for key in json.loads(file.read_text())}),
    ):
        file.write_text(damage)
        assert cost.profile(native, "tiny").times
    # other settings have a profile of their own in the same file
    cost.profile(tiny.native(tiny.model(), activations="int8"), "tiny")
    assert len(json.loads(file.read_text())) >= 2


def test_a_folder_that_cannot_be_written_costs_only_a_measurement(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "file"))
    assert cost.profile(tiny.native(tiny.model()), "tiny").times


TIMES = PassTimes({64: {1: 1.0, 2: 1.5, 4: 2.0}, 1024: {1: 2.0, 2: 2.5, 4: 3.0}})


def test_what_was_measured_is_given_back_and_the_rest_interpolated():
    assert TIMES(1, 64) == 1.0
    assert TIMES(4, 1024) == 3.0
    assert TIMES(3, 64) == 1.75
    assert TIMES(8, 64) == 3.0  # by the slope of the last two sizes
    assert TIMES(1, 544) == pytest.approx(1.5)
    assert TIMES.table(64) == {1: 1.0, 2: 1.5, 4: 2.0}


@given(st.integers(1, 200), st.integers(0, 8000))
def test_more_tokens_and_longer_contexts_never_cost_less(tokens, context):
    assert TIMES(tokens + 1, context) >= TIMES(tokens, context) - 1e-12
    assert TIMES(tokens, context + 10) >= TIMES(tokens, context) - 1e-12


def test_the_budget_starts_from_a_profile_and_is_corrected_by_passes():
    known = PassCost()
    known.expect(1, {1: 1.0, 4: 2.0})
    assert known(1, 1) == 1.0
    assert known(1, 2) == pytest.approx(4 / 3)
    for _ in range(8):
        known.record(1, 4, 5.0)
    assert known(1, 4) == 5.0
    known.expect(1, {4: 1.0})  # what passes have shown is not overruled
    assert known(1, 4) == 5.0
