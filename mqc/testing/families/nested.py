"""Families whose images are square tiles, each with its own run of placeholders."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Idefics3Config, PretrainedConfig, SmolVLMConfig

from mqc.testing.families.frame import END, IMAGE, START, Family, Generator, Image, text_config
from mqc.testing.families.towers import plain

_PER_TILE = 4


def _idefics3() -> PretrainedConfig:
    return Idefics3Config(
        text_config=text_config("llama", 140),
        vision_config=plain(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def _smolvlm() -> PretrainedConfig:
    return SmolVLMConfig(
        text_config=text_config("llama", 148, max_position_embeddings=512),
        vision_config=plain(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def _tiles(config: Any, size: int, generator: Generator) -> Image:
    """``size`` tiles with text tokens around each."""
    side = config.vision_config.image_size
    pixels = torch.randn(size, 3, side, side, generator=generator)
    runs = [token for _ in range(size) for token in (START, *[IMAGE] * _PER_TILE)]
    return Image(size * _PER_TILE, {"pixel_values": pixels}, [*runs, END])


def _nest(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tiles as those of one conversation, with blank ones as the processor adds them."""
    if "pixel_values" not in batch:
        return {}
    tiles = batch["pixel_values"]
    return {"pixel_values": torch.cat([tiles, torch.zeros_like(tiles[:1])])[None]}


NESTED = {
    "idefics3": Family(_idefics3, (1, 3, 2), _tiles, _nest),
    "smolvlm": Family(_smolvlm, (1, 3, 2), _tiles, _nest),
}
