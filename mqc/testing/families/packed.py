"""Families whose images have any size: tiles that are packed, and grids without a tile."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PretrainedConfig,
)

from mqc.testing.families.frame import IMAGE, Family, Generator, Image, text_config
from mqc.testing.families.towers import clip, pixtral, siglip

_PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]
_MOST_TILES = 5
_IMAGE = {"image_token_index": IMAGE, "image_token_id": IMAGE}


def _llava_next() -> PretrainedConfig:
    return LlavaNextConfig(
        text_config=text_config("llama", 140),
        vision_config=clip(),
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-2,
        **_IMAGE,
    )


def _llava_onevision() -> PretrainedConfig:
    return LlavaOnevisionConfig(
        text_config=text_config("qwen2", 148),
        vision_config=siglip(vision_use_head=False),
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_2",
        video_token_id=8,
        **_IMAGE,
    )


def _mistral3() -> PretrainedConfig:
    return Mistral3Config(
        text_config=text_config("mistral", 140, head_dim=12, sliding_window=None),
        vision_config=pixtral(),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **_IMAGE,
    )


def _pixtral() -> PretrainedConfig:
    return LlavaConfig(
        text_config=text_config("mistral", 148, head_dim=12, sliding_window=None),
        vision_config=pixtral(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **_IMAGE,
    )


def _tiled_image(config: Any, size: tuple[int, int], generator: Generator) -> Image:
    """An image of ``size`` pixels (height, width) as a base tile and the tiles of its grid."""
    from mqc.capture import adapter_for

    adapter: Any = adapter_for(config)
    side = config.vision_config.image_size
    pixels = torch.randn(_MOST_TILES, 3, side, side, generator=generator)
    tiles = adapter.tiles(list(size))
    pixels[tiles:] = 0.0
    values = {"pixel_values": pixels[None], "image_sizes": torch.tensor([size])}
    (call,) = adapter.vision_calls(values)
    return Image(len(call["pack_index"]), values)


def _plain_image(config: Any, size: tuple[int, int], generator: Generator) -> Image:
    """An image of ``size`` pixels (height, width), padded to the largest."""
    vision = config.vision_config
    height, width = size
    pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)
    pixels[:, :, :height, :width] = torch.randn(1, 3, height, width, generator=generator)
    step = vision.patch_size * getattr(config, "spatial_merge_size", 1)
    tokens = (height // step) * (width // step)
    return Image(tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([size])})


PACKED = {
    "llava_next": Family(_llava_next, ((16, 24), (30, 14), (16, 16), (9, 40)), _tiled_image),
    "llava_onevision": Family(
        _llava_onevision, ((30, 31), (16, 24), (12, 30), (32, 32)), _tiled_image
    ),
    "mistral3": Family(_mistral3, ((16, 24), (8, 16), (24, 24)), _plain_image),
    "llava:pixtral": Family(_pixtral, ((8, 12), (4, 16), (12, 12)), _plain_image),
}
