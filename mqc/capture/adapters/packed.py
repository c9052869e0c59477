"""Tiles of one image, whose features the model packs by the image's size (anyres).

The tower runs over the tiles as ever; what depends on the image's size (padding cut off, a newline
after each row, tiles of a large image shrunk) only moves, repeats and averages the tower's rows.
The model's own packing function is run on row numbers instead of features when the prompt is
built, and the graph takes the resulting lists: each visual token is a weighted sum of tower rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from mqc.capture.adapters.base import Call, DynamicSize, VisionInput, base_model
from mqc.capture.adapters.features import FeatureLayers
from mqc.capture.adapters.grid import Unbound
from mqc.capture.adapters.registry import register

Pack = Callable[[torch.Tensor], torch.Tensor]
"""Features [rows, channels] to visual tokens [tokens, channels], linear and alike per channel."""


def pack_lists(pack: Pack, rows: int, taps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``pack`` as lists: each of its tokens is the sum over ``taps`` of ``weight * row[index]``.

    ``pack`` is asked about ``rows`` rows in float64. Returns (int64 [tokens, taps], float32
    [tokens, taps]). A packing that only picks rows is found with one call; one that mixes them
    is asked about every row. Raises ``ValueError`` if a token mixes more than ``taps`` rows.
    """
    numbers = torch.arange(rows, dtype=torch.float64)
    check = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(torch.float64)
    packed = pack(torch.stack([numbers, check], dim=-1))
    index = packed[:, 0].round().to(torch.int64).clamp(0, rows - 1)
    picked = packed == torch.stack([numbers, check], dim=-1)[index]
    if bool(picked.all()):
        wide = index[:, None].repeat(1, taps)
        weight = torch.zeros(len(index), taps)
        weight[:, 0] = 1.0
        return wide, weight
    found = torch.zeros(len(index), taps, dtype=torch.int64)
    weight = torch.zeros(len(index), taps, dtype=torch.float64)
    used = torch.zeros(len(index), dtype=torch.int64)
    for start in range(0, rows, 256):
        block = torch.zeros(rows, min(256, rows - start), dtype=torch.float64)
        block[start : start + block.shape[1]].fill_diagonal_(1.0)
        for token, row in (answer := pack(block)).nonzero().tolist():
            place = int(used[token])
            if place >= taps:
                raise ValueError(f"a visual token mixes more than {taps} rows of the tower")
            found[token, place], weight[token, place] = start + row, answer[token, row]
            used[token] += 1
    return found, weight.to(torch.float32)


@register("llava_next")
class PackedTilesAdapter(FeatureLayers):
    """LLaVA-NeXT: a base tile and a grid of tiles, unpadded, each row followed by a newline."""

    taps: int = 1
    """Most tower rows that one visual token is made of."""

    def vision_inputs(self) -> list[VisionInput]:
        (pixels,) = super().vision_inputs()
        shape = (DynamicSize("tokens", example=7), self.taps)
        lists = [VisionInput("pack_index", shape, ("token", None), torch.int64)]
        if self.taps > 1:
            lists.append(VisionInput("pack_weight", shape, ("token", None)))
        return [pixels, *lists]

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        base = base_model(model)
        features = self.tile_features(base, inputs[0])
        rows = features.reshape(-1, features.shape[-1])
        newline = getattr(base, "image_newline", None)
        if newline is not None:
            rows = torch.cat([rows, newline[None]])
        if self.taps == 1:
            return rows[inputs[1][:, 0]]
        return (rows[inputs[1]] * inputs[2][..., None]).sum(1)

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        """One call an image; ``pixel_values`` [images, tiles, 3, height, width], zero-padded."""
        pixels, sizes = processed.get("pixel_values"), processed.get("image_sizes")
        if pixels is None or sizes is None:
            return []
        sizes = torch.as_tensor(sizes).reshape(-1, 2).tolist()
        alone = self._alone(processed, len(sizes))
        calls = []
        for tiles, size, single in zip(pixels, sizes, alone, strict=True):
            tiles = torch.as_tensor(tiles)
            count = self.tiles(size) if single else 1
            index, weight = self._lists(count, tuple(size))
            call = {"pixel_values": tiles[:count], "pack_index": index}
            calls.append(call if self.taps == 1 else {**call, "pack_weight": weight})
        return calls

    def tiles(self, size: list[int]) -> int:
        """Tiles of an image of ``size`` (height, width), the base tile included."""
        count: int = Unbound(self.config).module.image_size_to_num_patches(
            size, self.config.image_grid_pinpoints, self.vision_config.image_size
        )
        return count

    def _alone(self, processed: Mapping[str, Any], images: int) -> list[bool]:
        """Whether each image is cut into tiles (some families do so only for a lone image)."""
        counts = processed.get("batch_num_images")
        if counts is None:
            return [True] * images
        return [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)]

    def _lists(self, tiles: int, size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        side = self.vision_config.image_size // self.vision_config.patch_size
        each, unbound = side * side, Unbound(self.config)
        options = {
            name: getattr(self.config, name)
            for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
            if name in inspect.signature(unbound.pack_image_features).parameters
        }

        def pack(features: torch.Tensor) -> torch.Tensor:
            image = features[: tiles * each].reshape(tiles, each, -1)
            packed, _ = unbound.pack_image_features(
                [image], [size], image_newline=features[-1], **options
            )
            result: torch.Tensor = packed[0]
            return result

        return pack_lists(pack, tiles * each + 1, self.taps)


@register("llava_onevision")
class ResizedTilesAdapter(PackedTilesAdapter):
    """LLaVA-OneVision: as LLaVA-NeXT, but features of large images are shrunk bilinearly.

    A video is one call: a tile a frame, whose features are shrunk to half the side, and one newline
    behind the last.
    """

    taps = 4
    video_reader = "LlavaOnevisionVideoProcessor"

    def video_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        """One call a video; ``pixel_values_videos`` [videos, frames, 3, height, width]."""
        pixels = processed.get("pixel_values_videos")
        if pixels is None:
            return []
        side = self.vision_config.image_size // self.vision_config.patch_size
        unbound = Unbound(self.config)

        def pool(features: torch.Tensor) -> torch.Tensor:
            pooled: torch.Tensor = unbound.apply_pooling(features[None])[0]
            return pooled

        index, weight = pack_lists(pool, side * side, self.taps)
        calls = []
        for frames in (torch.as_tensor(video) for video in pixels):
            steps = torch.arange(len(frames))[:, None, None] * side * side
            newline = torch.full((1, self.taps), len(frames) * side * side)
            first = torch.eye(1, self.taps)
            calls.append(
                {
                    "pixel_values": frames,
                    "pack_index": torch.cat([(index + steps).flatten(0, 1), newline]),
                    "pack_weight": torch.cat([weight.repeat(len(frames), 1), first]),
                }
            )
        return calls
