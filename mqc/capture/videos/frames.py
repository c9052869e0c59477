"""InternVL's video processor, whose module imports torchvision."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL.Image import Resampling
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor


class _Settings(VideosKwargs, total=False):  # type: ignore[misc,call-arg]
    initial_shift: bool | float | int


class InternVLVideoProcessor(BaseVideoProcessor):  # type: ignore[misc]
    """Every frame is one tile of a fixed size."""

    resample = Resampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size: ClassVar[dict[str, int]] = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    initial_shift = True
    do_sample_frames = False
    valid_kwargs = _Settings

    def sample_frames(
        self,
        metadata: Any,
        num_frames: int | None = None,
        fps: float | None = None,
        initial_shift: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The middles of equal spans: int [frames]."""
        total = metadata.total_num_frames
        if num_frames is None:
            if fps is None or metadata.fps is None:
                raise ValueError("neither a number of frames nor frames a second are known")
            num_frames = int(total / metadata.fps * fps)
        if not 0 < num_frames <= total:
            raise ValueError(f"{num_frames} frames cannot be taken of {total}")
        shift = self.initial_shift if initial_shift is None else initial_shift
        start = total / num_frames / 2 if shift is True else float(shift)
        return torch.arange(start, total, total / num_frames).int()
