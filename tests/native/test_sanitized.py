"""The library under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import native_library as native
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
HERE = Path(__file__).parent


def runtime(compiler: str, name: str) -> str | None:
    """The path of a sanitizer's runtime, which has to be loaded before Python."""
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else None


@native.needs_library
@pytest.mark.slow
def test_kernels_and_binding_are_clean() -> None:
    """The other tests of this folder in one process with the instrumented library."""
    compiler, cmake = shutil.which("g++"), shutil.which("cmake")
    if compiler is None or cmake is None:
        pytest.skip("needs g++ and cmake")
    libraries = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    if None in libraries:
        pytest.skip("this compiler has no sanitizers")
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DMQC_SANITIZE=ON", "-DMQC_CUDA=OFF"]
    flags = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    headers = ROOT / "build" / "native" / "onnxruntime-dev" / "usr" / "include"
    if headers.is_dir() and "MQC_ORT_INCLUDE" not in os.environ:
        flags.append(f"-DMQC_ORT_INCLUDE={headers}")
    build = [cmake, "--build", str(BUILD), "--parallel", "2", "--target", "mqc_onnx"]
    for command in ([*configure, *flags], build):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    environment = {
        **os.environ,
        "MQC_ONNX_OPS": str(BUILD / "backends" / "onnx" / "native" / "libmqc_onnx.so"),
        "LD_PRELOAD": " ".join(str(library) for library in libraries),
        # Python itself frees little at its end
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    # Whole models add minutes of Python and no call that the other tests do not make; what runs
    # emulated is another build; and the sanitizer keeps freed memory, so that none can be counted.
    skipped = (Path(__file__).name, "test_models.py", "test_arm.py", "test_mapped_weights.py")
    others = sorted(str(p) for p in HERE.glob("test_*.py") if p.name not in skipped)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    result = subprocess.run(
        [*command, *others], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert " passed" in result.stdout
