"""Connectors of learned queries that read the prompt's instruction too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from mqc.capture.adapters.base import Adapter, Call, DynamicSize, VisionInput, base_model
from mqc.capture.adapters.registry import register

register("blip-2")(Adapter)


@register("instructblip")
class InstructedQueriesAdapter(Adapter):
    """InstructBLIP: the Q-Former sees the image and the instruction, tokenised for it."""

    def vision_inputs(self) -> list[VisionInput]:
        (pixels,) = super().vision_inputs()
        most = int(self.config.qformer_config.max_position_embeddings)
        words = (pixels.shape[0], DynamicSize("words", example=5, most=most))
        names = ("qformer_input_ids", "qformer_attention_mask")
        return [pixels, *(VisionInput(n, words, ("image", None), torch.int64) for n in names)]

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        pixels, ids, mask = inputs
        features = base_model(model).get_image_features(pixels, ids, mask, return_dict=True)
        rows: torch.Tensor = features.pooler_output
        return rows.reshape(-1, rows.shape[-1])

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        pixels, ids = processed.get("pixel_values"), processed.get("qformer_input_ids")
        if pixels is None or ids is None:
            return []
        pixels, ids = torch.as_tensor(pixels), torch.as_tensor(ids)
        mask = torch.as_tensor(processed.get("qformer_attention_mask", torch.ones_like(ids)))
        return [
            {
                "pixel_values": pixels[i : i + 1],
                "qformer_input_ids": ids[i : i + 1],
                "qformer_attention_mask": mask[i : i + 1],
            }
            for i in range(len(pixels))
        ]
