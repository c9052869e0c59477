"""Tiny models with random weights, one row per family, for tests that need any model at all.

Every family has dimensions that are no powers of two (hidden 48 = 12 * 4, intermediate 148, 140
or 74), grouped key/value heads, two layers in each tower, and random norm gains and biases, so
that a pass that forgets one of them fails. To add a family, write a function from nothing to a
configuration and put it into :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

IMAGE = 7
"""Token id of an image placeholder in every family."""
VOCABULARY = 96
HIDDEN = 48
_START, _END, _FIRST_TEXT = 3, 4, 20


def _text(model_type: str, intermediate: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _qwen2_vl() -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {
        "depth": 2,
        "embed_dim": 40,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "mlp_ratio": 3,
        "patch_size": 4,
    }
    return Qwen2VLConfig(
        text_config=_text("qwen2_vl_text", 148, rope_parameters=rope),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=8,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        tie_word_embeddings=True,
    )


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
        text_config=_text("llama", 140),
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
        text_config=_text("qwen2", 74),
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_vl": _qwen2_vl,
    "llava": _llava,
    "internvl": _internvl,
}
"""Configuration of each family by its name, which is also its ``model_type``."""


@dataclass
class Image:
    """One random image as a processor would give it.

    ``size`` counts tiles of a tiled family (1 is one tile), or is the (height, width) of the patch
    grid of a family with a variable one.
    """

    tokens: int
    values: dict[str, torch.Tensor]


def build_family(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of family ``name`` and one sample: two images of different sizes with text.

    The sample is a dict as the family's processor returns it: ``input_ids`` [1, tokens],
    ``attention_mask``, ``pixel_values`` and, where the family has them, ``image_grid_thw`` and
    ``mm_token_type_ids``. Raises ``KeyError`` for an unknown family.
    """
    config = FAMILIES[name]()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise)
            else:
                parameter.mul_(4.0)
    model = model.to(dtype).eval().requires_grad_(False)
    sizes: list[Any] = [(4, 6), (2, 8)] if name == "qwen2_vl" else [1, 2]
    images = [make_image(config, size, generator) for size in sizes]
    return model, sample(config, [images], generator=generator, dtype=dtype)


def make_image(
    config: PretrainedConfig, size: Any, generator: torch.Generator | None = None
) -> Image:
    """A random image of ``size`` (see :class:`Image`) for a model of configuration ``config``."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        height, width = size
        features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return Image(
            height * width // vision.spatial_merge_size**2,
            {
                "pixel_values": torch.randn(height * width, features, generator=generator),
                "image_grid_thw": torch.tensor([[1, height, width]]),
            },
        )
    side = vision.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    pixels = torch.randn(size, 3, height, width, generator=generator)
    return Image(size * config.image_seq_length, {"pixel_values": pixels})


def sample(
    config: PretrainedConfig,
    rows: list[list[Image]],
    text: int = 5,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """A batch: per row its images with random text between and after; padded on the left."""
    ids: list[list[int]] = []
    for images in rows:
        row = [1]
        for image in images:
            row += [_START, *[IMAGE] * image.tokens, _END, *_words(2, generator)]
        ids.append(row + _words(text, generator))
    length = max(map(len, ids))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    batch = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
    images = [image for row in rows for image in row]
    for key in images[0].values if images else ():
        value = torch.cat([image.values[key] for image in images])
        batch[key] = value.to(dtype) if value.is_floating_point() else value
    if "image_grid_thw" in batch:
        batch["mm_token_type_ids"] = (input_ids == IMAGE).int()
    return batch


def _words(count: int, generator: torch.Generator | None) -> list[int]:
    words: list[int] = torch.randint(
        _FIRST_TEXT, VOCABULARY, (count,), generator=generator
    ).tolist()
    return words
