"""Families whose towers take flat patches of a variable grid."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2VLConfig

from mqc.testing.families.frame import (
    END,
    HIDDEN,
    IMAGE,
    START,
    Family,
    flat_patches,
    text_config,
    token_types,
)

_ROPE: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 2, 2],
}
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 8,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _qwen2_vl() -> PretrainedConfig:
    vision = {
        "depth": 2,
        "embed_dim": 40,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "mlp_ratio": 3,
        "patch_size": 4,
    }
    return Qwen2VLConfig(
        text_config=text_config("qwen2_vl_text", 148, rope_parameters=_ROPE),
        vision_config=vision,
        **_TOKENS,
        tie_word_embeddings=True,
    )


GRIDS = {
    "qwen2_vl": Family(_qwen2_vl, ((4, 6), (2, 8), (2, 2), (12, 10)), flat_patches, token_types),
}
