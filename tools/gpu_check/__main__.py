"""Command line of the GPU check; see the package."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from mqc.cuda import build
from mqc.cuda.library import PATH_VARIABLE, library_path
from tools.gpu_check import ROOT, parts
from tools.gpu_check.common import Recorder
from tools.gpu_check.model import PREPARED, TINY
from tools.gpu_check.prepare import FOLDER, prepare
from tools.gpu_check.table import render, summary

SANITIZER_SECONDS = 75
ROOM = 1 << 29
"""Bytes that a build of the library needs at most."""


def _library(given: Path | None, work: Path) -> Path:
    """The library to check: the one given, a fresh build (one that stands may be older than the
    sources), or where there is no compiler that can build it the one that stands."""
    found, why = given, "no nvcc to build it"
    if found is None and build.find_nvcc() is not None:
        start = time.monotonic()
        try:
            found = build.build(work / build.FILE_NAME, work / "objects")
            print(f"built {build.FILE_NAME} in {time.monotonic() - start:.0f} s", flush=True)
        except build.BuildError as error:
            why = f"it cannot be built: {error}"
    if found is None:
        found = library_path()
        print(f"{why}; checking {found}", flush=True)
    if found is None or not found.is_file():
        sys.exit(f"error: no libmqc_cuda.so, and {why}: name one with --library")
    return found.resolve()


def _command(name: str, library: Path, log: Path, seconds: float) -> list[str]:
    base = [sys.executable, "-m", "tools.gpu_check", "--part", name, "--library", str(library)]
    return [*base, "--log", str(log), "--seconds", str(seconds)]


def _wait(process: subprocess.Popen[bytes], log: Path, seconds: float, stall: float) -> str:
    """Wait for a part; "" where it ended by itself, else why it was ended."""
    start = changed = time.monotonic()
    size = 0
    while process.poll() is None:
        time.sleep(0.2)
        now, written = time.monotonic(), log.stat().st_size if log.is_file() else 0
        if written != size:
            size, changed = written, now
        # The part stops by itself when its time is up; these limits are for hangs.
        if now - start > seconds + 30 or now - changed > stall:
            process.kill()
            process.wait()
            return f"no end after {now - start:.0f} s, nothing new for {now - changed:.0f} s"
    return ""


def _run(
    command: list[str],
    log: Path,
    seconds: float,
    *,
    stall: float = parts.STALL,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a part in its own process: its results, and where it ended if it did not finish."""
    start = time.monotonic()
    output = log.with_suffix(".out")
    log.unlink(missing_ok=True)
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
        error = _wait(process, log, seconds, stall)
    text = output.read_text(encoding="utf-8", errors="replace")
    state = "hung" if error else "failed" if process.returncode else "done"
    entries = []
    if log.is_file():
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    started = [entry["start"] for entry in entries if "start" in entry]
    return {
        "state": state,
        "seconds": time.monotonic() - start,
        "last": started[-1] if started else "",
        "error": "\n".join(filter(None, [error, text[-4000:] if state != "done" else ""])),
        "results": [entry for entry in entries if "start" not in entry],
        "output": text,
    }


def _blame(part: dict[str, Any], command: list[str], log: Path, seconds: float) -> None:
    """Run a part that failed again, every launch awaited: the error then names its kernel."""
    env = {"CUDA_LAUNCH_BLOCKING": "1"}
    again = _run(command, log.with_suffix(".blocking.jsonl"), seconds, env=env)
    part["blocking"] = {key: again[key] for key in ("state", "last", "error")}


