"""One server without keys and one with two, shared by the tests of this folder."""

from __future__ import annotations

import pytest
from chat_model import write_model
from live import KEY, OTHER_KEY, ended_model, serving

import hasten
from hasten.serve.settings import Settings


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny chat model of random weights, which always answers max_tokens tokens."""
    return hasten.load(str(write_model(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="session")
def server(tiny, tmp_path_factory):
    """Serves the tiny chat model, one whose answers can end, and mini-dlm to everybody on this machine."""
    ended = hasten.load(str(ended_model(tmp_path_factory.mktemp("ended"))))
    with serving({"tiny": tiny, "ended": ended, "mini-dlm": lambda: hasten.load("mini-dlm")}) as served:
        yield served


@pytest.fixture(scope="session")
def locked(tmp_path_factory):
    """A server of its own model that asks for a key; two keys open it."""
    llm = hasten.load(str(write_model(tmp_path_factory.mktemp("locked"))))
    with serving({"tiny": llm}, Settings(keys=(KEY, OTHER_KEY))) as served:
        yield served
