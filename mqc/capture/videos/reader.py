"""What every video processor does: choose frames, resize and normalize them with torch alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

_SAMPLING = (
    *("temporal_patch_size", "min_frames", "max_frames", "num_frames", "fps"),
    *("initial_shift", "max_num_frames", "stack_frames"),
)
"""Settings that the families' sampling rules take."""
_TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class TorchOperations(TorchvisionBackend):  # type: ignore[misc]
    """The operations that video processors take from torchvision, for uint8 frames [..., 3, h, w].

    Bilinear and bicubic resizing calls ``torch.nn.functional.interpolate`` on uint8 with
    antialiasing, as torchvision's own does. Other filters (Lanczos above all) run in Pillow, frame
    by frame; torchvision before 0.27 puts bicubic in the place of Lanczos, so values may differ
    there by some of 255 steps.
    """

    def resize(
        self,
        image: torch.Tensor,
        size: Any,
        resample: Any = None,
        antialias: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        if not size.height or not size.width:
            raise ValueError(f"a video cannot be resized to {size}: it names no height and width")
        height, width = int(size.height), int(size.width)
        if tuple(image.shape[-2:]) == (height, width):
            return image
        flat = image.reshape(-1, *image.shape[-3:])
        kind = Image.Resampling.BILINEAR if resample is None else Image.Resampling(int(resample))
        if kind in _TORCH_MODES:
            resized = torch.nn.functional.interpolate(
                flat, (height, width), mode=_TORCH_MODES[kind], align_corners=False, antialias=True
            )
        else:
            frames = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in flat)
            arrays = [np.asarray(frame.resize((width, height), kind)) for frame in frames]
            resized = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        return resized.reshape(*image.shape[:-2], height, width)

    def normalize(
        self, image: torch.Tensor, mean: Any, std: Any, inplace: bool = False, **_: Any
    ) -> torch.Tensor:
        """(image - mean) / std by channel; float32 [..., 3, h, w]."""
        offset, scale = (
            torch.as_tensor(value, dtype=image.dtype).reshape(-1, 1, 1) for value in (mean, std)
        )
        return (image - offset) / scale

    def center_crop(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
        """The middle ``size`` of frames that are at least as large."""
        height, width = int(size.height), int(size.width)
        rows, columns = image.shape[-2] - height, image.shape[-1] - width
        if rows < 0 or columns < 0:
            raise ValueError(f"frames are smaller than the crop of {width}x{height}")
        top, left = round(rows / 2), round(columns / 2)
        return image[..., top : top + height, left : left + width]


class VideoReader:
    """What mqc adds to a video processor."""

    def choose(self, length: int, fps: float | None, rate: float | None = None) -> list[int]:
        """Which of a recording's ``length`` frames to take, by index.

        With ``rate`` as many a second, evenly; else as the family does: by its own rule where its
        configuration says ``do_sample_frames``, and all frames where it does not. Raises
        ``ValueError`` where the rule needs ``fps`` and there is none.
        """
        own: Any = self
        metadata = VideoMetadata(
            total_num_frames=length, fps=fps, duration=length / fps if fps else None
        )
        if rate is not None:
            rate = rate if fps is None else min(rate, fps)
            indices: Any = default_sample_indices_fn(metadata, fps=rate)
        elif own.do_sample_frames:
            settings = {name: getattr(own, name) for name in _SAMPLING if hasattr(own, name)}
            indices = own.sample_frames(metadata=metadata, **settings)
        else:
            indices = range(length)
        return [int(index) for index in indices]

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """Frames are RGB already."""
        return video

    def resize(self, *values: Any, **options: Any) -> torch.Tensor:
        """As the family does; a video of fewer frames than a temporal patch repeats its last.

        Some families' size rule refuses such a video, though the patches that follow would be
        filled in this very way.
        """
        videos, least = options.get("videos"), options.get("temporal_factor", 1)
        if videos is not None and videos.shape[1] < least:
            more = videos[:, -1:].expand(-1, least - videos.shape[1], -1, -1, -1)
            options["videos"] = torch.cat([videos, more], dim=1)
        parent: Any = super()
        resized: torch.Tensor = parent.resize(*values, **options)
        return resized


def reader_class(kind: type[Any]) -> type[Any]:
    """A video processor class of transformers, computing with :class:`TorchOperations`."""
    return type(kind.__name__, (VideoReader, kind, TorchOperations), {"__doc__": kind.__doc__})