def _sanitize(library: Path, out: Path) -> dict[str, Any]:
    """The small part under compute-sanitizer's memory checker."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return {
            "state": "skipped",
            "seconds": 0.0,
            "last": "",
            "error": "no compute-sanitizer",
            "results": [],
        }
    log = out / "sanitizer.jsonl"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    command += _command("small", library, log, SANITIZER_SECONDS)
    part = _run(command, log, SANITIZER_SECONDS, stall=SANITIZER_SECONDS)
    found = re.findall(r"ERROR SUMMARY: .*", part["output"])
    part["summary"] = found[-1] if found else "compute-sanitizer gave no summary"
    return part


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _part(name: str, library: Path, work: Path, left: float) -> dict[str, Any]:
    if name == "sanitizer":
        return _sanitize(library, work)
    seconds = min(parts.PARTS[name].seconds, left)
    log = work / f"{name}.jsonl"
    command = _command(name, library, log, seconds)
    end = time.monotonic() + left
    part = _run(command, log, seconds, stall=parts.PARTS[name].stall)
    if part["state"] == "failed" and end - time.monotonic() > 60:
        again = log.with_suffix(".blocking.jsonl")
        _blame(part, _command(name, library, again, 20), log, 20)
    return part


def _check(options: argparse.Namespace) -> int:
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU: this check runs on a machine that has one")
    end = time.monotonic() + options.seconds
    work = _work_folder(out)
    library = _library(options.library, work)
    os.environ[PATH_VARIABLE] = str(library)  # parts that open an artifact find it so
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "driver": _driver(),
        "library": str(library.relative_to(ROOT) if library.is_relative_to(ROOT) else library),
        "parts": _earlier(options.resume),
    }
    passed = _passed(report["parts"])
    for name in options.only or parts.ORDER:
        left = end - time.monotonic()
        if name in passed:
            print(f"{name}: kept", flush=True)
            continue
        if left < 15:
            print(f"{name}: not run, the time is up", flush=True)
            continue
        part = _part(name, library, work, left)
        part.pop("output", None)
        report["parts"][name] = part
        wrong = sum(bool(r.get("wrong")) for r in part["results"])
        print(f"{name}: {part['state']}, {part['seconds']:.0f} s, {wrong} wrong", flush=True)
        _write(out, report)  # after every part: a call that is ended keeps what it found
    _write(out, report)
    print(summary(report))
    shutil.rmtree(work, ignore_errors=True)
    wrong = any(r.get("wrong") for part in report["parts"].values() for r in part["results"])
    failed = any(part["state"] in ("failed", "hung") for part in report["parts"].values())
    return 1 if wrong or failed else 0


def _write(out: Path, report: dict[str, Any]) -> None:
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (out / "gpu_check.txt").write_text(render(report) + "\n", encoding="utf-8")


def _work_folder(out: Path) -> Path:
    """A folder for objects and logs; beside the results where there is little room for temporary
    files, the compiler's among them."""
    if shutil.disk_usage(tempfile.gettempdir()).free < ROOM:
        place = out.resolve() / "work"
        place.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(place)
    return Path(tempfile.mkdtemp(prefix="mqc-gpu-check-"))


def _earlier(resume: Path | None) -> dict[str, Any]:
    """Parts of an earlier report: what failed there stays in the new one until it is run again."""
    if resume is None:
        return {}
    try:
        found: dict[str, Any] = json.loads(resume.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError) as error:
        print(f"nothing is kept of {resume}: {error}", flush=True)
        return {}
    return found


def _passed(found: dict[str, Any]) -> set[str]:
    """Parts that need not be run again."""
    return {
        name
        for name, part in found.items()
        if part["state"] == "done" and not any(r.get("wrong") for r in part["results"])
    }


def _dry(options: argparse.Namespace) -> int:
    """The model parts on this machine's CPU, at the sizes of what was prepared: tiny ones, made
    where they are missing. What is prepared for a GPU would take hours here."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    folder: Path = options.prepared or FOLDER.with_name("prepared-tiny")
    if not (folder / PREPARED).is_file():
        prepare(folder, TINY, "bf16", quick=True)
    report: dict[str, Any] = {
        "device": "cpu (dry run: kernels by definition, no timing means anything)",
        "torch": torch.__version__,
        "driver": "none",
        "parts": {},
    }
    for name in options.only or parts.MODEL_PARTS:
        start, state, error = time.monotonic(), "done", ""
        recorder = Recorder(out / f"{name}.jsonl", start + options.seconds)
        try:
            parts.dry_run(name, folder, recorder)
        except Exception:  # noqa: BLE001  (one part's failure leaves the others)
            state, error = "failed", traceback.format_exc()[-1500:]
        report["parts"][name] = {
            "state": state,
            "seconds": time.monotonic() - start,
            "last": "",
            "error": error,
            "results": recorder.results,
        }
    text = render(report)
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(text)
    wrong = any(r.get("wrong") for part in report["parts"].values() for r in part["results"])
    return 1 if wrong or any(p["state"] != "done" for p in report["parts"].values()) else 0


def main() -> None:
    """Run all parts, or one (`--part`, which is how the parts are started)."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_check")
    parser.add_argument("--library", type=Path, help="libmqc_cuda.so; default: built, or found")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    parser.add_argument("--only", nargs="*", choices=parts.ORDER)
    parser.add_argument("--resume", type=Path, help="a gpu_check.json: what passed there is kept")
    parser.add_argument("--part", choices=list(parts.PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="the model parts on the CPU")
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts.run_part(options.part, options.library, options.log, options.seconds)
        return
    sys.exit(_dry(options) if options.dry_run else _check(options))


if __name__ == "__main__":
    main()
