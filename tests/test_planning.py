"""Plans: real shapes in little memory, and the forecast against what a compile writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mqc.api import compile as compile_model
from mqc.api import plan
from mqc.errors import CheckpointError
from mqc.spec import named_scheme

SHAPES = Path(__file__).parent / "shapes"
FOLDS = {  # streams' widths, value heads of both components, online transforms of the decoder
    "qwen2-vl-2b": ([1280, 1536], 32 + 28, {"8960 / 8960": 28}),
    "qwen2-vl-7b": ([1280, 3584], 32 + 28, {"18944 / 18944": 28}),
    "internvl2-8b": ([1024, 4096], 24 + 32, {"14336 / 14336": 32}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDS)
def test_real_shapes_are_planned_in_a_minute_and_two_gigabytes(name: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    with out.open("wb") as file:
        command = [sys.executable, "-m", "mqc", "plan", str(SHAPES / name), "--json"]
        process = os.posix_spawn(
            sys.executable,
            command,
            {**os.environ, "OMP_NUM_THREADS": "1"},
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1)],
        )
        _, status, usage = os.wait4(process, 0)
    assert status == 0
    assert usage.ru_utime + usage.ru_stime < 60
    assert usage.ru_maxrss * 1024 < 2e9
    found = json.loads(out.read_text())
    widths, heads, hadamards = FOLDS[name]
    assert [stream["width"] for stream in found["streams"]] == widths
    assert found["online_rotations"] == 0
    assert found["value_heads"] == heads
    parts = {part["name"]: part for part in found["components"]}
    assert parts["decoder"]["hadamards"] == hadamards
    assert parts["decoder"]["linears"] - parts["decoder"]["quantized"] == 1  # the head
    assert parts["decoder"]["mixed"] == parts["decoder"]["quantized"]
    assert parts["vision"]["quantized"] == parts["vision"]["linears"]
    assert found["skips"] == []


@pytest.mark.parametrize("scheme", ["w4a8-all", "float"])
def test_forecast_is_what_a_compile_writes(scheme: str, tmp_path: Path) -> None:
    forecast = plan("tiny-qwen2-vl", named_scheme(scheme))
    out = tmp_path / "artifact"
    compile_model("tiny-qwen2-vl", target="reference", scheme=scheme, samples=4, out=out)
    written = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    assert forecast.compiled_bytes == pytest.approx(written, rel=0.02)


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        plan(tmp_path, named_scheme("w4a8"))
