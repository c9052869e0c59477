"""What the models of this package share: configuration, merge of image rows, head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from mqc.testing.papers.language import LanguageModel


@strict
class PaperConfig(PreTrainedConfig):  # type: ignore[misc]
    """A vision tower, a language model, and what joins them."""

    model_type = "paper"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    vision_config: dict | PreTrainedConfig | None = None  # type: ignore[type-arg]
    text_config: dict | PreTrainedConfig | None = None  # type: ignore[type-arg]
    image_token_id: int = 7
    query_tokens: int = 4
    tie_word_embeddings: bool = False


class PaperModel(PreTrainedModel):  # type: ignore[misc]
    """Tower, language model and head; ``experts``: weights of their own for visual rows."""

    config_class = PaperConfig
    base_model_prefix = ""
    _supports_sdpa = True
    experts: int = 1

    def __init__(self, config: PaperConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.visual = self.tower(config)
        self.language = LanguageModel(text, self.experts)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def tower(self, config: PaperConfig) -> nn.Module:
        """The vision tower with its connector: its inputs to [images, rows, hidden]."""
        raise NotImplementedError

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Positions of the tokens: int64 [batch, tokens]."""
        return torch.arange(input_ids.shape[1]).expand_as(input_ids)

    def get_input_embeddings(self) -> nn.Module:
        return self.language.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> LanguageModel:
        return self.language

    def get_image_features(
        self, pixel_values: torch.Tensor, return_dict: bool = True, **more: Any
    ) -> Any:
        return BaseModelOutputWithPooling(pooler_output=self.visual(pixel_values, **more))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, tokens, vocabulary]; ``more`` goes to the tower."""
        embeds = self.get_input_embeddings()(input_ids)
        image = input_ids == self.config.image_token_id
        if pixel_values is not None:
            rows = self.get_image_features(pixel_values, **more).pooler_output
            embeds = embeds.masked_scatter(image[..., None], rows.to(embeds.dtype))
        tokens = input_ids.shape[1]
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None] | torch.eye(tokens).bool()
        hidden = self.language(
            inputs_embeds=embeds,
            position_ids=self.positions(input_ids),
            attention_mask=seen,
            modality=image,
        ).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


def register_model(config: type[PaperConfig], model: type[PaperModel]) -> None:
    """Make transformers' auto classes know ``model``."""
    model.config_class = config
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)
