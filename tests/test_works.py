"""The list of works: complete, well-formed, and in one piece with what has landed."""

from __future__ import annotations

import re

import pytest

import hasten
from hasten.errors import UnsupportedError
from hasten.registry import FOLDERS, modules, works

PLACES = {*FOLDERS, "train", "bench", "serve"}


def test_it_holds_every_work_once():
    slugs = [work.slug for work in works()]
    assert len(slugs) == len(set(slugs)) == 55  # 54 papers; one of them, 2509.23924, is two methods
    papers = [work.paper for work in works()]
    assert len(set(papers)) == 54
    assert slugs == sorted(slugs)


@pytest.mark.parametrize("work", works(), ids=lambda work: work.slug)
def test_an_entry_says_what_a_reader_wants_to_know(work):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", work.slug)
    assert re.fullmatch(r"\d{4}\.\d{5}", work.paper)
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", work.date)
    assert work.paper[:2] == work.date[2:4]
    assert work.paper[2:4] == work.date[5:]
    assert work.exactness in ("exact", "lossy", "model")
    assert work.folder in PLACES
    assert 40 <= len(work.claim) <= 160
    assert work.claim.endswith(".")
    assert len(work.title) > 20
    assert work.show


def test_state_is_what_the_package_holds():
    for work in works():
        assert work.state == ("works" if work.slug in modules() else "planned")
    planned = next(work for work in works() if work.state == "planned")
    with pytest.raises(UnsupportedError, match="planned"):
        hasten.registry.module(planned.slug)
