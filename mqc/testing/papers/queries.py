"""Qwen-VL (arXiv 2308.12966): a pre-norm ViT, read by learned queries with fixed positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from mqc.capture.adapters import Adapter, register
from mqc.testing.papers.frame import PaperConfig, PaperModel, register_model
from mqc.testing.papers.resampler import Resampler, sincos_2d


class QueriesConfig(PaperConfig):
    """Configuration of :class:`QueriesModel`."""

    model_type = "paper_queries"


class Layer(nn.Module):
    """Pre-norm block; Q, K and V of one head stand together in the fused linear's output."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc = nn.Linear(width, config.intermediate_size)
        self.proj = nn.Linear(config.intermediate_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, rows, width = x.shape
        mixed = self.in_proj(self.ln_1(x)).view(images, rows, self.heads, -1)
        q, k, v = mixed.transpose(1, 2).split(width // self.heads, dim=-1)
        heads = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, rows, width)
        x = x + self.out_proj(heads)
        result: torch.Tensor = x + self.proj(gelu(self.fc(self.ln_2(x))))
        return result


class Tower(nn.Module):
    """ViT with a norm before its blocks, a resampler, a last norm and a projection."""

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        text: Any = config.text_config
        width, patch = vision.hidden_size, vision.patch_size
        self.grid = vision.image_size // patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.places = nn.Parameter(torch.randn(self.grid**2, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(text.hidden_size)
        self.layers = nn.ModuleList(Layer(vision) for _ in range(vision.num_hidden_layers))
        hidden, side = text.hidden_size, int(config.query_tokens**0.5)
        self.pool = Resampler(config.query_tokens, hidden, text.num_attention_heads, width)
        self.pool_places = nn.Parameter(sincos_2d(hidden, side, side), requires_grad=False)
        self.proj = nn.Parameter(torch.randn(hidden, hidden) * hidden**-0.5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, 3, side, side] -> [images, queries, hidden]."""
        x = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + self.places)
        for layer in self.layers:
            x = layer(x)
        x = self.pool(x, self._resized(), self.pool_places)
        rows: torch.Tensor = self.ln_post(x) @ self.proj
        return rows

    def _resized(self) -> torch.Tensor:
        """The queries' positions, resized to the grid of patches."""
        side = int(self.pool_places.shape[0] ** 0.5)
        plane = self.pool_places.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        wide = interpolate(plane, size=(self.grid, self.grid), mode="bicubic", align_corners=False)
        return wide.permute(0, 2, 3, 1).flatten(0, 2)


class QueriesModel(PaperModel):
    """A picture of one size becomes ``query_tokens`` rows."""

    def tower(self, config: PaperConfig) -> nn.Module:
        return Tower(config)


register_model(QueriesConfig, QueriesModel)
register("paper_queries")(Adapter)
