"""Families whose connector is a Q-Former: learned queries that attend to the image."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Blip2Config, InstructBlipConfig, PretrainedConfig

from mqc.testing.families.frame import (
    HIDDEN,
    IMAGE,
    VOCABULARY,
    Family,
    Generator,
    Image,
    text_config,
)
from mqc.testing.families.towers import plain

_QUERIES = 4


def _qformer(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "encoder_hidden_size": 40,
        **more,
    }


def _blip2() -> PretrainedConfig:
    text = {
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 140,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Blip2Config(
        text_config=text,
        vision_config=plain(),
        qformer_config=_qformer(),
        num_query_tokens=_QUERIES,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )


def _instructblip() -> PretrainedConfig:
    return InstructBlipConfig(
        text_config=text_config("llama", 140),
        vision_config=plain(),
        qformer_config=_qformer(),
        num_query_tokens=_QUERIES,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )


def _image(config: Any, size: int, generator: Generator) -> Image:
    """One picture; ``size`` is the number of words of the instruction that the queries read."""
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=generator)
    return Image(_QUERIES, {"pixel_values": pixels})


def _instructed_image(config: Any, size: int, generator: Generator) -> Image:
    """:func:`_image` with an instruction of ``size`` words, padded to six."""
    image = _image(config, size, generator)
    words = torch.randint(20, VOCABULARY, (1, 6), generator=generator)
    mask = (torch.arange(6) < size).long()[None]
    image.values |= {"qformer_input_ids": words * mask, "qformer_attention_mask": mask}
    return image


QUERIES = {
    "blip-2": Family(_blip2, (1, 1), _image),
    "instructblip": Family(_instructblip, (3, 6), _instructed_image),
}
