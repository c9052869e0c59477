"""The GPU check's own logic, on emulated kernels: it passes what is right and finds what is not."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # tools/ is no part of the installed package
    sys.path.append(str(ROOT))

from mqc.cuda.library import LinearKernel  # noqa: E402
from tools.gpu_check import __main__ as checking  # noqa: E402
from tools.gpu_check import common, linear_case, parts, rows, sweep, table  # noqa: E402


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(1)


def test_sweep_passes_right_kernels(emulated: Any) -> None:
    emulated.configure(seed=1)
    for wgmma in (False, True):
        recorder = common.Recorder(None, math.inf)
        sweep.run(
            emulated,
            recorder,
            generator(),
            architecture=90,
            wgmma=wgmma,
            shapes=((72, 200),),
            rows=(2, 20),
        )
        assert len(recorder.results) >= 8
        assert not [r for r in recorder.results if r["wrong"]]


def test_sweep_of_float_rows(emulated: Any) -> None:
    """Weights alone are quantized: both widths, with and without groups, every kernel for them."""
    emulated.configure(seed=1)
    recorder = common.Recorder(None, math.inf)
    how = {"architecture": 90, "wgmma": False, "shapes": ((72, 256),), "rows": (5,)}
    sweep.run(emulated, recorder, generator(), weights=sweep.FLOATS, **how)
    assert {r["kernel"] for r in recorder.results} >= {"AUTO", "MMA_8", "MMA_16", "MMA_64"}
    assert {r["case"].split()[5] for r in recorder.results} >= {"w4a16", "w8a16", "w4g32a16"}
    assert not [r for r in recorder.results if r["wrong"]]
    case = linear_case.LinearCase(5, 64, 128, linear_case.Options(floats=True), generator())
    want = case.expected()
    want[3, 7] *= 1.1
    assert case.mismatches(emulated, LinearKernel.MMA_8, 1, want, repeats=2) == 2


def test_sweep_finds_wrong_values(emulated: Any) -> None:
    emulated.configure(seed=2)
    case = linear_case.LinearCase(5, 64, 128, linear_case.Options(bias=True), generator())
    want = case.expected()
    assert case.mismatches(emulated, LinearKernel.MMA_8, 1, want) == 0
    want[3, 7] += 1
    assert case.mismatches(emulated, LinearKernel.MMA_8, 1, want, repeats=2) == 2
    assert case.first.startswith("y[3, 7] is ") and "rows 3..3, channels 7..7" in case.first


def test_row_kernels_pass(emulated: Any) -> None:
    emulated.configure(seed=3)
    recorder = common.Recorder(None, math.inf)
    rows.run(emulated, recorder, generator(), small=True)
    assert len(recorder.results) > 40
    assert not [r for r in recorder.results if r["wrong"]]


def test_results_survive_a_crash(tmp_path: Path) -> None:
    recorder = common.Recorder(tmp_path / "log.jsonl", math.inf)
    assert recorder.start("first")
    recorder.add(case="first", wrong=0)
    recorder.start("second")
    entries = [json.loads(ln) for ln in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert entries == [{"start": "first"}, {"case": "first", "wrong": 0}, {"start": "second"}]
    assert not common.Recorder(None, deadline=0.0).start("too late")


def test_every_part_has_its_turn() -> None:
    assert sorted(parts.ORDER) == sorted([*parts.PARTS, "sanitizer"])


@pytest.mark.parametrize(
    ("code", "state", "error"),
    [
        ("say('{}')", "done", ""),
        ("say('{}'); sys.exit('illegal address')", "failed", "illegal address"),
        ("say('{}'); time.sleep(60)", "hung", "nothing new"),
    ],
)
def test_a_part_that_crashes_or_hangs(tmp_path: Path, code: str, state: str, error: str) -> None:
    """Its results until then are kept, with the case that it had started."""
    log = tmp_path / "part.jsonl"
    lines = json.dumps({"start": "one"}), json.dumps({"case": "one", "wrong": 0})
    text = "\n".join([*lines, json.dumps({"start": "two"}), ""])
    start = f"import sys, time; say = lambda _: open({str(log)!r}, 'w').write({text!r})\n"
    command = [sys.executable, "-c", start + code]
    part = checking._run(command, log, 30, stall=1.5)
    assert part["state"] == state and error in part["error"]
    assert part["last"] == "two" and part["results"] == [{"case": "one", "wrong": 0}]


def test_the_check_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in order until the time is up, a report after each, and a status that says it."""
    made: list[str] = []

    def part(name: str, library: Path, work: Path, left: float) -> dict[str, Any]:
        assert os.environ["MQC_CUDA_LIBRARY"] == str(library)
        made.append(name)
        wrong = int(name == "rows")
        results = [{"case": "x", "wrong": wrong}]
        return {"state": "done", "seconds": 1.0, "last": "", "error": "", "results": results}

    monkeypatch.setenv("MQC_CUDA_LIBRARY", "")
    monkeypatch.setattr(checking, "_part", part)
    monkeypatch.setattr(checking, "_library", lambda given, work: tmp_path / "lib.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    options = argparse.Namespace(
        out=tmp_path, library=None, resume=None, seconds=60.0, only=["small", "rows"]
    )
    assert checking._check(options) == 1 and made == ["small", "rows"]
    report = tmp_path / "gpu_check.json"
    assert list(json.loads(report.read_text())["parts"]) == made
    assert "1 checks, 1 wrong" in (tmp_path / "gpu_check.txt").read_text()
    options.resume, options.only = report, ["small", "sweep"]
    assert checking._check(options) == 1 and made[2:] == ["sweep"]
    assert list(json.loads(report.read_text())["parts"]) == made  # what was wrong is still there
    options.resume, options.seconds = None, 1.0
    assert checking._check(options) == 0 and len(made) == 3


