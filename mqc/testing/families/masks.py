"""Families with masks of their own: image blocks, prefixes, sliding windows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma3Config, PaliGemmaConfig, PretrainedConfig

from mqc.testing.families.frame import (
    END,
    HIDDEN,
    IMAGE,
    START,
    Family,
    Generator,
    Image,
    text_config,
)
from mqc.testing.families.towers import siglip


def _gemma3() -> PretrainedConfig:
    text = text_config(
        "gemma3_text",
        148,
        head_dim=12,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=12,
    )
    return Gemma3Config(
        text_config=text,
        vision_config=siglip(vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _paligemma() -> PretrainedConfig:
    return PaliGemmaConfig(
        text_config=text_config("gemma", 140, head_dim=12),
        vision_config=siglip(vision_use_head=False, projection_dim=HIDDEN, num_image_tokens=16),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )


def _square(tokens: int) -> Any:
    """Images of one tile that becomes ``tokens`` visual tokens; ``size`` counts nothing."""

    def image(config: Any, size: int, generator: Generator) -> Image:
        side = config.vision_config.image_size
        pixels = torch.randn(1, 3, side, side, generator=generator)
        return Image(tokens, {"pixel_values": pixels})

    return image


def _image_types(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """1 at image tokens, which see each other both ways."""
    return {"token_type_ids": (batch["input_ids"] == IMAGE).long()}


def _prefix_types(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """0 everywhere: the prompt is a prefix that sees itself both ways."""
    return {"token_type_ids": torch.zeros_like(batch["input_ids"])}


MASKS = {
    "gemma3": Family(_gemma3, (1, 1), _square(4), _image_types),
    "paligemma": Family(_paligemma, (1, 1), _square(16), _prefix_types),
}
