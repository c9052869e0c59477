"""mqc's artifact in plain onnxruntime with the operator library: numpy, no torch, no transformers.

What a program in any language does with the files: two sessions, and caches that the decoder
fills in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench_cpu import models
from bench_cpu.peers.mqc_onnx import artifact


def prepare(name: str, part: str, cache: Path) -> None:
    """The artifact of peer ``mqc``."""
    from bench_cpu.peers.mqc_onnx import prepare as compile_model

    compile_model(name, part, cache)


def open_peer(name: str, part: str, cache: Path, threads: int) -> Any:
    """The decoder."""
    return Model(artifact(cache), threads)


class Model:
    """``embed.onnx`` and ``decoder.onnx``, one sequence, a cache of ``ROWS`` tokens."""

    ROWS = 1152

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        from mqc.backends.onnx.library import THREADS_ENTRY, onnx_ops_library

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry(THREADS_ENTRY, str(threads))
        options.register_custom_ops_library(onnx_ops_library())
        sessions = [
            ort.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in ("embed.onnx", "decoder.onnx")
        ]
        self.embed, self.decoder = sessions
        shape = (1, models.KV_HEADS, self.ROWS, models.HEAD_DIM)
        self.cache = {
            f"{kind}_cache_{layer}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for layer in range(models.LAYERS)
            for kind in ("key", "value")
        }
        self.past = 0

    def _read(self, ids: list[int]) -> None:
        tokens, keys = len(ids), self.past + len(ids)
        seen = np.arange(keys)[None, :] <= np.arange(self.past, keys)[:, None]
        positions = np.broadcast_to(np.arange(self.past, keys), (3, 1, tokens))
        binding = self.decoder.io_binding()
        feeds = {
            "inputs_embeds": self.embed.run(None, {"input_ids": np.array([ids])})[0],
            "modality": np.zeros((1, tokens), bool),
            "position_ids": np.ascontiguousarray(positions),
            "mask": seen[None, None],
            "logit_index": np.array([[tokens - 1]]),
            "past": np.array([self.past]),
        }
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"new_{name}", value)
        self.decoder.run_with_iobinding(binding)
        int(binding.get_outputs()[0].numpy()[0, -1].argmax())
        self.past = keys

    def prefill(self, tokens: int) -> None:
        self.past = 0
        self._read(models.token_ids(tokens))

    def decode(self) -> None:
        self._read([100])
