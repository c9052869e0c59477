"""mqc's artifact in plain onnxruntime with the operator library: numpy, no torch, no transformers.

What a program in any language does with the files: a session each, and caches that the decoder
fills in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench_cpu import models
from bench_cpu.peers.mqc_onnx import artifact

Array = NDArray[Any]


def prepare(name: str, part: str, cache: Path) -> None:
    """The artifact of peer ``mqc``."""
    from bench_cpu.peers.mqc_onnx import prepare as compile_model

    compile_model(name, part, cache)


def open_peer(name: str, part: str, cache: Path, threads: int) -> Any:
    """The decoder, and the vision tower for the prompt."""
    model = Model(artifact(cache), threads)
    if part == "prompt":
        model.open_prompt(models.prompt_arrays(cache))
    return model


class Model:
    """The files' sessions, one sequence, a cache of ``ROWS`` tokens."""

    ROWS = 1152

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        from mqc.backends.onnx.library import MODEL_ENTRY, THREADS_ENTRY, onnx_ops_library

        def session(name: str) -> ort.InferenceSession:
            path, options = str(folder / name), ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            options.enable_mem_pattern = False
            options.add_session_config_entry(THREADS_ENTRY, str(threads))
            options.add_session_config_entry(MODEL_ENTRY, path)
            options.register_custom_ops_library(onnx_ops_library())
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        self._session = session
        self.embed, self.decoder = map(self._session, ("embed.onnx", "decoder.onnx"))
        shape = (1, models.KV_HEADS, self.ROWS, models.HEAD_DIM)
        self.cache = {
            f"{kind}_cache_{layer}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for layer in range(models.LAYERS)
            for kind in ("key", "value")
        }
        self.past = 0

    def open_prompt(self, inputs: dict[str, Array]) -> None:
        """The tower, and the inputs of both sessions, from the processor's arrays."""
        self.tower = self._session("vision.onnx")
        self.ids = inputs["input_ids"]
        side = models.IMAGE // int(models.VISION["patch_size"])
        # Patches come in blocks of two by two, which the tower merges to one token.
        places = np.arange(side).reshape(side // 2, 2)
        rows = np.broadcast_to(places[:, None, :, None], (side // 2, side // 2, 2, 2))
        columns = rows.transpose(1, 0, 3, 2)
        place = np.stack([rows.reshape(-1), columns.reshape(-1)], axis=1)
        self.patches = {"pixel_values": inputs["pixel_values"], "position_ids": place}
        image = np.bincount(self.ids[0]).argmax()  # most tokens are the image's
        self.visual = self.ids == image
        self.positions = positions_of(self.visual[0], side // 2)

    def _read(self, embeds: Array, positions: Array, visual: Array) -> None:
        tokens, keys = embeds.shape[1], self.past + embeds.shape[1]
        seen = np.arange(keys)[None, :] <= np.arange(self.past, keys)[:, None]
        binding = self.decoder.io_binding()
        feeds = {
            "inputs_embeds": embeds,
            "modality": visual,
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

    def _read_text(self, ids: list[int]) -> None:
        embeds = self.embed.run(None, {"input_ids": np.array([ids])})[0]
        places = np.arange(self.past, self.past + len(ids))
        positions = np.broadcast_to(places, (3, 1, len(ids)))
        self._read(embeds, positions, np.zeros((1, len(ids)), bool))

    def prefill(self, tokens: int) -> None:
        self.past = 0
        self._read_text(models.token_ids(tokens))

    def decode(self) -> None:
        self._read_text([100])

    def _rows(self) -> Array:
        rows: Array = self.tower.run(None, self.patches)[0]
        return rows

    def vision(self) -> None:
        self._rows()

    def prompt(self) -> None:
        embeds = self.embed.run(None, {"input_ids": np.where(self.visual, 0, self.ids)})[0]
        embeds[self.visual] = self._rows()
        self.past = 0
        self._read(embeds, self.positions, self.visual)


def positions_of(visual: Array, side: int) -> Array:
    """Positions [3, 1, tokens] of a prompt with one image of ``side`` by ``side`` tokens: time,
    row and column of its tokens count from the position of the first."""
    first, tokens = int(visual.argmax()), len(visual)
    text = np.arange(tokens)
    text[first + side * side :] -= side * side - side
    result = np.stack([text, text, text])
    row, column = np.divmod(np.arange(side * side), side)
    result[:, visual] = first + np.stack([np.zeros_like(row), row, column])
    return result[:, None, :]
