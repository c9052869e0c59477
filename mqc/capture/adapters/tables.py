"""Visual vocabularies: image rows are mixtures of a table's rows, and so are some tokens."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mqc.capture.adapters.base import Adapter, base_model
from mqc.capture.adapters.registry import register


@register("ovis2")
class VisualTableAdapter(Adapter):
    """Tokens that frame an image (``visual_indicator_token_ids``) are the last rows of the visual
    table, wherever they stand; they occur with images only."""

    def embed(self, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
        names = self.config.visual_indicator_token_ids
        table = base_model(model).visual_embeddings_table.weight[-len(names) :]
        match = input_ids[..., None] == torch.tensor(names)
        index = (match * torch.arange(len(names))).sum(-1)
        visual = torch.nn.functional.embedding(index, table)
        return torch.where(
            match.any(-1, keepdim=True), visual, model.get_input_embeddings()(input_ids)
        )
