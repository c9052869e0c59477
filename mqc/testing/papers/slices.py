"""MiniCPM-V 2.6 (arXiv 2408.01800): slices of any shape, SigLIP, and a resampler on their grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention
from transformers import PreTrainedModel

from mqc.capture.adapters import Adapter, Call, DynamicSize, VisionInput, register
from mqc.testing.papers.frame import PaperConfig, PaperModel, register_model
from mqc.testing.papers.resampler import Resampler, sincos_2d

MOST = 8
"""Rows and columns of the largest grid of patches."""


class SlicesConfig(PaperConfig):
    """Configuration of :class:`SlicesModel`."""

    model_type = "paper_slices"


class Layer(nn.Module):
    """Pre-norm block with separate Q, K and V."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, patches, width] of one slice."""
        normed = self.norm_1(x)
        q, k, v = (
            part(normed).view(1, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        heads = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(heads)
        result: torch.Tensor = x + self.fc2(gelu(self.fc1(self.norm_2(x)), approximate="tanh"))
        return result


class Tower(nn.Module):
    """One slice at a time: its patches, and where they stand."""

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        text: Any = config.text_config
        width, hidden = vision.hidden_size, text.hidden_size
        self.patch = vision.patch_size
        self.patches = nn.Conv2d(3, width, self.patch, stride=self.patch)
        self.places = nn.Embedding(MOST**2, width)
        self.layers = nn.ModuleList(Layer(vision) for _ in range(vision.num_hidden_layers))
        self.norm, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(hidden)
        self.resampler = Resampler(config.query_tokens, hidden, text.num_attention_heads, width)
        self.grid: torch.Tensor
        self.register_buffer("grid", sincos_2d(hidden, MOST, MOST), persistent=False)
        self.proj = nn.Parameter(torch.randn(hidden, hidden) * hidden**-0.5)

    def encode(
        self, patches: torch.Tensor, places: torch.Tensor, grid: torch.Tensor
    ) -> torch.Tensor:
        """Patches [patches, 3 * side^2] of one slice -> [queries, hidden].

        ``places`` int64 [patches]: places in the tower's table (the slice stretched over all of
        it); ``grid`` int64 [patches]: places in the resampler's table.
        """
        x = linear(patches, self.patches.weight.flatten(1), self.patches.bias)
        x = (x + self.places(places))[None]
        for layer in self.layers:
            x = layer(x)
        x = self.resampler(self.norm(x), self.grid[grid], None)
        rows: torch.Tensor = (self.ln_post(x) @ self.proj)[0]
        return rows

    def forward(self, pixel_values: torch.Tensor, tgt_sizes: torch.Tensor) -> torch.Tensor:
        """[slices, 3, side, patches * side], zero-padded -> [slices, queries, hidden]."""
        rows = []
        for strip, size in zip(pixel_values, tgt_sizes.tolist(), strict=True):
            rows.append(self.encode(**_call(strip, size, self.patch)))
        return torch.stack(rows)


def _call(strip: torch.Tensor, size: list[int], patch: int) -> Call:
    """Inputs of :meth:`Tower.encode` for one slice of ``size`` (rows, columns) patches."""
    rows, columns = size
    strip = strip[..., : rows * columns * patch]
    patches = strip.unflatten(-1, (-1, patch)).permute(2, 0, 1, 3).flatten(1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    stretched = (y * MOST // rows) * MOST + x * MOST // columns
    return {"patches": patches, "places": stretched.flatten(), "grid": (y * MOST + x).flatten()}


class SlicesModel(PaperModel):
    """Every slice becomes ``query_tokens`` rows."""

    def tower(self, config: PaperConfig) -> nn.Module:
        return Tower(config)


register_model(SlicesConfig, SlicesModel)


@register("paper_slices")
class SlicesAdapter(Adapter):
    """One call is one slice: its patches in a row, and their places."""

    def vision_inputs(self) -> list[VisionInput]:
        count = DynamicSize("patches")
        features = 3 * self.vision_config.patch_size**2
        return [
            VisionInput("patches", (count, features), ("patch", None)),
            VisionInput("places", (count,), ("patch",), torch.int64),
            VisionInput("grid", (count,), ("patch",), torch.int64),
        ]

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = model.visual.encode(*inputs)
        return rows

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        pixels, sizes = processed.get("pixel_values"), processed.get("tgt_sizes")
        if pixels is None or sizes is None:
            return []
        patch = int(self.vision_config.patch_size)
        return [
            _call(strip, size, patch) for strip, size in zip(pixels, sizes.tolist(), strict=True)
        ]
