"""The kernel library compiled for the CPU: kernels run on an emulator of CUDA blocks."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shared import locked

from mqc.cuda.library import Library

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "cuda"
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
FLAGS = [
    *"-std=c++17 -O2 -g0 -fPIC -fvisibility=hidden -ffp-contract=off -DMQC_EMULATE".split(),
    *"-Wall -Wextra -Werror -Wno-unknown-pragmas".split(),
    # A GPU faults on accesses that are not aligned to their size; a CPU does not.
    *"-fsanitize=alignment,bounds -fno-sanitize-recover=all".split(),
]


def compile_emulated() -> Path:
    """Compile every launcher and the emulator; the result is kept by the hash of the sources."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: the kernels cannot be run on the CPU emulator")
    sources = [*sorted((CUDA / "csrc").glob("*.cu")), *sorted(EMULATOR.glob("*.cpp"))]
    headers = [p for d in (CUDA, EMULATOR) for e in ("*.h", "*.cuh") for p in sorted(d.rglob(e))]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in [*sources, *headers]:
        digest.update(path.read_bytes())
    out = Path(tempfile.gettempdir()) / f"mqc-emulated-{os.getuid()}-{digest.hexdigest()[:16]}.so"
    with locked(out.with_suffix(".lock")):  # compiled once, however many processes test
        if not out.is_file():
            _compile(compiler, sources, out)
    return out


def _compile(compiler: str, sources: list[Path], out: Path) -> None:
    include = [f"-I{CUDA / 'include'}", f"-I{CUDA / 'csrc'}", f"-I{EMULATOR}"]
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> str:
            target = Path(folder) / f"{source.name}.o"
            command = [
                compiler,
                *FLAGS,
                *include,
                "-x",
                "c++",
                "-c",
                str(source),
                "-o",
                str(target),
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{source.name}:\n{result.stderr[:4000]}"
            return str(target)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = Path(folder) / "linked.so"
        link = [compiler, "-shared", "-fsanitize=alignment,bounds", *objects, "-o", str(linked)]
        subprocess.run(link, check=True)
        shutil.copy(linked, f"{out}.{os.getpid()}")
        Path(f"{out}.{os.getpid()}").replace(out)


class Emulated(Library):
    """The library on the CPU, and what the tests need beside the C ABI."""

    def configure(self, seed: int, asynchrony: int = 2, arch: int = 90, sms: int = 4) -> None:
        """Choose a schedule (0 early, 1 late, 2 random asynchronous operations; 3 runs no kernel)
        and a device."""
        self.native.mqc_emulator_configure(ctypes.c_uint64(seed), asynchrony, arch, sms)
