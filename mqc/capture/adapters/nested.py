"""Tiles that come as [conversations, tiles, 3, height, width], padded with blank ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from mqc.capture.adapters.base import Adapter, Call, base_model
from mqc.capture.adapters.registry import register
from mqc.errors import UsageError


@register("idefics3", "smolvlm")
class NestedTilesAdapter(Adapter):
    """Idefics3, SmolVLM: square tiles, each with its own run of image tokens in the prompt."""

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        base = base_model(model)
        features = base.connector(base.vision_model(pixel_values=inputs[0]).last_hidden_state)
        return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        pixels = processed.get("pixel_values")
        if pixels is None:
            return []
        tiles = torch.as_tensor(pixels).flatten(0, -4)
        real = tiles.flatten(1).ne(0).any(-1)
        mask = processed.get("pixel_attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).flatten(0, -3)[real].all()):
            raise UsageError(
                "an image is padded inside its tile, which the compiled tower does not take",
                hint="let the processor split images (do_image_splitting) or resize them",
            )
        return super().vision_calls({**processed, "pixel_values": tiles[real]})

    def tokens_per_tile(self) -> int | None:
        vision = self.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2  # type: ignore[no-any-return]
