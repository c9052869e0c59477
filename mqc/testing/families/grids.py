"""Families whose towers take flat patches of a variable grid."""

from __future__ import annotations

from typing import Any

from transformers import (
    Glm4vConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

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


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], **more}


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
        text_config=text_config("qwen2_vl_text", 148, rope_parameters=_rope()),
        vision_config=vision,
        **_TOKENS,
        tie_word_embeddings=True,
    )


def _tower(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 40,
        "intermediate_size": 76,
        "out_hidden_size": HIDDEN,
        "num_heads": 2,
        "patch_size": 4,
        "in_channels": 3,
        **more,
    }


def _qwen2_5_vl() -> PretrainedConfig:
    return Qwen2_5_VLConfig(
        text_config=text_config("qwen2_5_vl_text", 140, rope_parameters=_rope()),
        vision_config=_tower(window_size=16, fullatt_block_indexes=[1]),
        **_TOKENS,
        tie_word_embeddings=False,
    )


def _qwen3_vl() -> PretrainedConfig:
    rope = _rope(mrope_interleaved=True)
    tower = _tower(depth=3, num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    return Qwen3VLConfig(
        text_config=text_config("qwen3_vl_text", 140, head_dim=12, rope_parameters=rope),
        vision_config=tower,
        **_TOKENS,
        tie_word_embeddings=True,
    )


def _qwen3_vl_moe() -> PretrainedConfig:
    text = text_config(
        "qwen3_vl_moe_text",
        148,
        head_dim=12,
        rope_parameters=_rope(mrope_interleaved=True),
        moe_intermediate_size=40,
        num_experts=3,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        decoder_sparse_step=1,
    )
    return Qwen3VLMoeConfig(
        text_config=text,
        vision_config=_tower(num_position_embeddings=36, deepstack_visual_indexes=[0]),
        **_TOKENS,
        tie_word_embeddings=False,
    )


def _glm4v() -> PretrainedConfig:
    rope = _rope(mrope_section=[1, 1, 1], partial_rotary_factor=0.5)
    return Glm4vConfig(
        text_config=text_config("glm4v_text", 140, rope_parameters=rope),
        vision_config=_tower(image_size=24),
        image_token_id=IMAGE,
        video_token_id=8,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=5,
        video_end_token_id=6,
        tie_word_embeddings=False,
    )


_SIZES = ((4, 6), (2, 8), (2, 2), (12, 10))
GRIDS = {
    "qwen2_vl": Family(_qwen2_vl, _SIZES, flat_patches, token_types),
    "qwen2_5_vl": Family(_qwen2_5_vl, _SIZES, flat_patches, token_types),
    "qwen3_vl": Family(_qwen3_vl, _SIZES, flat_patches, token_types),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, _SIZES, flat_patches, token_types),
    "glm4v": Family(_glm4v, _SIZES, flat_patches, token_types),
}
