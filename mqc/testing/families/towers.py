"""Small vision towers that several families share."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 74,
    "image_size": 16,
    "patch_size": 4,
}


def clip() -> dict[str, Any]:
    """A CLIP tower; three layers, since families read the states before the last."""
    more = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 40}
    return _SIZES | more


def siglip(**more: Any) -> dict[str, Any]:
    """A SigLIP tower."""
    return _SIZES | {"model_type": "siglip_vision_model"} | more


def pixtral() -> dict[str, Any]:
    """A Pixtral tower for images of up to 24 pixels a side."""
    return _SIZES | {"model_type": "pixtral", "image_size": 24, "head_dim": 20}


def plain(**more: Any) -> dict[str, Any]:
    """The sizes alone, for families with a tower of their own."""
    return _SIZES | more
