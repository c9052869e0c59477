"""A family's samples as prompts, and what transformers answers to them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from mqc.capture import Adapter
from mqc.host import Engine, Prompt, make_batch, merge
from mqc.host.engine import read
from mqc.host.prompt import visual_order
from mqc.testing.families.frame import Family, batch_of


def family_prompt(adapter: Adapter, sample: dict[str, torch.Tensor]) -> Prompt:
    """One row of a processor's output as a prompt."""
    ids = sample["input_ids"][0]
    kinds = adapter.modalities(ids)
    positions, following = adapter.position_ids(ids, sample)
    return Prompt(
        ids,
        kinds > 0,
        positions,
        following,
        [*adapter.vision_calls(sample), *adapter.video_calls(sample)],
        blocks=adapter.attention_blocks(ids),
        visual_order=visual_order(kinds),
    )


def family_samples(
    family: Family, config: Any, dtype: torch.dtype, count: int, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """``count`` samples of one row: no image, one, two or three, with text of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        sizes = [family.sizes[(index + n) % len(family.sizes)] for n in range((index + 1) % 4)]
        images = [family.image(config, size, generator) for size in sizes]
        samples.append(batch_of(family, [images], 5 + index % 3, generator, dtype))
    return samples


@torch.inference_mode()
def engine_logits(engine: Engine, prompts: Sequence[Prompt], **options: Any) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of every row of every prompt, run as one batch.

    ``options``: ``padding`` of the batch and ``chunk`` of the decoder's calls.
    """
    batch = make_batch(prompts, options.pop("padding", "right"))
    rows = torch.arange(batch.valid.shape[1]).expand(len(prompts), -1)
    logits, _, _ = read(engine, merge(engine, prompts, batch), batch, rows, **options)
    return [row[valid] for row, valid in zip(logits, batch.valid, strict=True)]


@torch.inference_mode()
def model_logits(model: Any, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of transformers' own model for a sample of one row.

    A model that demands an image is asked for a text alone through its language model.
    """
    pixels = inspect.signature(model.forward).parameters["pixel_values"]
    if pixels.default is inspect.Parameter.empty and "pixel_values" not in sample:
        model = model.language_model
    logits: torch.Tensor = model(**sample).logits[0]
    return logits.float()
