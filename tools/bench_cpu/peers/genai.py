"""onnxruntime-genai: int4 in blocks of 128, made by its own builder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench_cpu import models


def prepare(name: str, part: str, cache: Path) -> None:
    """Run the builder."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(models.text_only(cache)), "-o", str(folder), "-c", str(cache / "hf")]
        command += ["-p", "int4", "-e", "cpu", "--extra_options"]
        command += ["block_size=128", "accuracy_level=4"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"builder: {done.stderr.strip().splitlines()[-1][:300]}")

    models.made(cache / name, make)


def open_peer(name: str, part: str, cache: Path, threads: int) -> Any:
    """The built model."""
    return Model(cache / name, threads)


class Model:
    """One generator at a time."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(folder))
        options = '{"model": {"decoder": {"session_options": {"intra_op_num_threads": %d}}}}'
        config.overlay(options % threads)
        self.genai = genai
        self.model = genai.Model(config)
        self.generator: Any = None

    def prefill(self, tokens: int) -> None:
        self.generator = None
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=tokens + 2 * models.STEPS, min_length=tokens + 2 * models.STEPS
        )
        self.generator = self.genai.Generator(self.model, parameters)
        self.generator.append_tokens(np.array([models.token_ids(tokens)], np.int32))
        self.generator.generate_next_token()

    def decode(self) -> None:
        self.generator.generate_next_token()
