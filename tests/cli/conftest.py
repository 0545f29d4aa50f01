"""A tiny real model on disk and ways to run `hasten`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from chat_model import write_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chat model with a window of 512 tokens."""
    return str(write_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with a window it does not fill while a test waits."""
    return str(write_model(tmp_path_factory.mktemp("endless"), window=100_000))


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model without a chat template."""
    return str(write_model(tmp_path_factory.mktemp("bare"), template=None))


@dataclass(frozen=True)
class Result:
    """What one call of the command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def hasten(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command in this process: `hasten("run", model, "Hi", stdin=b"")`."""
    from hasten.cli import main

    def call(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["hasten", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        monkeypatch.setenv("COLUMNS", "100")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call
