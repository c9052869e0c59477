"""Shared by the parts: imports from a plain checkout, timing, results that survive a crash."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqc.cuda.library import DType

DTYPES = {
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.float32: DType.F32,
    torch.int8: DType.I8,
}


class Recorder:
    """Results of a part, one JSON object a line, written as they come.

    A line {"start": ...} without a result after it names the case a crash or a hang happened in.
    """

    def __init__(self, path: Path | None, deadline: float) -> None:
        self.file = None if path is None else path.open("w", encoding="utf-8")
        self.deadline = deadline
        self.results: list[dict[str, Any]] = []

    def start(self, name: str) -> bool:
        """Announce a case; False where the part's time is up."""
        if time.monotonic() > self.deadline:
            return False
        self._write({"start": name})
        return True

    def add(self, **result: Any) -> None:
        """Record a result."""
        self.results.append(result)
        self._write(result)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()


def stream_of(device: torch.device) -> int:
    """The current stream as the library takes it."""
    return 0 if device.type == "cpu" else int(torch.cuda.current_stream().cuda_stream)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a fault shows at its case."""
    if device.type != "cpu":
        torch.cuda.synchronize()


def workspace(size: int, device: torch.device) -> Tensor:
    """A zeroed workspace of at least one byte."""
    return torch.zeros(max(size, 16), dtype=torch.uint8, device=device)


def median_seconds(run: Callable[[], Any], repeats: int = 15, warmup: int = 3) -> float:
    """Median device time of one call, by events around each."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return statistics.median(times)


def graph_seconds(launches: Sequence[Callable[[], Any]], repeats: int = 9) -> float:
    """Median device time of one launch, from replays of a graph of all of them in turn.

    Each launch works on its own copy of the weights; together they should be several times the
    second-level cache, so that each finds its copy cold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    return median_seconds(graph.replay, repeats) / len(launches)


def copies_for(weight_bytes: int) -> int:
    """Copies of a weight that are together three times the device's second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-3 * cache // max(weight_bytes, 1))))
