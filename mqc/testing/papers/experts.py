"""CogVLM2 and GLM-4V-9B (arXiv 2311.03079, 2406.12793): post-norm EVA2-CLIP and visual experts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from mqc.capture.adapters import Adapter, register
from mqc.testing.papers.frame import PaperConfig, PaperModel, register_model


class ExpertsConfig(PaperConfig):
    """Configuration of :class:`ExpertsModel`."""

    model_type = "paper_experts"


class Layer(nn.Module):
    """Post-norm block: what is added to the stream comes out of a norm, with gain and bias."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, rows, width = x.shape
        qkv = self.qkv(x).reshape(images, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        heads = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.norm_1(self.dense(heads.transpose(1, 2).reshape(images, rows, width)))
        result: torch.Tensor = x + self.norm_2(self.fc2(gelu(self.fc1(x))))
        return result


class Tower(nn.Module):
    """EVA2-CLIP, a convolution over 2 x 2 patches, a gated adapter, and rows around the image."""

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        text: Any = config.text_config
        width, patch, hidden = vision.hidden_size, vision.patch_size, text.hidden_size
        self.grid = vision.image_size // patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.randn(1, width))
        self.places = nn.Parameter(torch.randn(self.grid**2 + 1, width) * 0.1)
        self.layers = nn.ModuleList(Layer(vision) for _ in range(vision.num_hidden_layers))
        self.conv = nn.Conv2d(width, hidden, 2, stride=2)
        self.linear = nn.Linear(hidden, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.gate = nn.Linear(hidden, text.intermediate_size, bias=False)
        self.up = nn.Linear(hidden, text.intermediate_size, bias=False)
        self.down = nn.Linear(text.intermediate_size, hidden, bias=False)
        self.begin = nn.Parameter(torch.randn(1, 1, hidden))
        self.end = nn.Parameter(torch.randn(1, 1, hidden))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, 3, side, side] -> [images, 2 + (grid / 2)^2, hidden]."""
        images = pixel_values.shape[0]
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(images, 1, -1), x], dim=1) + self.places
        for layer in self.layers:
            x = layer(x)
        plane = x[:, 1:].reshape(images, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        x = self.conv(plane).flatten(2).transpose(1, 2)
        x = gelu(self.norm(self.linear(x)))
        x = self.down(silu(self.gate(x)) * self.up(x))
        ends = (part.expand(images, -1, -1) for part in (self.begin, self.end))
        return torch.cat([next(ends), x, next(ends)], dim=1) / 8.0


def image_positions(input_ids: torch.Tensor, image_token: int) -> torch.Tensor:
    """Positions int64 [tokens] of one sequence: all patches of an image share one.

    Its first and last row, which frame the patches, have positions of their own.
    """
    positions: list[int] = []
    following = 0
    for is_image, run in groupby(input_ids.tolist(), key=lambda token: token == image_token):
        count = len(list(run))
        if is_image:
            positions += [following, *[following + 1] * (count - 2), following + 2]
            following += 3
        else:
            positions += range(following, following + count)
            following += count
    return torch.tensor(positions)


class ExpertsModel(PaperModel):
    """Visual rows have weights of their own in every linear of the language model."""

    experts = 2

    def tower(self, config: PaperConfig) -> nn.Module:
        return Tower(config)

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([image_positions(row, self.config.image_token_id) for row in input_ids])


register_model(ExpertsConfig, ExpertsModel)


@register("paper_experts")
class ExpertsAdapter(Adapter):
    """Images of one size; the decoder is told which rows are visual."""

    takes_modality = True

    def decoder_arguments(
        self, side: list[torch.Tensor], modality: torch.Tensor | None
    ) -> dict[str, Any]:
        return {"modality": modality}

    def position_ids(
        self, input_ids: torch.Tensor, processed: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int]:
        positions = image_positions(input_ids, self.image_token_id)
        return positions, int(positions[-1]) + 1
