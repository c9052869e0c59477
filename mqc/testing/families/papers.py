"""Structures of models outside transformers (:mod:`mqc.testing.papers`)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from mqc.testing.families.frame import END, IMAGE, START, Family, Generator, Image, text_config
from mqc.testing.families.towers import clip
from mqc.testing.papers import ExpertsConfig, QueriesConfig, SlicesConfig

_QUERIES = 4


def _queries() -> PretrainedConfig:
    return QueriesConfig(text_config=text_config("qwen2", 140), vision_config=_tower())


def _experts() -> PretrainedConfig:
    return ExpertsConfig(text_config=text_config("qwen2", 148), vision_config=_tower())


def _slices() -> PretrainedConfig:
    return SlicesConfig(text_config=text_config("qwen2", 140), vision_config=_tower())


def _tower() -> dict[str, Any]:
    return clip() | {"num_hidden_layers": 2}


def _square(tokens: int) -> Any:
    """One image of the tower's size that becomes ``tokens`` rows."""

    def image(config: Any, size: int, generator: Generator) -> Image:
        side = config.vision_config.image_size
        pixels = torch.randn(1, 3, side, side, generator=generator)
        return Image(tokens, {"pixel_values": pixels})

    return image


def _sliced(config: Any, size: list[tuple[int, int]], generator: Generator) -> Image:
    """Slices of the grids in ``size`` (rows, columns of patches), as strips of patches."""
    side = config.vision_config.patch_size
    strips = torch.zeros(len(size), 3, side, 36 * side)
    for strip, (rows, columns) in zip(strips, size, strict=True):
        used = rows * columns * side
        strip[..., :used] = torch.randn(3, side, used, generator=generator)
    runs = [token for _ in size for token in (START, *[IMAGE] * _QUERIES)]
    return Image(
        len(size) * _QUERIES,
        {"pixel_values": strips, "tgt_sizes": torch.tensor(size)},
        [*runs, END],
    )


PAPERS = {
    "paper_queries": Family(_queries, (1, 1), _square(_QUERIES)),
    "paper_experts": Family(_experts, (1, 1), _square(6)),
    "paper_slices": Family(_slices, ([(4, 6)], [(3, 5), (6, 6)], [(8, 2)]), _sliced),
}
