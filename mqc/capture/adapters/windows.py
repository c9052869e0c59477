"""Grid towers with layers that attend inside windows of the grid."""

from __future__ import annotations

import torch
from transformers.vision_utils import get_vision_window_index

from mqc.capture.adapters.base import Call, DynamicSize, VisionInput
from mqc.capture.adapters.grid import GridAdapter
from mqc.capture.adapters.registry import register


@register("qwen2_5_vl")
class WindowGridAdapter(GridAdapter):
    """Patches are sorted by window; ``cu_window_seqlens`` holds the windows' boundaries."""

    def vision_inputs(self) -> list[VisionInput]:
        blocks = DynamicSize("blocks")
        bounds = DynamicSize("bounds", example=5, least=3)
        return [
            *super().vision_inputs(),
            VisionInput("window_index", (blocks,), (None,), torch.int64),
            VisionInput("cu_window_seqlens", (bounds,), (None,), torch.int32),
        ]

    def geometry(self, grid: torch.Tensor) -> Call:
        vision = self.vision_config
        index, bounds = get_vision_window_index(
            grid, self.merge, vision.window_size, vision.patch_size
        )
        # Two boundaries mean "one segment, no mask" (mqc.capture.segments); a third, equal to the
        # second, bounds an empty window.
        if len(bounds) == 2:
            bounds = torch.cat([bounds, bounds[-1:]])
        return {**super().geometry(grid), "window_index": index, "cu_window_seqlens": bounds}
