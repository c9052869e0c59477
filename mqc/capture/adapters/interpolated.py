"""Grid towers whose learned positions are resampled to the grid, and what they feed besides."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from mqc.capture.adapters.base import Call, Features, VisionInput, base_model
from mqc.capture.adapters.grid import GridAdapter
from mqc.capture.adapters.registry import register


class InterpolatedGridAdapter(GridAdapter):
    """A patch's position is a weighted sum of ``interp_indices`` rows of a learned square table."""

    mode = "bilinear"
    align_corners = True

    @property
    def side(self) -> int:
        """Rows and columns of the learned table."""
        return int(self.vision_config.num_position_embeddings**0.5)

    def vision_inputs(self) -> list[VisionInput]:
        shape = (self.patches, 16 if self.mode == "bicubic" else 4)
        return [
            *super().vision_inputs(),
            VisionInput("interp_indices", shape, ("patch", None), torch.int64),
            VisionInput("interp_weights", shape, ("patch", None)),
        ]

    def geometry(self, grid: torch.Tensor) -> Call:
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            self.side,
            mode=self.mode,
            align_corners=self.align_corners,
            spatial_merge_size=self.merge,
        )
        return {**super().geometry(grid), "interp_indices": indices, "interp_weights": weights}


@register("qwen3_vl", "qwen3_vl_moe")
class DeepstackAdapter(InterpolatedGridAdapter):
    """Several tower layers feed the decoder: the first as embeddings, the others by additions.

    DeepStack (arXiv 2406.04334): the rows of tower layer i are added to the visual tokens behind
    decoder layer i. The graph adds them densely, with zeros in text rows.
    """

    video_reader = "Qwen3VLVideoProcessor"

    @property
    def side_inputs(self) -> int:
        return len(self.vision_config.deepstack_visual_indexes)

    def prepare(self, model: PreTrainedModel) -> None:
        super().prepare(model)
        decoder: Any = model.get_decoder()
        decoder._deepstack_process = lambda hidden, _, rows: hidden + rows

    def features(self, output: Any) -> Features:
        return (output.pooler_output, *output.deepstack_features)

    def decoder_arguments(
        self, side: list[torch.Tensor], modality: torch.Tensor | None
    ) -> dict[str, Any]:
        return {"visual_pos_masks": None, "deepstack_visual_embeds": side}


@register("glm4v")
class BicubicGridAdapter(InterpolatedGridAdapter):
    """Positions by bicubic ``grid_sample``, written as the weighted sum that it is.

    Image tokens stand for videos too: those between the tokens that begin and end a video. They
    are rows of images and of videos apart here, so that a prompt may hold both, which
    transformers' own model does not take.
    """

    video_reader = "Glm4vVideoProcessor"
    mode = "bicubic"
    align_corners = False

    @property
    def side(self) -> int:
        return int(self.vision_config.image_size // self.vision_config.patch_size)

    def modalities(self, input_ids: torch.Tensor) -> torch.Tensor:
        image = input_ids == self.image_token_id
        starts = (input_ids == self.config.video_start_token_id).to(torch.int64).cumsum(0)
        ends = (input_ids == self.config.video_end_token_id).to(torch.int64).cumsum(0)
        kinds: torch.Tensor = image.to(torch.int64) * (1 + (starts > ends).to(torch.int64))
        return kinds

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> Features:
        *rest, indices, weights = inputs

        def positions(module: Any, embeddings: torch.Tensor, *_: Any) -> torch.Tensor:
            table = module.position_embedding(indices)
            return embeddings + (table * weights[..., None]).sum(1)  # type: ignore[no-any-return]

        tower = base_model(model).visual
        tower.embeddings.forward = MethodType(positions, tower.embeddings)
        names = [spec.name for spec in self.vision_inputs()][: len(rest)]
        values = dict(zip(names, rest, strict=True))
        output = tower(
            values.pop("pixel_values"),
            grid_thw=None,
            cu_seqlens=torch.zeros(2, dtype=torch.int32),
            max_seqlen=1,
            **values,
        )
        return self.features(output)
