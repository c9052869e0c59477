"""Command line of the GPU check; see the package."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from mqc.cuda import build
from mqc.cuda.library import library_path
from tools.gpu_check import ROOT, parts
from tools.gpu_check.common import Recorder
from tools.gpu_check.prepare import FOLDER
from tools.gpu_check.table import render

SANITIZER_SECONDS = 75


def _library(given: Path | None, out: Path) -> Path:
    """The library to check: the one given, one that stands, or a fresh build."""
    found = given or library_path()
    if found is None:
        start = time.monotonic()
        found = build.build(out / build.FILE_NAME, out / "objects")
        print(f"built {found} in {time.monotonic() - start:.0f} s", flush=True)
    return found.resolve()


def _command(name: str, library: Path, log: Path, seconds: float) -> list[str]:
    base = [sys.executable, "-m", "tools.gpu_check", "--part", name, "--library", str(library)]
    return [*base, "--log", str(log), "--seconds", str(seconds)]


def _run(name: str, command: list[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a part in its own process: its results, and where it ended if it did not finish."""
    start = time.monotonic()
    state, error, output = "done", "", ""
    try:
        # The part stops by itself when its time is up; the limit is for hangs.
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 30, check=False
        )
        output = result.stdout + result.stderr
        if result.returncode:
            state, error = "failed", output[-1500:]
    except subprocess.TimeoutExpired:
        state, error = "hung", f"no end after {seconds + 30:.0f} s"
    entries = []
    if log.is_file():
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    started = [entry["start"] for entry in entries if "start" in entry]
    return {
        "state": state,
        "seconds": time.monotonic() - start,
        "last": started[-1] if started else "",
        "error": error,
        "results": [entry for entry in entries if "start" not in entry],
        "output": output,
    }


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
    part = _run("sanitizer", command, log, SANITIZER_SECONDS)
    found = re.findall(r"ERROR SUMMARY: .*", part["output"])
    part["summary"] = found[-1] if found else "compute-sanitizer gave no summary"
    return part


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _check(options: argparse.Namespace) -> int:
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU: this check runs on a machine that has one")
    end = time.monotonic() + options.seconds
    library = _library(options.library, out)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "driver": _driver(),
        "library": library.name,
        "parts": {},
    }
    wanted = options.only or [*parts.PARTS, "sanitizer"]
    for name in wanted:
        left = end - time.monotonic()
        if left < 15:
            print(f"{name}: not run, the time is up", flush=True)
            continue
        if name == "sanitizer":
            part = _sanitize(library, out)
        else:
            seconds = min(parts.PARTS[name].seconds, left)
            log = out / f"{name}.jsonl"
            part = _run(name, _command(name, library, log, seconds), log, seconds)
        part.pop("output", None)
        report["parts"][name] = part
        print(f"{name}: {part['state']}, {part['seconds']:.0f} s", flush=True)
        (out / "gpu_check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    text = render(report)
    (out / "gpu_check.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    wrong = any(r.get("wrong") for part in report["parts"].values() for r in part["results"])
    failed = any(part["state"] in ("failed", "hung") for part in report["parts"].values())
    return 1 if wrong or failed else 0


def _dry(options: argparse.Namespace) -> int:
    """The model parts on this machine's CPU, at the sizes of what was prepared."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
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
            parts.dry_run(name, options.prepared, recorder)
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
    parser.add_argument("--library", type=Path, help="libmqc_cuda.so; default: found or built")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    parser.add_argument("--only", nargs="*", choices=[*parts.PARTS, "sanitizer"])
    parser.add_argument("--part", choices=list(parts.PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="the model parts on the CPU")
    parser.add_argument("--prepared", type=Path, default=FOLDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts.run_part(options.part, options.library, options.log, options.seconds)
        return
    sys.exit(_dry(options) if options.dry_run else _check(options))


if __name__ == "__main__":
    main()
