"""Recording a step once and replaying it: CUDA graphs on a GPU, plain calls elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

WARM_UP = 2
"""Runs before recording: kernels load, workspaces and torch's own buffers get their size."""

Step = Callable[[], Any]


class Recorder(Protocol):
    """Makes a callable that repeats a step on the same memory."""

    def __call__(self, step: Step) -> tuple[Step, Any]:
        """(replay, the results' tensors, which every replay overwrites)."""


def call_again(step: Step) -> tuple[Step, Any]:
    """No graph: the step itself, writing its results where those of the first run are."""
    kept = step()

    def replay() -> Any:
        with torch.inference_mode():
            for old, new in zip(kept, step(), strict=True):
                old.copy_(new)
        return kept

    return replay, kept


def record_graph(step: Step) -> tuple[Step, Any]:
    """A CUDA graph of ``step`` on the current device, recorded after warm-up on a stream of its
    own (torch keeps one for all graphs otherwise, of the device that was the current one first)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = step()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay, kept
