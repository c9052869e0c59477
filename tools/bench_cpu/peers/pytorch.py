"""torch in bfloat16, through transformers' own model with its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench_cpu import models


def prepare(name: str, part: str, cache: Path) -> None:
    """Make the checkpoint."""
    models.multimodal(cache)


def open_peer(name: str, part: str, cache: Path, threads: int) -> Any:
    """The whole model, or linears."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return Linears() if part == "linears" else Model(cache)


class Model:
    """Qwen2-VL as transformers runs it (scaled dot product attention)."""

    def __init__(self, cache: Path) -> None:
        from transformers import Qwen2VLForConditionalGeneration

        folder = models.multimodal(cache)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.eval()
        self.inputs = models.processed_prompt(cache)
        self.inputs["pixel_values"] = self.inputs["pixel_values"].to(torch.bfloat16)
        self.past: Any = None
        self.length = 0

    def _text(self, ids: list[int], start: int) -> None:
        positions = torch.arange(start, start + len(ids)).expand(3, 1, -1)
        out = self.model(
            input_ids=torch.tensor([ids]),
            position_ids=positions,
            past_key_values=self.past,
            use_cache=True,
            logits_to_keep=1,
        )
        self.past, self.length = out.past_key_values, start + len(ids)

    def prefill(self, tokens: int) -> None:
        self.past = None
        self._text(models.token_ids(tokens), 0)

    def decode(self) -> None:
        self._text([100], self.length)

    def prompt(self) -> None:
        self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    def vision(self) -> None:
        inputs = self.inputs
        self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])


class Linears:
    """Products with a bfloat16 matrix."""

    def linear(self, request: dict[str, Any]) -> Any:
        k, n, m, copies = (request[name] for name in ("k", "n", "m", "copies"))
        weights = [torch.randn(n, k).to(torch.bfloat16) for _ in range(copies)]
        x = torch.randn(m, k).to(torch.bfloat16)

        def run() -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

        run()
        return run
