"""The GPU check's own logic, on emulated kernels: it passes what is right and finds what is not."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # tools/ is no part of the installed package
    sys.path.append(str(ROOT))

from mqc.cuda.library import LinearKernel  # noqa: E402
from tools.gpu_check import common, linear_case, rows, sweep, table  # noqa: E402


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


def test_sweep_finds_wrong_values(emulated: Any) -> None:
    emulated.configure(seed=2)
    case = linear_case.LinearCase(5, 64, 128, linear_case.Options(bias=True), generator())
    want = case.expected()
    assert case.mismatches(emulated, LinearKernel.MMA_8, 1, want) == 0
    want[3, 7] += 1
    assert case.mismatches(emulated, LinearKernel.MMA_8, 1, want, repeats=2) == 2


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
    text = table.render(report)
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
