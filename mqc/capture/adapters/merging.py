"""Grid towers that merge windows of patches on the way, packed in one long strip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_nearest_position_ids

from mqc.capture.adapters.base import (
    Adapter,
    Call,
    DynamicSize,
    Features,
    VisionInput,
    base_model,
)
from mqc.capture.adapters.grid import rope_positions
from mqc.capture.adapters.registry import register
from mqc.capture.segments import use_segment_attention
from mqc.errors import CaptureError


@register("minicpmv4_6")
class MergingGridAdapter(Adapter):
    """Windows of 2x2 patches become one inside the tower, and 2x2 of these one visual token.

    The processor gives ``pixel_values`` [1, channels, patch, patch * patches], all images in one
    strip, and ``target_sizes`` [images, 2] (rows and columns of patches); frames of videos come in
    a strip of their own. A call takes one image's or frame's patches as rows, and the orders in
    which each merge reads them.
    """

    video_reader = "MiniCPMV4_6VideoProcessor"

    def prepare(self, model: PreTrainedModel) -> None:
        if self.config.downsample_mode != "16x":
            raise CaptureError(
                f"downsample_mode {self.config.downsample_mode!r} is not supported",
                hint='set "downsample_mode": "16x" in config.json',
            )
        use_segment_attention(model)

    @property
    def merges(self) -> list[tuple[int, int]]:
        """Height and width of the windows of each merge, the tower's own first."""
        rounds = [tuple(self.config.merge_kernel_size)] * int(self.config.merger_times)
        return [tuple(self.vision_config.window_kernel_size), *rounds]

    def vision_inputs(self) -> list[VisionInput]:
        vision = self.vision_config
        features = int(vision.num_channels) * int(vision.patch_size) ** 2
        sizes = [height * width for height, width in self.merges]
        counts = [1]
        for size in reversed(sizes):
            counts.insert(0, counts[0] * size)
        patches = DynamicSize("blocks", counts[0])
        return [
            VisionInput("pixel_values", (patches, features), ("patch", None)),
            VisionInput("position_ids", (patches,), ("patch",), torch.int64),
            *(
                VisionInput(
                    f"merge_{place}",
                    (DynamicSize("blocks", count) if count > 1 else DynamicSize("blocks"),),
                    (None,),
                    torch.int64,
                )
                for place, count in enumerate(counts[:-1])
            ),
        ]

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> Features:
        pixels, positions, first, *later = inputs
        base = base_model(model)
        tower, merger = base.vision_tower, base.merger
        patches = tower.embeddings.patch_embedding
        hidden = linear(pixels, patches.weight.flatten(1), patches.bias)
        hidden = (hidden + tower.embeddings.position_embedding(positions))[None]
        # Two boundaries mean "one segment" (mqc.capture.segments).
        whole = {"cu_seqlens": torch.zeros(2, dtype=torch.int32), "max_seqlen": 1}
        for place, layer in enumerate(tower.encoder.layers):
            hidden = layer(hidden, attention_mask=None, **whole)
            if place == self.vision_config.insert_layer_id:
                hidden = self._merge(tower.vit_merger, hidden, first, whole)
        rows: torch.Tensor = tower.post_layernorm(hidden)[0]
        for order, mlp in zip(later, merger.mlp, strict=True):
            size = mlp.linear_1.in_features // rows.shape[-1]
            rows = mlp(rows[order].reshape(-1, size * rows.shape[-1]))
        return rows

    @staticmethod
    def _merge(
        merger: Any, hidden: torch.Tensor, order: torch.Tensor, whole: dict[str, Any]
    ) -> torch.Tensor:
        """One window of patches -> their mean, plus attention and a feed-forward over them."""
        size = merger.window_kernel_size[0] * merger.window_kernel_size[1]
        width = hidden.shape[-1]
        windows = hidden[0, order].reshape(-1, size, width)
        windows = windows + merger.self_attn(merger.layer_norm1(windows), **whole)[0]
        flat = merger.linear_1(merger.pre_norm(windows.reshape(-1, size * width)))
        rows: torch.Tensor = merger.linear_2(merger.act(flat)) + windows.mean(dim=1)
        return rows[None]

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        return self._strip(processed.get("pixel_values"), processed.get("target_sizes"))

    def video_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        return self._strip(
            processed.get("pixel_values_videos"), processed.get("target_sizes_videos")
        )

    def _strip(self, pixels: Any, grids: Any) -> list[Call]:
        if pixels is None or grids is None:
            return []
        vision = self.vision_config
        patch, table = int(vision.patch_size), int(vision.image_size) // int(vision.patch_size)
        grids = torch.as_tensor(grids).reshape(-1, 2).to(torch.int64)
        strip = torch.as_tensor(pixels)[0]  # [channels, patch, patch * patches]
        rows = strip.unflatten(-1, (-1, patch)).permute(2, 0, 1, 3).flatten(1)
        calls = []
        for piece, grid in zip(rows.split(grids.prod(-1).tolist()), grids, strict=True):
            positions = get_vision_nearest_position_ids(grid[None], table)
            orders = {}
            for place, (height, width) in enumerate(self.merges):
                orders[f"merge_{place}"] = _window_order(grid, height, width)
                grid = grid // torch.tensor([height, width])
            calls.append({"pixel_values": piece, "position_ids": positions, **orders})
        return calls


@register("minicpmv4_7")
class CanvasAdapter(MergingGridAdapter):
    """The same tower; text positions have three axes, laid out on a canvas an image."""

    rope_axes = 3

    def position_ids(
        self, input_ids: torch.Tensor, processed: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int]:
        ids = torch.as_tensor(input_ids).reshape(1, -1)
        kinds = self.modalities(ids[0])
        known = {
            name: torch.as_tensor(processed[name]).reshape(-1, 2)
            for name in ("target_sizes", "target_sizes_videos")
            if name in processed
        }
        return rope_positions(self.config, ids, kinds, known)


def _window_order(grid: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Places of a grid's cells, window by window: int64 [rows * columns]."""
    rows, columns = (int(size) for size in grid)
    cells = torch.arange(rows * columns).reshape(rows // height, height, columns // width, width)
    return cells.permute(0, 2, 1, 3).flatten()
