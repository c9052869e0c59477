"""Families whose towers take tiles or images of a fixed size."""

from __future__ import annotations

from transformers import InternVLConfig, LlavaConfig, PretrainedConfig

from mqc.testing.families.frame import IMAGE, Family, text_config


def _llava() -> PretrainedConfig:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 74,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 40,
    }
    return LlavaConfig(
        text_config=text_config("llama", 140),
        vision_config=vision,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )


def _internvl() -> PretrainedConfig:
    vision = {
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 74,
        "image_size": [16, 16],
        "patch_size": [4, 4],
        "attention_bias": True,
    }
    return InternVLConfig(
        text_config=text_config("qwen2", 74),
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


TILES = {
    "llava": Family(_llava),
    "internvl": Family(_internvl),
}
