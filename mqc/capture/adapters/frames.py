"""Families whose videos are images, one for each frame."""

from __future__ import annotations

from mqc.capture.adapters.base import Adapter
from mqc.capture.adapters.registry import register


@register("internvl")
class FramesAdapter(Adapter):
    """InternVL: a frame is a lone tile with image tokens of its own, in the prompt's order."""

    video_reader = "InternVLVideoProcessor"
