"""The embedded models as runnables and as transformers models, made once a test process."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from shared import shared_program
from transformers import AutoModelForImageTextToText

from mqc.capture import adapter_for, capture, load_processor
from mqc.host import ProgramEngine, Runnable, messages_from
from mqc.ir import Program
from mqc.models import embedded_model_path
from mqc.testing import vqa

NAMES = ("tiny-qwen2-vl", "tiny-llava", "tiny-internvl")

Messages = list[dict[str, Any]]


@cache
def program(name: str) -> Program:
    return shared_program(name, lambda: capture(embedded_model_path(name)))


@cache
def runnable(name: str) -> Runnable:
    """The captured float model (float32)."""
    path = embedded_model_path(name)
    return Runnable(ProgramEngine(program(name)), load_processor(path), adapter_for(path))


@cache
def hf_model(name: str) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(
        embedded_model_path(name), dtype=torch.float32
    )
    return model.eval()


@cache
def conversations() -> dict[str, Messages]:
    """Text only, one image, several images, images between text, images at the end."""
    first, second = (vqa.sample("evaluation", index) for index in range(2))
    wide = vqa.sample("evaluation", 2, image_size=(64, 128))
    interleaved = [
        {"type": "text", "text": "first"},
        {"type": "image", "image": first.image},
        {"type": "text", "text": "then"},
        {"type": "image", "image": second.image},
        {"type": "text", "text": "what is at row 1 column 1 ?"},
    ]
    last = [{"type": "text", "text": "how many ?"}, {"type": "image", "image": wide.image}]
    return {
        "text": messages_from("what is red ?"),
        "image": vqa.messages(first),
        "images": messages_from("read row 1 .", [first.image, wide.image]),
        "interleaved": [{"role": "user", "content": interleaved}],
        "last": [{"role": "user", "content": last}],
    }
