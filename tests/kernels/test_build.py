"""Without a compiler, or with a library that does not fit, hasten runs on torch and says why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_model import write_model

import hasten
from hasten.errors import ConfigError, UnsupportedError
from hasten.kernels import library
from hasten.models.load import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """The library is looked for where there is none."""
    library._load.cache_clear()
    monkeypatch.setattr(library, "PLACES", [tmp_path])
    yield tmp_path
    monkeypatch.undo()
    library._load.cache_clear()


def test_a_machine_without_a_compiler_configures_and_builds_nothing(tmp_path):
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None or sys.platform != "linux":
        pytest.skip("needs cmake and ninja on Linux")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in (cmake, ninja):
        (tools / Path(tool).name).symlink_to(tool)
    command = [str(tools / "cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tools)})
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stderr
    built = subprocess.run(
        [str(tools / "cmake"), "--build", str(tmp_path / "build")], capture_output=True, env={"PATH": str(tools)}
    )
    assert built.returncode == 0
    assert not list((tmp_path / "build").rglob("libhasten_native*"))


def test_without_the_library_models_run_on_torch(no_library, tmp_path):
    folder = write_model(tmp_path)
    llm = hasten.load(folder, cache_bytes=20_000_000)
    assert llm.model.name == "torch"
    assert llm.generate("Hello", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4
    assert "without a C++ compiler" in library.missing()
    with pytest.raises(ConfigError, match=r"native.*not built"):
        load(folder, backbone="native")
    with pytest.raises(ConfigError, match=r"activations.*not built"):
        load(folder, activations="int8")
    with pytest.raises(UnsupportedError, match="missing"):
        library.native()


def test_doctor_says_what_is_missing(no_library, capsys):
    from hasten.cli.doctor import doctor

    doctor(json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["native"] == "missing"
    assert any("without a C++ compiler" in note for note in facts["notes"])


@pytest.mark.skipif(not library.available() or sys.platform != "linux", reason="needs the native library")
@pytest.mark.parametrize("damage", ["empty", "other"])
def test_a_library_that_does_not_fit_is_not_used(no_library, damage):
    target = no_library / "libhasten_native.so"
    if damage == "empty":
        target.write_bytes(b"")
    else:  # a library that has none of our functions
        source = no_library / "other.c"
        source.write_text("int hasten_abi(void) { return 999; }")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        subprocess.run([compiler, "-shared", "-o", str(target), str(source)], check=True)
    assert not library.available()
    assert "cannot be loaded" in library.missing()
