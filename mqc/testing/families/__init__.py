"""Tiny models with random weights, one row per family, for tests that need any model at all.

Every family has dimensions that are no powers of two (hidden 48 = 12 * 4, intermediate 148, 140
or 74), grouped key/value heads, two layers of every kind, and random norm gains and biases, so
that a pass that forgets one of them fails. To add a family, write a function from nothing to a
configuration and put a :class:`Family` row into the table of the file that fits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mqc.testing.families.frame import (
    END,
    FIRST_TEXT,
    HIDDEN,
    IMAGE,
    START,
    VOCABULARY,
    Family,
    Image,
    batch_of,
    build,
)
from mqc.testing.families.grids import GRIDS
from mqc.testing.families.masks import MASKS
from mqc.testing.families.more import MORE
from mqc.testing.families.nested import NESTED
from mqc.testing.families.packed import PACKED
from mqc.testing.families.papers import PAPERS
from mqc.testing.families.queries import QUERIES
from mqc.testing.families.tiles import TILES

FAMILIES: dict[str, Family] = {
    **GRIDS,
    **MORE,
    **TILES,
    **PACKED,
    **NESTED,
    **MASKS,
    **QUERIES,
    **PAPERS,
}
"""Row of each family by its name, which is also its configuration's ``model_type`` or begins with
it (``model_type:variant``)."""

BASIC = ("qwen2_vl", "llava", "internvl")
"""Families that tests of the passes' inner workings use; all others go end to end in
``tests/families``."""


def build_family(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of family ``name`` and one sample: two images of different sizes with text.

    The sample is a dict as the family's processor returns it: ``input_ids`` [1, tokens],
    ``attention_mask``, ``pixel_values`` and what else the family has (``image_grid_thw``,
    ``mm_token_type_ids``, ...). Raises ``KeyError`` for an unknown family.
    """
    return build(FAMILIES[name], dtype, seed)


def make_image(
    config: PretrainedConfig, size: Any, generator: torch.Generator | None = None
) -> Image:
    """A random image of ``size`` for a basic family's model of configuration ``config``."""
    return FAMILIES[config.model_type].image(config, size, generator)


def sample(
    config: PretrainedConfig,
    rows: list[list[Image]],
    text: int = 5,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """A batch for a basic family: see :func:`mqc.testing.families.frame.batch_of`."""
    return batch_of(FAMILIES[config.model_type], rows, text, generator, dtype)


__all__ = [
    "BASIC",
    "END",
    "FAMILIES",
    "FIRST_TEXT",
    "HIDDEN",
    "IMAGE",
    "START",
    "VOCABULARY",
    "Family",
    "Image",
    "batch_of",
    "build_family",
    "make_image",
    "sample",
]
