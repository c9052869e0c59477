"""Qwen2-VL's and Qwen2.5-VL's video processor, whose module imports torchvision."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
    Qwen3VLVideoProcessor,
    Qwen3VLVideoProcessorInitKwargs,
)


class _Settings(Qwen3VLVideoProcessorInitKwargs, total=False):  # type: ignore[misc,call-arg]
    min_pixels: int
    max_pixels: int


class Qwen2VLVideoProcessor(Qwen3VLVideoProcessor):  # type: ignore[misc]
    """Patches as Qwen3-VL cuts them; limits of size hold for a frame, not for the video."""

    size: ClassVar[dict[str, int]] = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    patch_size = 14
    do_sample_frames = False
    cap_pixels_per_frame = False
    max_video_tokens = 128000
    fps = None
    valid_kwargs = _Settings

    def __init__(self, **settings: Any) -> None:
        size = dict(settings.pop("size", None) or self.size)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            value = settings.pop(name, None)
            if value is not None:
                size[edge] = value
        super().__init__(size=size, **settings)

    def sample_frames(
        self,
        metadata: Any,
        num_frames: int | None = None,
        fps: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Evenly spaced frames, a multiple of the temporal patch: int [frames]."""
        step, total = int(self.temporal_patch_size), metadata.total_num_frames
        if num_frames is not None:
            wanted = round(num_frames / step) * step
        elif fps is not None:
            if metadata.fps is None:
                raise ValueError("frames a second cannot be taken: the video does not say its own")
            most = min(math.floor(min(self.max_frames, total) / step) * step, total)
            wanted = min(max(total / metadata.fps * fps, self.min_frames), most)
            wanted = math.floor(wanted / step) * step
        else:
            return torch.arange(total)
        if not 0 < wanted <= total:
            raise ValueError(f"{wanted} frames cannot be taken of {total}")
        return torch.arange(0, total, total / wanted).int()

    def resize(
        self,
        videos: torch.Tensor,
        size: Any,
        resample: Any,
        factor: int,
        temporal_factor: int = 2,
        cap_pixels_per_frame: bool | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Frames uint8 [videos, frames, 3, h, w] to sides that are multiples of ``factor``."""
        most = size.longest_edge
        if cap_pixels_per_frame:
            share = int(self.max_video_tokens * factor**2 * 0.9) * temporal_factor
            most = max(min(most, share // videos.shape[1]), int(size.shortest_edge * 1.05))
        height, width = smart_resize(
            *videos.shape[-2:], factor=factor, min_pixels=size.shortest_edge, max_pixels=most
        )
        above: Any = super(Qwen3VLVideoProcessor, self)  # its own rule is for the whole video
        resized: torch.Tensor = above.resize(
            image=videos, size=SizeDict(height=height, width=width), resample=resample
        )
        return resized
