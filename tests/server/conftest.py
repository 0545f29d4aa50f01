"""A server of a tiny chat model whose window is long enough to be left in the middle of an answer."""

from __future__ import annotations

import pytest
from chat_model import write_model
from live import serving

import hasten


@pytest.fixture(scope="session")
def long_server(tmp_path_factory):
    """Serves "tiny" with a window of 4,096."""
    llm = hasten.load(str(write_model(tmp_path_factory.mktemp("long"), window=4096)))
    with serving({"tiny": llm, "mini-dlm": lambda: hasten.load("mini-dlm")}) as served:
        yield served
