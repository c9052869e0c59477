"""The profile of an ONNX artifact: nodes counted in the run they belong to, and the whole tool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from mqc.artifact import ArtifactWriter
from mqc.backends.onnx import OnnxTarget
from mqc.models import embedded_model_path

TOOLS = Path(__file__).resolve().parents[2] / "tools"
MODEL = "tiny-qwen2-vl"


def event(name: str, at: int, lasted: int, op: str = "") -> dict[str, Any]:
    return {"name": name, "ts": at, "dur": lasted, "args": {"op_name": op}}


def test_nodes_belong_to_the_run_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import profile_onnx

    events = [
        event("model_run", 0, 9000),
        event("a_kernel_time", 10, 8000, "Add"),
        *(event("model_run", 10000 * n, 1000 * n) for n in (1, 2, 3)),
        *(event("b_kernel_time", 10000 * n + 5, 900 * n, "Mul") for n in (1, 2, 3)),
        event("c_kernel_time", 20002, 5, "Sub"),
        event("session_initialization", 1, 5),
    ]
    milliseconds, time, nodes = profile_onnx.middle_run(events, 1)
    assert milliseconds == 2.0 and time == {"Mul": 1800, "Sub": 5} and nodes == {"Mul": 1, "Sub": 1}
    lines = profile_onnx.table("vision", events, 1).splitlines()
    assert lines[0] == "| vision, 2.0 ms | nodes | ms | share |"
    assert lines[2:] == ["| Mul | 1 | 1.80 | 90 % |", "| all else | | 0.20 | 10 % |"]


def test_profile_of_an_artifact(tmp_path: Path) -> None:
    target, program = OnnxTarget(), tiny.program(MODEL)
    with ArtifactWriter(tmp_path / "a") as writer:
        target.emit(target.lower(program), writer)
        writer.copy_model_files(embedded_model_path(MODEL))
        writer.describe(target="onnx", facts=program.facts)
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    tool, options = TOOLS / "profile_onnx.py", ["--rounds", "2", "--keep", str(tmp_path / "traces")]
    command = [sys.executable, str(tool), str(tmp_path / "a"), "--image", str(tmp_path / "a.png")]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    titles = [line.split(",")[0] for line in result.stdout.splitlines() if " ms | nodes" in line]
    assert titles == ["| vision", "| decoder", "| decoder"]
    names = sorted(path.name.partition("_")[0] for path in (tmp_path / "traces").glob("*.json"))
    assert names == ["decoder", "decoder", "embed", "embed", "vision", "vision"]
