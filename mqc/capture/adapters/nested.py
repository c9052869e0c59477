"""Tiles that come as [conversations, tiles, 3, height, width], padded with blank ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from mqc.capture.adapters.base import Adapter, Call, base_model
from mqc.capture.adapters.registry import register
from mqc.errors import UsageError


@register("idefics3")
class NestedTilesAdapter(Adapter):
    """Idefics3, SmolVLM: square tiles, each with its own run of image tokens in the prompt."""

    def prepare(self, model: PreTrainedModel) -> None:
        self.places = _places(base_model(model).vision_model.embeddings)

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        base = base_model(model)
        tower, embeddings = base.vision_model, base.vision_model.embeddings
        patches = embeddings.patch_embedding(inputs[0]).flatten(2).transpose(1, 2)
        hidden = patches + embeddings.position_embedding(self.places)
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        features = base.connector(tower.post_layernorm(hidden))
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


@register("smolvlm")
class FramesAsTilesAdapter(NestedTilesAdapter):
    """SmolVLM: a frame of a video is one tile, given as the tiles of images are."""

    video_reader = "SmolVLMVideoProcessor"
    mixes_media = False


def _places(embeddings: Any) -> torch.Tensor:
    """Position numbers int64 [1, patches] of a whole tile, as the model's own code finds them.

    That code looks fractions of the tile up in a table; with neither patches nor embeddings, it
    returns the numbers themselves.
    """
    count = embeddings.num_patches_per_side
    bare = SimpleNamespace(
        patch_size=embeddings.patch_size,
        num_patches_per_side=count,
        patch_embedding=lambda pixels: torch.zeros(1, 1, count, count, dtype=torch.int64),
        position_embedding=lambda numbers: numbers[..., None],
    )
    side = count * embeddings.patch_size
    whole = torch.ones(1, count, count, dtype=torch.bool)
    numbers: torch.Tensor = type(embeddings).forward(bare, torch.zeros(1, 3, side, side), whole)
    return numbers[..., 0]
