"""Families with a visual vocabulary, a merging tower, or nothing special at all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekVLConfig,
    MiniCPMV4_6Config,
    MiniCPMV4_7Config,
    Ovis2Config,
    PretrainedConfig,
)

from mqc.testing.families.frame import (
    END,
    HIDDEN,
    IMAGE,
    START,
    VOCABULARY,
    Family,
    Generator,
    Image,
    text_config,
    token_types,
)


def _siglip(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 74,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
        **more,
    }


def _deepseek_vl() -> PretrainedConfig:
    return DeepseekVLConfig(
        text_config=text_config("llama", 140),
        vision_config=_siglip(),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _squares(config: Any, size: int, generator: Generator) -> Image:
    """``size`` images of the tower's fixed size with 16 tokens each, one after the other."""
    pixels = torch.randn(size, 3, 16, 16, generator=generator)
    return Image(16 * size, {"pixel_values": pixels}, [START, *[IMAGE] * 16, END] * size)


_INDICATORS = [8, 9, 10, 11, 12]


def _ovis2() -> PretrainedConfig:
    vision = {
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 76,
        "image_size": 16,
        "patch_size": 4,
        "vocab_size": 35,
        "hidden_stride": 2,
        "num_visual_indicator_tokens": len(_INDICATORS),
        "qkv_bias": True,
        "mlp_bias": True,
    }
    return Ovis2Config(
        text_config=text_config("qwen2", 140),
        vision_config=vision,
        image_token_id=IMAGE,
        visual_indicator_token_ids=_INDICATORS,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )


def _framed(config: Any, size: int, generator: Generator) -> Image:
    """A small picture, then ``size`` tiles in one row, each of 4 tokens, with indicators."""
    pixels = torch.randn(1 + size, 3, 16, 16, generator=generator)
    start, end, between, _, grid = _INDICATORS
    ids = [start, *[IMAGE] * 4, grid]
    for place in range(size):
        ids += [*[IMAGE] * 4, between if place < size - 1 else end]
    return Image(4 * (1 + size), {"pixel_values": pixels}, ids)


def _minicpm(text: dict[str, Any]) -> dict[str, Any]:
    vision = {
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 74,
        "image_size": 24,
        "patch_size": 4,
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "insert_layer_id": 1,
        "image_size": 24,
        "image_token_id": IMAGE,
        "video_token_id": 8,
        "tie_word_embeddings": False,
    }


def _strip(config: Any, size: tuple[int, int], generator: Generator) -> Image:
    """A grid of ``size`` patches; the batch puts all its images into one strip."""
    height, width = size
    patch = config.vision_config.patch_size
    pixels = torch.randn(1, 3, patch, patch * height * width, generator=generator)
    values = {"pixel_values": pixels, "target_sizes": torch.tensor([[height, width]])}
    return Image(height * width // 16, values, axes={"pixel_values": -1})


def _hybrid() -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 1],
        "mrope_interleaved": True,
    }
    return text_config(
        "qwen3_5_text",
        140,
        head_dim=12,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=12,
        linear_value_head_dim=10,
        linear_conv_kernel_dim=4,
        rope_parameters=rope,
    )


def _minicpmv4_6() -> PretrainedConfig:
    return MiniCPMV4_6Config(**_minicpm(_hybrid()))


def _minicpmv4_6_dense() -> PretrainedConfig:
    return MiniCPMV4_6Config(**_minicpm(text_config("qwen3", 140, head_dim=12)))


def _minicpmv4_7() -> PretrainedConfig:
    markers = {
        "image_start_id": START,
        "image_end_id": END,
        "slice_start_id": 9,
        "slice_end_id": 10,
        "newline_id": 11,
    }
    return MiniCPMV4_7Config(**_minicpm(_hybrid()), **markers)


_STRIPS = ((4, 8), (4, 4), (8, 12), (12, 4))
MORE = {
    "deepseek_vl": Family(_deepseek_vl, (1, 2, 3), _squares),
    "ovis2": Family(_ovis2, (1, 2, 4), _framed),
    "minicpmv4_6": Family(_minicpmv4_6, _STRIPS, _strip),
    "minicpmv4_6:dense": Family(_minicpmv4_6_dense, _STRIPS, _strip),
    "minicpmv4_7": Family(_minicpmv4_7, _STRIPS, _strip, token_types),
}
