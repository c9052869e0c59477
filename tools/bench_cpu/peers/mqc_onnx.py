"""mqc through its public path: compile for onnx, load, prefill and decode; with and without its
operator library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench_cpu import models

SCHEME = ("weights.method=rtn", "weights.clip=false")
"""w4a8 with rounding to nearest: the graph is that of GPTQ, the compile takes minutes less."""


def artifact(cache: Path) -> Path:
    """The compiled model."""
    return Path(os.environ.get("MQC_BENCH_ARTIFACT", cache / "mqc-w4a8"))


def prepare(name: str, part: str, cache: Path) -> None:
    """Compile, with four calibration rows."""
    import mqc

    if part == "linears" or artifact(cache).is_dir():
        return
    picture = cache / "picture.png"
    models.picture().save(picture)
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": models.QUESTION}]
    row = json.dumps({"messages": [{"role": "user", "content": content}], "answer": "3"})
    rows = cache / "rows.jsonl"
    rows.write_text("\n".join([row] * 2) + "\n")
    mqc.compile(
        models.multimodal(cache),
        target="onnx",
        scheme="w4a8",
        overrides=SCHEME,
        calibration=rows,
        samples=2,
        out=artifact(cache),
    )


def open_peer(name: str, part: str, cache: Path, threads: int) -> Any:
    """The loaded artifact, or linears."""
    import torch

    torch.set_num_threads(threads)
    if part == "linears":
        from bench_cpu.peers.mqc_linear import Linears

        return Linears(threads)
    return Model(cache)


class Model:
    """An artifact's engine."""

    def __init__(self, cache: Path) -> None:
        import mqc
        from mqc.host import engine

        self.host = engine
        self.runnable = mqc.load(artifact(cache))
        self.engine = self.runnable.engine
        self.cache = cache
        self.notes = {"library": os.environ.get("MQC_ONNX_OPS", "mqc's own")}
        self.state: Any = None
        self.image_prompt: Any = None

    def prefill(self, tokens: int) -> None:
        import torch

        from mqc.host import Prompt

        ids = torch.tensor(models.token_ids(tokens))
        positions = torch.arange(tokens).expand(3, -1)
        prompt = Prompt(ids, torch.zeros(tokens, dtype=torch.bool), positions, tokens)
        self.state = None
        self.state = self.host.prefill(self.engine, [prompt])

    def decode(self) -> None:
        import torch

        self.state = self.host.decode_step(self.engine, self.state, torch.tensor([100]))

    def _prompt(self) -> Any:
        if self.image_prompt is None:
            from mqc.host.prompt import messages_from

            messages = messages_from(models.QUESTION, [models.picture()])
            self.image_prompt = self.runnable.prompt(messages)
        return self.image_prompt

    def prompt(self) -> None:
        self.host.prefill(self.engine, [self._prompt()])

    def vision(self) -> None:
        self.engine.vision(self._prompt().vision_calls[0])
