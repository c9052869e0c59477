"""transformers' video processors without torchvision.

Which frames of a recording a family takes, to what size it brings them and how it cuts them is
transformers' own code: its video processor classes, of which only the few tensor operations are
replaced that they take from torchvision (:mod:`mqc.capture.videos.reader`). Two families' modules
cannot be imported without torchvision; their classes are written here
(:mod:`mqc.capture.videos.grids`, :mod:`mqc.capture.videos.frames`). The classes are used where
torchvision is installed too, so that a prompt is the same on every machine.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from mqc.capture.videos.reader import VideoReader, reader_class

_MODULES = {
    "Glm4vVideoProcessor": "transformers.models.glm4v.video_processing_glm4v",
    "InternVLVideoProcessor": "mqc.capture.videos.frames",
    "LlavaOnevisionVideoProcessor": (
        "transformers.models.llava_onevision.video_processing_llava_onevision"
    ),
    "MiniCPMV4_6VideoProcessor": "transformers.models.minicpmv4_6.video_processing_minicpmv4_6",
    "Qwen2VLVideoProcessor": "mqc.capture.videos.grids",
    "Qwen3VLVideoProcessor": "transformers.models.qwen3_vl.video_processing_qwen3_vl",
    "SmolVLMVideoProcessor": "transformers.models.smolvlm.video_processing_smolvlm",
}


def reader_kind(name: str) -> type[Any] | None:
    """The class of a video processor by transformers' name; None where it cannot be had."""
    if name not in _MODULES:
        return None
    try:
        found: type[Any] = getattr(importlib.import_module(_MODULES[name]), name)
    except (ImportError, AttributeError):  # another version of transformers
        return None
    return reader_class(found)


def load_reader(folder: Path, name: str | None) -> Any:
    """The video processor of a checkpoint's folder, or None where it cannot be had.

    ``name``: the class that the family's adapter names (``video_reader``); the folder may name
    another. Settings are read as transformers reads them: from ``processor_config.json``,
    ``video_preprocessor_config.json`` or, failing both, the image processor's.
    """
    default = reader_kind(name or "")
    if default is None:
        return None
    settings, more = default.get_video_processor_dict(str(folder), local_files_only=True)
    kind = reader_kind(str(settings.get("video_processor_type"))) or default
    settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
    return kind.from_dict(settings, **more)


__all__ = ["VideoReader", "load_reader", "reader_class", "reader_kind"]
