"""What a row of the family table is, and how a model and samples are made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

IMAGE = 7
"""Token id of an image placeholder in every family."""
START, END = 3, 4
"""Token ids around every image's placeholders."""
VOCABULARY = 96
HIDDEN = 48
FIRST_TEXT = 20
"""Token ids from here on are text."""


@dataclass
class Image:
    """One random image as a processor would give it: its placeholder count and its tensors.

    ``values`` are concatenated over the images of a batch, on their first axis or on that which
    ``axes`` names. ``placeholders`` replaces the default ``[START, IMAGE * tokens, END]`` where a
    family writes them otherwise.
    """

    tokens: int
    values: dict[str, torch.Tensor]
    placeholders: list[int] | None = None
    axes: dict[str, int] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        """The token ids that stand for the image in the prompt."""
        return self.placeholders or [START, *[IMAGE] * self.tokens, END]


Generator = torch.Generator | None


def fixed_tiles(config: Any, size: int, generator: Generator) -> Image:
    """``size`` tiles of the tower's fixed size, as ``pixel_values`` [size, 3, height, width]."""
    side = config.vision_config.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    pixels = torch.randn(size, 3, height, width, generator=generator)
    return Image(size * config.image_seq_length, {"pixel_values": pixels})


def flat_patches(config: Any, size: tuple[int, int], generator: Generator) -> Image:
    """A grid of ``size`` (height, width) patches, flattened, with ``image_grid_thw``."""
    vision, (height, width) = config.vision_config, size
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return Image(
        height * width // vision.spatial_merge_size**2,
        {
            "pixel_values": torch.randn(height * width, features, generator=generator),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        },
    )


def no_extras(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Nothing besides ids, mask and the images' tensors."""
    return {}


def token_types(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``mm_token_type_ids``: 1 at image placeholders."""
    return {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    ``config`` makes the configuration; ``image`` one random image of a size; ``sizes`` are image
    sizes in that function's terms, the first two of which the default sample uses; ``extras``
    gives further inputs of a batch with images.
    """

    config: Callable[[], PretrainedConfig]
    sizes: tuple[Any, ...] = (1, 2, 5)
    image: Callable[[Any, Any, Generator], Image] = fixed_tiles
    extras: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = no_extras


def text_config(model_type: str, intermediate: int, **more: Any) -> dict[str, Any]:
    """A language model of two layers, two of its four heads shared, nothing a power of two."""
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def build(
    family: Family, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model and one sample of two images: see :func:`mqc.testing.families.build_family`."""
    config = family.config()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise)
            else:
                parameter.mul_(4.0)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the fast ones do not take float64
    model = model.to(dtype).eval().requires_grad_(False)
    images = [family.image(config, size, generator) for size in family.sizes[:2]]
    return model, batch_of(family, [images], generator=generator, dtype=dtype)


def batch_of(
    family: Family,
    rows: list[list[Image]],
    text: int = 5,
    generator: Generator = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """A batch: per row its images with random text between and after; padded on the left."""
    ids: list[list[int]] = []
    for images in rows:
        row = [1]
        for image in images:
            row += [*image.ids, *_words(2, generator)]
        ids.append(row + _words(text, generator))
    length = max(map(len, ids))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    batch = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
    images = [image for row in rows for image in row]
    for key in images[0].values if images else ():
        value = torch.cat([image.values[key] for image in images], images[0].axes.get(key, 0))
        batch[key] = value.to(dtype) if value.is_floating_point() else value
    batch.update(family.extras(batch))
    return batch


def _words(count: int, generator: Generator) -> list[int]:
    words: list[int] = torch.randint(FIRST_TEXT, VOCABULARY, (count,), generator=generator).tolist()
    return words
