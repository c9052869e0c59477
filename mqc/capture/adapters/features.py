"""Towers whose hidden states of chosen layers are the image's features."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from mqc.capture.adapters.base import Adapter, base_model
from mqc.capture.adapters.registry import register


@register("llava")
class FeatureLayers(Adapter):
    """LLaVA: the hidden states of one or several tower layers through an MLP connector."""

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        features = self.tile_features(base_model(model), inputs[0])
        return features.reshape(-1, features.shape[-1])

    def tile_features(self, base: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Features of each tile, connector included: [tiles, rows, hidden]."""
        states = base.vision_tower(pixels, output_hidden_states=True).hidden_states
        layers = self.config.vision_feature_layer
        chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]
        if self.config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        features: torch.Tensor = base.multi_modal_projector(
            torch.cat(chosen, -1) if chosen[1:] else chosen[0]
        )
        return features
