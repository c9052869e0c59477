"""Towers over one image of any size, with positions on its grid: Pixtral and what uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from mqc.capture.adapters.base import Adapter, Call, DynamicSize, VisionInput, base_model
from mqc.capture.adapters.registry import register


@register("llava:pixtral")
class AnySizeAdapter(Adapter):
    """One call is one image as flat patches, ordered so that merged neighbours stand together.

    ``pixel_values`` [patches, channels * side^2] and ``position_ids`` int64 [patches, 2] (row,
    column). Attention sees all patches, so their order is free.
    """

    @property
    def merge(self) -> int:
        """Patches along one side that become one visual token."""
        return int(getattr(self.config, "spatial_merge_size", 1))

    def vision_inputs(self) -> list[VisionInput]:
        vision = self.vision_config
        patches = DynamicSize("blocks", self.merge**2)
        return [
            VisionInput(
                "pixel_values",
                (patches, vision.num_channels * vision.patch_size**2),
                ("patch", None),
            ),
            VisionInput("position_ids", (patches, 2), ("patch", None), torch.int64),
        ]

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        base = base_model(model)
        states = self._states(base.vision_tower, *inputs)
        layers = self.config.vision_feature_layer
        chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]
        features = torch.cat(chosen, -1) if chosen[1:] else chosen[0]
        return self.connect(base.multi_modal_projector, features[0])

    def connect(self, projector: Any, features: torch.Tensor) -> torch.Tensor:
        """The connector: features [patches, channels] -> [visual tokens, hidden]."""
        result: torch.Tensor = projector(features)
        return result

    def _states(
        self, tower: Any, pixels: torch.Tensor, positions: torch.Tensor
    ) -> list[torch.Tensor]:
        """States before the first and after every layer, each [1, patches, channels]."""
        patches = torch.nn.functional.linear(pixels, tower.patch_conv.weight.flatten(1))
        hidden = tower.ln_pre(patches[None])
        rotary = tower.patch_positional_embedding(hidden, positions)
        states = [hidden]
        for layer in tower.transformer.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
            states.append(hidden)
        return states

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        """``pixel_values`` [images, channels, height, width] and the true ``image_sizes``."""
        pixels = processed.get("pixel_values")
        if pixels is None:
            return []
        images = [torch.as_tensor(image) for image in pixels]
        sizes = processed.get("image_sizes")
        shapes = (
            [list(image.shape[-2:]) for image in images]
            if sizes is None
            else torch.as_tensor(sizes).reshape(-1, 2).tolist()
        )
        return [self._call(image, size) for image, size in zip(images, shapes, strict=True)]

    def _call(self, image: torch.Tensor, size: list[int]) -> Call:
        patch, merge = int(self.vision_config.patch_size), self.merge
        rows, columns = (length // patch // merge for length in size)
        image = image[:, : rows * merge * patch, : columns * merge * patch]
        parts = image.reshape(-1, rows, merge, patch, columns, merge, patch)
        flat = parts.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns * merge**2, -1)
        grid = torch.cartesian_prod(torch.arange(rows * merge), torch.arange(columns * merge))
        blocks = grid.reshape(rows, merge, columns, merge, 2).transpose(1, 2)
        return {"pixel_values": flat, "position_ids": blocks.reshape(-1, 2)}


@register("mistral3")
class MergedAnySizeAdapter(AnySizeAdapter):
    """Mistral3: the same tower, whose patches are merged in squares by a linear layer."""

    def connect(self, projector: Any, features: torch.Tensor) -> torch.Tensor:
        features = projector.norm(features)
        width, each = features.shape[-1], self.merge**2
        # The model's columns count (channel, place); here a square's places stand side by side.
        weight = projector.patch_merger.merging_layer.weight
        columns = weight.reshape(weight.shape[0], width, each).transpose(1, 2).flatten(1)
        merged = torch.nn.functional.linear(features.reshape(-1, each * width), columns)
        result: torch.Tensor = projector.linear_2(projector.act(projector.linear_1(merged)))
        return result
