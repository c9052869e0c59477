"""Families whose prompts are not causal throughout: image or prefix tokens see each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mqc.capture.adapters.base import Adapter
from mqc.capture.adapters.registry import register


@register("gemma3")
class ImageBlocksAdapter(Adapter):
    """Gemma3: the tokens of one image attend each other both ways."""

    def attention_blocks(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        image = input_ids == self.image_token_id
        if not bool(image.any()):
            return None
        starts = image & ~torch.nn.functional.pad(image, (1, 0))[:-1]
        return torch.where(image, starts.to(torch.int64).cumsum(0) - 1, -1)


@register("paligemma")
class PrefixAdapter(Adapter):
    """PaliGemma: the whole prompt attends itself both ways; positions count from 1."""

    def attention_blocks(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(input_ids)

    def position_ids(
        self, input_ids: torch.Tensor, processed: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int]:
        positions, following = super().position_ids(input_ids, processed)
        return positions + 1, following + 1
