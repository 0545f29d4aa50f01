"""One server without keys and one with two, shared by the tests of this folder."""

from __future__ import annotations

import pytest
from chat_model import write_model
from served import KEY, OTHER_KEY, serving

import hasten
from hasten.serve.settings import Settings


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny chat model of random weights, which always answers max_tokens tokens."""
    return hasten.load(str(write_model(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="session")
def server(tiny):
    """Serves the tiny chat model and mini-dlm to everybody on this machine."""
    with serving({"tiny": tiny, "mini-dlm": lambda: hasten.load("mini-dlm")}) as served:
        yield served


@pytest.fixture(scope="session")
def locked(tmp_path_factory):
    """A server of its own model that asks for a key; two keys open it."""
    llm = hasten.load(str(write_model(tmp_path_factory.mktemp("locked"))))
    with serving({"tiny": llm}, Settings(keys=(KEY, OTHER_KEY))) as served:
        yield served
