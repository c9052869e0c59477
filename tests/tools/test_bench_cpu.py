"""The CPU benchmark's processes, merging of results, tables, and the filter that refuses AMX."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def entry(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "spread": [seconds, seconds], "count": 3}


def test_merge_keeps_other_rows_and_drops_old_errors(parts: Any) -> None:
    report = parts("bench_cpu.report")
    results: dict[str, Any] = {"parts": {}}
    report.merge(results, "decoder", "vnni", {"mqc": {"error": "gone"}})
    report.merge(results, "decoder", "vnni", {"mqc": {"prefill 256": entry(0.1)}})
    report.merge(results, "decoder", "vnni", {"mqc": {"decode 256": entry(0.004), "peak_mb": 1.0}})
    row = results["parts"]["decoder"]["vnni"]["mqc"]
    assert "error" not in row and row["prefill 256"]["seconds"] == 0.1
    assert "| mqc W4A8 | 2560 | - | 250 (1.00) | 1 |" in report.tables(results)


def test_a_missing_peer_is_a_row_that_says_so(parts: Any, tmp_path: Path) -> None:
    process, peers = parts("bench_cpu.process"), parts("bench_cpu.peers")
    row = peers.Peer("none", "bench_cpu.peers.none", ("no-such-distribution",), ("decoder",))
    peers.PEERS["none"] = row
    try:
        assert peers.missing("none").startswith("no-such-distribution not installed")
    finally:
        del peers.PEERS["none"]
    with pytest.raises(process.PeerError, match="status 1"):
        process.Worker("none", "decoder", tmp_path, 1, True)


def test_a_worker_times_a_product(parts: Any, tmp_path: Path) -> None:
    process = parts("bench_cpu.process")
    worker = process.Worker("ort-int8", "linears", tmp_path, 1, True)
    request = {"do": "linear", "name": "x", "k": 128, "n": 64, "m": 2, "copies": 2, "repeat": 3}
    rows = process.in_turn({"ort-int8": worker}, [request], 2, lambda _: None)
    worker.close()
    assert rows["ort-int8"]["x"]["count"] == 6 and rows["ort-int8"]["peak_mb"] > 1


def test_readme_is_changed_between_the_markers_alone(parts: Any, tmp_path: Path) -> None:
    report = parts("bench_cpu.report")
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- bench-cpu -->\nold\n<!-- /bench-cpu -->\nb\n")
    report.into_readme(path, "new\n")
    assert path.read_text() == "a\n<!-- bench-cpu -->\nnew\n<!-- /bench-cpu -->\nb\n"
    with pytest.raises(ValueError, match="lacks the markers"):
        report.into_readme(path, "new", "other")


@pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux")
def test_amx_is_refused() -> None:
    script = (
        "import ctypes, json; from bench_cpu.without_amx import refuse_amx; refuse_amx();"
        "libc = ctypes.CDLL(None, use_errno=True);"
        "print(json.dumps([libc.syscall(158, 0x1023, 18), ctypes.get_errno()]))"
    )
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, cwd=TOOLS, check=True)
    assert json.loads(done.stdout) == [-1, 1]
