"""The training's own forward passes compute what transformers' classes compute."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-llava", "tiny-internvl"])
def test_forward_is_that_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    architectures = importlib.import_module("tiny_vlm.architectures")
    training = importlib.import_module("tiny_vlm.training")
    torch.manual_seed(0)
    model, processor = architectures.MODELS[name]()
    assert training.check_forward(name, model, processor) < 1e-5
