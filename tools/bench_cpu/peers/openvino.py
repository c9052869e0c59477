"""OpenVINO: a stateful decoder with its fused attention, and the vision tower of transformers.

int4: nncf weight compression, groups of 128, activations quantized while running. int8: nncf's
post-training quantization, W8A8 static.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench_cpu import models


def prepare(name: str, part: str, cache: Path) -> None:
    """Convert and quantize."""
    from bench_cpu.peers.openvino_models import make_models

    make_models(name, part, cache)


def open_peer(name: str, part: str, cache: Path, threads: int) -> Any:
    """The compiled model, or linears."""
    if part == "linears":
        from bench_cpu.peers.openvino_linear import Linears

        return Linears(name, threads)
    return Model(name, part, cache, threads)


def settings(threads: int) -> dict[str, Any]:
    """Compile options."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
        # With bf16, the default where AMX is, rows are not quantized: int4 is 3.6 times slower.
        "INFERENCE_PRECISION_HINT": "f32",
    }


class Model:
    """The decoder, and the vision tower for the prompt."""

    def __init__(self, name: str, part: str, cache: Path, threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        options = settings(threads)
        self.decoder = core.compile_model(cache / name / "decoder.xml", "CPU", options)
        self.request = self.decoder.create_infer_request()
        kinds = [
            op.get_rt_info()["layerType"].astype(str)
            for op in self.decoder.get_runtime_model().get_ordered_ops()
            if "layerType" in op.get_rt_info()
        ]
        self.notes = {"attention": ", ".join(sorted({k for k in kinds if "Attention" in k}))}
        self.length = 0
        self.x = np.random.default_rng(0).standard_normal((1, 2048, models.HIDDEN)) * 0.02
        self.x = self.x.astype(np.float32)
        self.beam = np.zeros(1, np.int32)
        if part == "prompt":
            path = cache / "openvino-vision-int8" / "vision.xml"
            self.tower = core.compile_model(path, "CPU", options).create_infer_request()
            inputs = models.prompt_arrays(cache)
            self.pixels = inputs["pixel_values"]
            self.tokens = inputs["input_ids"].shape[1]

    def _read(self, x: np.ndarray[Any, Any]) -> None:
        end = self.length + x.shape[1]
        positions = np.arange(self.length, end)[None]
        self.request.infer({"x": x, "positions": positions, "beam_idx": self.beam})
        self.length = end

    def prefill(self, tokens: int) -> None:
        self.request.reset_state()
        self.length = 0
        self._read(self.x[:, :tokens])

    def decode(self) -> None:
        self._read(self.x[:, :1])

    def vision(self) -> None:
        self.tower.infer([self.pixels])

    def prompt(self) -> None:
        self.vision()
        rows = self.tower.get_output_tensor(0).data.reshape(1, -1, models.HIDDEN)
        text = self.x[:, : self.tokens - rows.shape[1]]
        self.request.reset_state()
        self.length = 0
        self._read(np.concatenate([text, rows], 1))
