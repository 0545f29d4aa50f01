"""Nothing that arrives as data runs: weights, side files, requests, and what the dependencies bring along."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys

import checkpoints
import pytest
from chat_model import write_model
from shape.source_tree import ROOT, imports, package

from hasten.errors import UnsupportedError
from hasten.models.load import load

FILES = package()
PICKLE = (
    b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
)


class Opened:
    """Names of the files that this process opens inside the block; an audit hook cannot be removed, so it rests outside."""

    def __init__(self) -> None:
        self.names: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, given: tuple) -> None:
        if event == "open" and self.names is not None and isinstance(given[0], str):
            self.names.append(given[0])

    def __enter__(self) -> list[str]:
        self.names = []
        return self.names

    def __exit__(self, *error: object) -> None:
        self.names = None


@pytest.fixture(scope="session")
def opened():
    return Opened()


def test_cve_2025_32434_pickled_weights_are_refused_with_a_way_out(tmp_path, opened):
    """And CVE-2026-24747: weights_only was by-passed twice, so there is no such fallback."""
    checkpoints.build("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(PICKLE)
    with opened as names, pytest.raises(UnsupportedError, match="safetensors"):
        load(tmp_path)
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".pth"))]


def test_cve_2024_50050_no_sockets_between_processes():
    """ShadowMQ (CVE-2025-32444, -47277, -29783, -30165, -10164, CVE-2026-3059, -3060, -3989): pickles over ZeroMQ."""
    for file in FILES:
        targets = {entry.target.partition(".")[0] for entry in imports(file)}
        assert not targets & {"zmq", "multiprocessing", "pickle", "cloudpickle", "socketserver", "xmlrpc"}, file.path
        if "socket" in targets:
            assert file.path.startswith(("serve/", "bench/", "models/fetch"))


def test_cve_2026_22807_auto_map_never_runs(tmp_path, opened):
    """And CVE-2025-66448: code of a repository ran although nobody had trusted it."""
    write_model(tmp_path)
    ran = tmp_path / "ran"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "processing_evil.py", "__init__.py"):
        (tmp_path / name).write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((tmp_path / "config.json").read_text())
    names = {
        "AutoConfig": "configuration_evil.C",
        "AutoModel": "modeling_evil.M",
        "AutoModelForCausalLM": "modeling_evil.M",
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "auto_map": names, "custom_pipelines": {"x": {"impl": "modeling_evil.M"}}})
    )
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]}})
    )
    with opened as seen:
        load(tmp_path)
    assert not ran.exists()
    assert not [name for name in seen if name.endswith("_evil.py")]
    assert not [name for name in sys.modules if "evil" in name]


def test_cve_2024_3568_planted_side_files_are_never_opened(tmp_path, opened):
    """And CVE-2026-1839, CVE-2026-7669: tokenizers and training states came as pickles."""
    write_model(tmp_path)
    planted = [
        "rng_state.pth",
        "tokenizer.pkl",
        "optimizer.pt",
        "scheduler.pt",
        "training_args.bin",
        "tokenizer.model.pkl",
        "vocab.pkl",
    ]
    for name in planted:
        (tmp_path / name).write_bytes(PICKLE)
    with opened as names:
        load(tmp_path)
    assert any(path.endswith("tokenizer.json") for path in names)
    assert not [path for path in names if path.rpartition("/")[2] in planted]


def closure(stack: list[str]) -> set[str]:
    """Distributions that these require here, extras left out."""
    found: set[str] = set()
    while stack:
        one = re.sub(r"[-_.]+", "-", stack.pop()).lower()
        if one in found:
            continue
        found.add(one)
        try:
            needs = importlib.metadata.requires(one) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        stack += [re.split(r"[\s;<>=!~\[(]", need)[0] for need in needs if "extra ==" not in need]
    return found


def test_cve_2025_69872_no_dependency_pickles_for_a_living():
    """diskcache (through outlines) and cloudpickle came in with others; the closure of hasten's core has none of them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies = [")[1].split("]")[0]
    found = closure(re.findall(r'"([A-Za-z0-9._-]+)', text))
    assert {"torch", "fastapi", "llguidance", "jinja2"} <= found
    assert not found & {"diskcache", "cloudpickle", "dill", "joblib", "pyzmq", "outlines", "pickle5", "sqlitedict"}
    assert len(found) < 90, sorted(found)


def test_lm_eval_no_code_that_a_model_wrote_is_run():
    """Its --confirm_run_unsafe_code: one suite of the bench runs code, with a flag only (tests/bench/test_sandbox.py)."""
    from hasten.bench.cases import humaneval
    from hasten.errors import ConfigError

    users = {file.path for file in FILES if any(entry.target.startswith("subprocess") for entry in imports(file))}
    others = {"models/fetch.py", "bench/report.py", "bench/trained.py", "bench/peers.py", "bench/compare.py"}
    assert users <= {*others, "bench/sandbox.py"}
    callers = {file.path for file in FILES if any("bench.sandbox" in entry.target for entry in imports(file))}
    assert callers == {"bench/cases/humaneval.py"}
    with pytest.raises(ConfigError, match="run-code"):
        humaneval.ready(humaneval.suite.options)
