"""The GPU check's model parts over the library's kernels, on the emulator of CUDA blocks."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.gpu_check import end_to_end, model
from tools.gpu_check.common import Recorder


@pytest.mark.parametrize("part", ["prefill", "decode", "vision"])
def test_part(emulated: Any, tmp_path_factory: pytest.TempPathFactory, part: str) -> None:
    emulated.configure(seed=2)
    file = tmp_path_factory.mktemp("model")
    prepared = model.prepare(file, model.TINY, "bf16")
    recorder = Recorder(None, time.monotonic() + 300)
    cpu = torch.device("cpu")
    bench = end_to_end.Bench(recorder, prepared, cpu, emulated, plan=end_to_end.DRY)
    getattr(end_to_end, part)(bench)
    assert [item for item in recorder.results if item.get("wrong")] == []
    assert sum(item.get("unit") == "x" for item in recorder.results) >= 1
