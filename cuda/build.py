"""Build libmqc_cuda.so with nvcc: ``python -m mqc.cuda.build``.

One shared library with a plain C ABI (include/mqc_cuda.h): machine code for sm_80, sm_89 and
sm_90a, CUDA's runtime inside, no symbol of a framework. CMake calls this module too. Objects and
the compiler's messages are kept in a work folder; what is newer than its sources stays.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mqc.errors import MqcError

HERE = Path(__file__).resolve().parent
FILE_NAME = "libmqc_cuda.so"
ARCHITECTURES = ("80", "89", "90a")
# Nothing of sm_89 is used that sm_80 has not: one compilation serves both, ptxas runs for each.
TARGETS = (
    "-gencode=arch=compute_80,code=[sm_80,sm_89]",
    "-gencode=arch=compute_90a,code=sm_90a",
)
MIN_NVCC = (12, 5)
COMPILE_FLAGS = (
    *"-std=c++17 -O3 -Xptxas -v --Werror all-warnings".split(),
    *"-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas,-ffp-contract=off".split(),
)
LINK_FLAGS = (
    *"-shared --cudart static -Xlinker --exclude-libs,ALL -Xlinker -s".split(),
    *"-Xcompiler -static-libstdc++,-static-libgcc".split(),
)


class BuildError(MqcError):
    """nvcc is missing, too old, or refused a source."""


@dataclass(frozen=True)
class KernelReport:
    """What ptxas said of one kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def find_nvcc() -> Path | None:
    """nvcc from $CUDACXX, $CUDA_HOME, the PATH or /usr/local/cuda; None where there is none."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for candidate in (os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc"):
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    return None


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """Release of an nvcc, e.g. (13, 0)."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise BuildError(f"{nvcc} does not tell its version")
    return int(found[1]), int(found[2])


def _require_nvcc() -> Path:
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "nvcc was not found",
            hint="install CUDA's compiler, or name it with CUDACXX or CUDA_HOME",
        )
    if nvcc_version(nvcc) < MIN_NVCC:
        raise BuildError(
            f"{nvcc} is {nvcc_version(nvcc)}, the kernels need {MIN_NVCC}",
            hint="name a newer one with CUDACXX",
        )
    return nvcc


def _run(command: Sequence[str | Path], log: Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    text = result.stdout + result.stderr
    if result.returncode:
        errors = [line for line in text.splitlines() if "error" in line.lower()] or [text]
        raise BuildError(f"nvcc failed ({log.stem}):\n" + "\n".join(errors[:10]))
    log.write_text(text, encoding="utf-8")


def build(out: Path, work: Path, *, jobs: int | None = None, nvcc: Path | None = None) -> Path:
    """Build the library as `out`; objects and logs go to `work`.

    Raises:
        BuildError: where nvcc is missing or too old, or a source does not compile.
    """
    compiler = nvcc or _require_nvcc()
    work.mkdir(parents=True, exist_ok=True)
    headers = [path for kind in ("*.h", "*.cuh") for path in HERE.rglob(kind)]
    newest_header = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
    include = [f"-I{HERE / 'include'}", f"-I{HERE / 'csrc'}"]

    def compile_one(source: Path) -> Path:
        target, log = work / f"{source.stem}.o", work / f"{source.stem}.log"
        newest = max(newest_header, source.stat().st_mtime)
        if not (target.is_file() and log.is_file() and log.stat().st_mtime > newest):
            _run([compiler, *COMPILE_FLAGS, *TARGETS, *include, "-c", source, "-o", target], log)
        return target

    # The longest first, so that none of them is left over at the end.
    slow = ("activation", "attention", "linear")
    sources = sorted(
        (HERE / "csrc").glob("*.cu"),
        key=lambda path: (*(not path.stem.startswith(name) for name in slow), path.name),
    )
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = work / FILE_NAME
    _run([compiler, *LINK_FLAGS, TARGETS[0], *objects, "-o", linked], work / "link.log")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}")
    shutil.copy(linked, part)
    part.replace(out)  # a process that has the old file mapped keeps it
    return out


_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def reports(work: Path) -> list[KernelReport]:
    """ptxas' figures of every kernel in the logs of a build."""
    found = []
    for log in sorted(work.glob("*.log")):
        for match in _KERNEL.finditer(log.read_text(encoding="utf-8")):
            spills = int(match["stores"]) + int(match["loads"])
            found.append(
                KernelReport(
                    match["name"],
                    match["arch"],
                    int(match["registers"]),
                    spills,
                    int(match["stack"]),
                )
            )
    return found


def _work_folder() -> Path:
    """build/cuda of a checkout; elsewhere (an installed package) a temporary folder."""
    if (HERE.parent / "pyproject.toml").is_file():
        return HERE.parent / "build" / "cuda"
    return Path(tempfile.gettempdir()) / f"mqc-cuda-build-{os.getuid()}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the CUDA kernel library.")
    parser.add_argument("--out", type=Path, default=HERE / FILE_NAME, help="the library")
    parser.add_argument("--work", type=Path, default=_work_folder(), help="objects and logs")
    parser.add_argument("--jobs", type=int, default=None, help="compilers at a time")
    parser.add_argument("--optional", action="store_true", help="a failure is a warning")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        out = build(options.out, options.work, jobs=options.jobs)
    except BuildError as error:
        if not options.optional:
            sys.exit(f"error: {error}")
        print(f"warning: going on without the CUDA kernels: {error}", file=sys.stderr)
        return
    kernels = reports(options.work)
    spills = sum(report.spill_bytes > 0 for report in kernels)
    size = out.stat().st_size / 2**20
    print(
        f"{out}: {size:.1f} MiB, {len(kernels)} kernels for sm_{', sm_'.join(ARCHITECTURES)}, "
        f"{spills} with spills, {time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
