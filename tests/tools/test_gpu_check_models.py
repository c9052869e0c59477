"""The end-to-end part of the GPU check, in a dry run on the CPU at tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mqc

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.gpu_check import end_to_end, model  # noqa: E402
from tools.gpu_check.common import Recorder  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.prepare(tmp_path_factory.mktemp("model"), model.TINY, "bf16")


def bench(prepared: Path, artifact: Path | None = None) -> end_to_end.Bench:
    recorder = Recorder(None, time.monotonic() + 300)
    return end_to_end.Bench(recorder, prepared, CPU, artifact=artifact, plan=end_to_end.DRY)


def values(results: list[dict[str, object]]) -> dict[str, object]:
    assert [item for item in results if item.get("wrong")] == []
    return {str(item["name"]): item["value"] for item in results if "unit" in item}


def test_prepared_model_is_the_compiled_form(prepared: Path) -> None:
    program, sizes = model.load(prepared, CPU)
    assert sizes == model.TINY and program.facts["cache"] == "buffer"
    text = [str(node.target) for node in program.components["decoder"].graph.nodes]
    assert text.count("mqc_cuda.linear.default") == 4 * sizes.layers + 1
    assert text.count("mqc.attention.default") == sizes.layers
    assert prepared.stat().st_size < 20_000


def test_prefill(prepared: Path) -> None:
    b = bench(prepared)
    end_to_end.prefill(b)
    found = values(b.recorder.results)
    assert {"prefill 20 mqc", "prefill 20 bf16", "prefill 20 speedup"} <= found.keys()


def test_decode(prepared: Path) -> None:
    b = bench(prepared)
    end_to_end.decode(b)
    found = values(b.recorder.results)
    assert {"decode batch 3 mqc", "decode int8 KV batch 3 speedup"} <= found.keys()


def test_vision(prepared: Path) -> None:
    b = bench(prepared)
    end_to_end.vision(b)
    assert "vision 16 patches speedup" in values(b.recorder.results)


def test_order(prepared: Path) -> None:
    b = bench(prepared)
    end_to_end.order(b)
    assert "prefill 20: rows over aifs" in values(b.recorder.results)
    (agree,) = (item for item in b.recorder.results if "apart" in item)
    assert agree["apart"] < 0.02


def test_accuracy(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    quick = ["weights.method=rtn", "weights.clip=false"]
    mqc.compile("tiny-qwen2-vl", target="cuda", overrides=quick, samples=8, out=out)
    b = bench(prepared, out)
    end_to_end.accuracy(b)
    found = values(b.recorder.results)
    assert found["tiny-qwen2-vl float KV: agreement"] == 100.0


def test_dry_run_of_the_command(tmp_path: Path) -> None:
    """All model parts through the command line, as CI runs them."""
    from tools.gpu_check.prepare import prepare

    prepare(tmp_path / "prepared", model.TINY, "bf16", quick=True)
    command = [sys.executable, "-m", "tools.gpu_check", "--dry-run", "--out", str(tmp_path / "o")]
    command += ["--prepared", str(tmp_path / "prepared")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "o" / "gpu_check.json").read_text())
    parts = ["model-accuracy", "model-decode", "model-prefill", "model-vision", "model-order"]
    assert list(report["parts"]) == parts and "dry run" in report["device"]
    assert "speedup" in result.stdout


def test_time_that_is_up_stops_a_part(prepared: Path) -> None:
    late = dataclasses.replace(bench(prepared), recorder=Recorder(None, time.monotonic() - 1))
    end_to_end.prefill(late)
    end_to_end.vision(late)
    assert late.recorder.results == []