def test_what_passed_is_kept(tmp_path: Path) -> None:
    done = {"state": "done", "results": [{"case": "x", "wrong": 0}]}
    wrong = {"state": "done", "results": [{"case": "x", "wrong": 3}]}
    hung = {"state": "hung", "results": []}
    report = tmp_path / "gpu_check.json"
    report.write_text(json.dumps({"parts": {"rows": done, "sweep": wrong, "small": hung}}))
    found = checking._earlier(report)
    assert checking._passed(found) == {"rows"} and found["sweep"] == wrong
    report.write_text("{")  # a call that was ended while it wrote
    assert checking._earlier(report) == checking._earlier(tmp_path / "none.json") == {}


def test_which_library_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh build, else the one that stands, else nothing can be checked."""
    built, standing = tmp_path / "built.so", tmp_path / "standing.so"
    for file in (built, standing):
        file.touch()
    monkeypatch.setattr(checking, "library_path", lambda: standing)
    monkeypatch.setattr(checking.build, "find_nvcc", lambda: tmp_path)
    monkeypatch.setattr(checking.build, "build", lambda *_: built)
    assert checking._library(None, tmp_path) == built.resolve()

    def refuse(*_: Any) -> Path:
        raise checking.build.BuildError("nvcc 11.8 is too old")

    monkeypatch.setattr(checking.build, "build", refuse)
    assert checking._library(None, tmp_path) == standing.resolve()
    standing.unlink()
    with pytest.raises(SystemExit, match="nvcc 11.8 is too old"):
        checking._library(None, tmp_path)
    monkeypatch.setattr(checking.build, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="no nvcc to build it"):
        checking._library(None, tmp_path)


def test_little_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects, logs and the compiler's own files then lie beside the results."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "small"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "small").mkdir()
    assert checking._work_folder(tmp_path / "out").parent == tmp_path / "small"
    monkeypatch.setattr(checking, "ROOM", 1 << 60)
    assert checking._work_folder(tmp_path / "out").parent == tmp_path / "out" / "work"
    assert os.environ["TMPDIR"] == str(tmp_path / "out" / "work")


def test_a_call_that_is_ended_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(name: str, *_: Any) -> dict[str, Any]:
        if name == "rows":
            raise KeyboardInterrupt
        results = [{"case": "x", "wrong": 0}]
        return {"state": "done", "seconds": 1.0, "last": "", "error": "", "results": results}

    monkeypatch.setenv("MQC_CUDA_LIBRARY", "")
    monkeypatch.setattr(checking, "_part", part)
    monkeypatch.setattr(checking, "_library", lambda given, work: tmp_path / "lib.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    options = argparse.Namespace(
        out=tmp_path, library=None, resume=None, seconds=60.0, only=["small", "rows"]
    )
    with pytest.raises(KeyboardInterrupt):
        checking._check(options)
    assert checking._passed(checking._earlier(tmp_path / "gpu_check.json")) == {"small"}
    assert "small: done" in (tmp_path / "gpu_check.txt").read_text()


def test_table() -> None:
    part = {"state": "done", "seconds": 3.0, "last": "", "error": ""}
    report = {
        "device": "D",
        "torch": "T",
        "driver": "1",
        "parts": {
            "ceilings": part | {"results": [{"name": "copy", "value": 3.0, "unit": "TB/s"}]},
            "rows": part | {"results": [{"case": "norm", "wrong": 2}, {"case": "x", "wrong": 0}]},
            "linear-timings": part
            | {
                "state": "hung",
                "last": "linear 1",
                "error": "no end",
                "results": [
                    {
                        "name": "linear 1",
                        "kernel": "AUTO",
                        "used": "MMA_8",
                        "split_k": 4,
                        "microseconds": 2.5,
                        "weight_tb_s": 2.4,
                        "tops": 10.0,
                    }
                ],
            },
        },
    }
    for text in (table.render(report), table.summary(report)):
        for part_of_text in (
            "3.0 TB/s",
            "2 checks, 1 wrong",
            "norm: 2",
            "HUNG",
            "AUTO=MMA_8/4",
            "2.5 us",
        ):
            assert part_of_text in text


@pytest.mark.parametrize("wgmma", [False, True])
def test_every_number_of_rows_has_kernels(wgmma: bool) -> None:
    for m in sweep.ROWS:
        assert sweep.kernels_for(m, 90, wgmma)
    assert sweep.kernels_for(4096, 80, True) == []
