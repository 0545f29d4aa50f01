"""The native library under AddressSanitizer and UndefinedBehaviorSanitizer: its own tests, run against such a build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_kernels_and_passes_are_clean_under_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None or sys.platform != "linux":
        pytest.skip("needs g++ and cmake on Linux")
    library = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).exists():
        pytest.skip("this g++ has no AddressSanitizer")
    build = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DHASTEN_SANITIZE=ON", f"-DCMAKE_CXX_COMPILER={compiler}"]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "-j2"], check=True, capture_output=True)
    # the suite itself, with the library of that build; conftest reads the variable
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels/test_linear.py",
         "tests/kernels/test_pack.py", "tests/models/test_native.py", "-k", "not transformers and not rounded"],
        cwd=ROOT, capture_output=True, text=True,
        env={
            **os.environ, "LD_PRELOAD": library, "HASTEN_TEST_LIBRARY": str(tmp_path), "OMP_NUM_THREADS": "1",
            # Python and torch leak on purpose at exit, and hypothesis' examples take longer here
            "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "passed" in run.stdout
