"""Towers over flat patches of a variable grid, with multi-axis rotary positions in the text."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.vision_utils import get_vision_position_ids

from mqc.capture.adapters.base import (
    Adapter,
    Call,
    DynamicSize,
    Features,
    VisionInput,
    base_model,
)
from mqc.capture.adapters.registry import register
from mqc.capture.segments import use_segment_attention


@register("qwen2_vl")
class GridAdapter(Adapter):
    """A tower over patches of a variable grid: one call is one image of ``h * w`` patches.

    The processor gives flat patches ``pixel_values`` [patches, features] and ``image_grid_thw``
    [images, 3]; positions inside the grid are an input of the graph. A video, given as
    ``pixel_values_videos`` and ``video_grid_thw`` [videos, 3], is ``t`` calls: attention does not
    leave a temporal patch, and positions inside the tower do not count them. Text positions follow
    the family's own ``get_rope_index``, called without a model.
    """

    rope_axes = 3
    video_reader = "Qwen2VLVideoProcessor"

    def prepare(self, model: PreTrainedModel) -> None:
        use_segment_attention(model)

    @property
    def merge(self) -> int:
        """Patches along one side that become one visual token."""
        return int(self.vision_config.spatial_merge_size)

    def vision_inputs(self) -> list[VisionInput]:
        vision = self.vision_config
        features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return [
            VisionInput("pixel_values", (self.patches, features), ("patch", None)),
            VisionInput("position_ids", (self.patches, 2), ("patch", None), torch.int64),
        ]

    @property
    def patches(self) -> DynamicSize:
        """The number of patches of one call: a multiple of what becomes one visual token."""
        return DynamicSize("blocks", self.merge**2)

    def geometry(self, grid: torch.Tensor) -> Call:
        """A call's inputs besides the pixels, for a grid int64 [1, 3] (1, rows, columns)."""
        return {"position_ids": get_vision_position_ids(grid, self.merge)}

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> Features:
        names = [spec.name for spec in self.vision_inputs()]
        values = dict(zip(names, inputs, strict=True))
        output = base_model(model).visual(
            values.pop("pixel_values"),
            grid_thw=None,
            cu_seqlens=torch.zeros(2, dtype=torch.int32),
            max_seqlen=1,
            **values,
        )
        return self.features(output)

    def features(self, output: Any) -> Features:
        """Rows for the decoder from what the tower returns."""
        embeds: torch.Tensor = output.pooler_output
        return embeds

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        return self._slices(processed.get("pixel_values"), processed.get("image_grid_thw"))

    def video_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        return self._slices(processed.get("pixel_values_videos"), processed.get("video_grid_thw"))

    def _slices(self, pixels: Any, grids: Any) -> list[Call]:
        """One call for each temporal patch of each grid."""
        if pixels is None or grids is None:
            return []
        calls = []
        start = 0
        for frames, rows, columns in torch.as_tensor(grids).reshape(-1, 3).tolist():
            geometry = self.geometry(torch.tensor([[1, rows, columns]]))
            for _ in range(frames):
                piece = torch.as_tensor(pixels)[start : start + rows * columns]
                calls.append({"pixel_values": piece, **geometry})
                start += rows * columns
        return calls

    def position_ids(
        self, input_ids: torch.Tensor, processed: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int]:
        ids = torch.as_tensor(input_ids).reshape(1, -1)
        kinds = self.modalities(ids[0])
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        known = {name: torch.as_tensor(processed[name]) for name in names if name in processed}
        return rope_positions(self.config, ids, kinds, known)


def rope_positions(
    config: PretrainedConfig,
    ids: torch.Tensor,
    kinds: torch.Tensor,
    known: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, int]:
    """Positions int64 [3, tokens] of ``ids`` [1, tokens] by the model's own rule, and the next one.

    ``kinds``: the modality of each token; ``known``: the sizes of images and videos, as the rule
    names them. Without an image or a video all axes count the tokens.
    """
    if not bool(kinds.any()):
        length = int(ids.shape[-1])
        return torch.arange(length).expand(3, -1).contiguous(), length
    types = kinds[None].to(torch.int32)
    positions, _ = Unbound(config).get_rope_index(ids, mm_token_type_ids=types, **known)
    return positions[:, 0].contiguous(), int(positions.max()) + 1


class Unbound:
    """The methods of the family's model class, callable with a configuration instead of a model."""

    def __init__(self, config: PretrainedConfig) -> None:
        from transformers import MODEL_MAPPING

        self.config = config
        self._class = MODEL_MAPPING[type(config)]

    @property
    def module(self) -> Any:
        """The Python module that defines the family's model class."""
        return sys.modules[self._class.__module__]

    def __getattr__(self, name: str) -> Any:
        value = inspect.getattr_static(self._class, name)
        return value.__get__(self, self._class) if hasattr(value, "__get__") else value
