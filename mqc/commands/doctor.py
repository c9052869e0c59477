"""``mqc doctor``: what is installed, what is missing, and what that means."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mqc import __version__
from mqc.commands import _common as common
from mqc.errors import MqcError

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "networkx", "pillow")
CPU_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8"),
    *("asimddp", "i8mm"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``level`` is ok, note (something optional) or problem."""

    what: str
    value: str
    level: str = "ok"
    meaning: str = ""


def findings() -> list[Finding]:
    """Everything, in reading order. Imports nothing heavy but onnxruntime."""
    return [
        Finding("mqc", __version__),
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
        *(_package(name) for name in PACKAGES),
        _torchvision(),
        *_onnxruntime(),
        _onnx_library(),
        _onnx_cuda_library(),
        _cpu(),
        _gpu(),
        _nvcc(),
        _cuda_kernels(),
        _cache(),
    ]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package(name: str) -> Finding:
    found = _installed(name)
    if found is None:
        return Finding(name, "missing", "problem", "pip install mqc installs it")
    return Finding(name, found)


def _torchvision() -> Finding:
    found = _installed("torchvision")
    if found is not None:
        return Finding("torchvision", found)
    return Finding(
        "torchvision",
        "missing",
        "note",
        "images go through transformers' Pillow processors, videos through torch alone",
    )


def _onnxruntime() -> list[Finding]:
    names = [n for n in ("onnxruntime", "onnxruntime-gpu") if _installed(n)]
    if not names:
        return [
            Finding(
                "onnxruntime",
                "missing",
                "problem",
                "artifacts of target onnx cannot run: pip install 'mqc[cpu]' or 'mqc[gpu]'",
            )
        ]
    try:
        import onnxruntime
    except ImportError as error:
        return [Finding(names[0], "broken", "problem", f"it cannot be imported: {error}")]
    providers = ", ".join(
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    )
    both = "both packages are installed and share a folder: uninstall one" if names[1:] else ""
    return [
        Finding(" + ".join(names), str(onnxruntime.__version__), "problem" if both else "ok", both),
        Finding("execution providers", providers),
    ]


_EMULATED = "its kernels for Arm are tested under emulation, and were never timed on an Arm machine"


def _is_arm() -> bool:
    return platform.machine() in ("aarch64", "arm64")


def _onnx_library() -> Finding:
    from mqc.backends.onnx.library import build_hint, ops_library

    what = "onnx operator library"
    try:
        path = ops_library()
    except MqcError as error:
        return Finding(what, "broken", "problem", f"{error}: {error.hint}")
    if path is not None:
        return Finding(what, str(path), *(("note", _EMULATED) if _is_arm() else ()))
    missing = [name for name in ("c++", "cmake") if shutil.which(name) is None]
    value = f"missing ({' and '.join(missing)} not found)" if missing else "missing"
    meaning = f"onnx artifacts run through their bodies, more slowly: {build_hint()}"
    return Finding(what, value, "note", meaning)


def _onnx_cuda_library() -> Finding:
    """The operators for onnxruntime's CUDA provider, which need the kernels' library as well."""
    from mqc.backends.onnx.library import ops_library
    from mqc.cuda.library import library_path

    what = "onnx cuda operators"
    try:
        path = ops_library("cuda")
    except MqcError as error:
        return Finding(what, "broken", "problem", f"{error}: {error.hint}")
    lacks = [] if path is not None else ["this library (make native)"]
    if library_path() is None:
        lacks.append("the cuda kernels")
    if not _has_cuda_provider():
        lacks.append("onnxruntime-gpu with a CUDA provider")
    if lacks:
        meaning = f"onnx artifacts cannot use a GPU's kernels: missing {', '.join(lacks)}"
        return Finding(what, "missing" if path is None else str(path), "note", meaning)
    return Finding(what, str(path))


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _cpu() -> Finding:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
            elif key.strip() == "model name":
                name = value.strip()
    except OSError:
        pass
    known = [flag for flag in CPU_FLAGS if flag in flags]
    count = len(os.sched_getaffinity(0))
    text = f"{name}, {count} cores; {' '.join(known) or 'no known vector extension'}"
    if flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}:
        return Finding("cpu", text, "note", "no 8-bit dot product instructions: int8 is slow here")
    return Finding("cpu", text)


def _gpu() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    text = _output(query)
    if text is None:
        return Finding("gpu", "none", "note", "nothing can run on target cuda here")
    return Finding("gpu", "; ".join(text.splitlines()))


def _nvcc() -> Finding:
    path = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    if path is None and os.access(f"{home}/bin/nvcc", os.X_OK):
        path = f"{home}/bin/nvcc"
    text = _output([path, "--version"]) if path else None
    if text is None:
        return Finding("nvcc", "none", "note", "the CUDA kernels cannot be built here")
    release = next((line for line in text.splitlines() if "release" in line), text.strip())
    return Finding("nvcc", f"{release.split('release')[-1].strip()} ({path})")


def _cuda_kernels() -> Finding:
    from mqc.cuda.library import KernelError, Library, library_path

    path = library_path()
    if path is None:
        remedy = "with nvcc 12.5 or later: python -m mqc.cuda.build"
        return Finding("cuda kernels", "not built", "note", remedy)
    try:
        library = Library(path)
    except KernelError as error:
        return Finding("cuda kernels", "broken", "problem", str(error))
    return Finding("cuda kernels", str(library.path))


def _cache() -> Finding:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    path = Path(home).expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    return Finding("hub cache", f"{path}{' (offline)' if offline else ''}")


def _output(command: list[str]) -> str | None:
    """Stdout of a command, or None where it is not there or fails."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, encoding="utf-8"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def doctor_command(as_json: common.Json = False) -> None:
    """Show versions, hardware, and what missing parts mean. Exits with 1 if something must be done.

    Example: mqc doctor
    """
    report = findings()
    if as_json:
        common.print_json([vars(finding) for finding in report])
    else:
        marks = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
        rows = [[f.what, f.value, marks[f.level], f.meaning] for f in report]
        common.stdout().print(common.table("mqc doctor", ["what", "found", "", "meaning"], rows))
    if any(finding.level == "problem" for finding in report):
        import typer

        raise typer.Exit(1)
