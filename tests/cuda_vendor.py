"""NVIDIA's headers and the program that compares the kernels with them.

CUTLASS's are put beside the packages by tools/setup_venv.sh where nvcc is (elsewhere: the package
nvidia-cutlass, or the folder MQC_CUTLASS_INCLUDE); CUDA's come with nvcc. Without either, the tests
skip.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from mqc.cuda.build import find_nvcc

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests" / "cuda" / "cute"
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
FLAGS = [
    *"-std=c++17 -O1 -g0 -ffp-contract=off -DMQC_EMULATE".split(),
    *"-Wall -Wextra -Werror -Wno-unknown-pragmas".split(),
]


@dataclass(frozen=True)
class Vendor:
    """Folders of headers."""

    compiler: str
    cutlass: Path
    cuda: list[Path]


def cutlass_headers() -> Path | None:
    """CUTLASS's include folder."""
    if folder := os.environ.get("MQC_CUTLASS_INCLUDE"):
        return Path(folder)
    folders = [Path(sys.prefix) / "share" / "nvidia-cutlass" / "cutlass_library"]
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent)
    found = [folder / "source" / "include" for folder in folders]
    return next((folder for folder in found if (folder / "cute/layout.hpp").is_file()), None)


def find_vendor() -> Vendor:
    """The headers; skips where one of them is missing."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    cutlass, nvcc = cutlass_headers(), find_nvcc()
    if compiler is None:
        pytest.skip("no C++ compiler")
    if cutlass is None:
        pytest.skip("no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0")
    if nvcc is None:
        pytest.skip("no nvcc: CuTe's headers need CUDA's")
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lines = [ln for ln in told.splitlines() if re.match(r"#\$ (SYSTEM_)?INCLUDES=", ln)]
    folders = [Path(p) for p in re.findall(r'"(?:-I)?(/[^"]*)"', "\n".join(lines))]
    assert any((folder / "cuda.h").is_file() for folder in folders), told
    return Vendor(compiler, cutlass, folders)


def compile_witness(vendor: Vendor) -> Path:
    """The program of tests/cuda/cute; kept by the hash of what it is made of."""
    sources = [*sorted(CASES.glob("*.cpp")), EMULATOR / "emulator.cpp"]
    ours = [p for kind in ("*.h", "*.cuh", "*.cu") for p in sorted((ROOT / "cuda").rglob(kind))]
    digest = hashlib.sha256(" ".join([*FLAGS, str(vendor)]).encode())
    for path in [*sources, *ours, CASES / "witness.h", EMULATOR / "emulator.h"]:
        digest.update(path.read_bytes())
    out = Path(tempfile.gettempdir()) / f"mqc-witness-{os.getuid()}-{digest.hexdigest()[:16]}"
    with Path(f"{out}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one test run build it once
        if not out.is_file():
            _build(vendor, sources, out)
    return out


def _build(vendor: Vendor, sources: list[Path], out: Path) -> None:
    mine = [ROOT / "cuda" / "include", ROOT / "cuda" / "csrc", EMULATOR]
    system = [flag for p in [vendor.cutlass, *vendor.cuda] for flag in ("-isystem", str(p))]
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            include = [*(f"-I{p}" for p in mine), *system]
            command = [vendor.compiler, *FLAGS, *include, "-c", str(source), "-o", target]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{source.name}:\n{result.stderr[:4000]}"
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = Path(f"{out}.{os.getpid()}")
        subprocess.run([vendor.compiler, *objects, "-o", str(linked)], check=True)
        linked.replace(out)
