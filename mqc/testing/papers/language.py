"""A decoder of the older kind: one fused linear for Q, K and V, and optional visual experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


class RmsNorm(nn.Module):
    """RMSNorm with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Choice(nn.Module):
    """One module for all rows, or a second one for visual rows (CogVLM, arXiv 2311.03079)."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor, visual: torch.Tensor | None) -> torch.Tensor:
        """``visual``: bool [batch, tokens]; without it every row is text."""
        text: torch.Tensor = self.experts[0](x)
        if len(self.experts) == 1 or visual is None:
            return text
        return torch.where(visual[..., None], self.experts[1](x), text)


class GatedMlp(nn.Module):
    """``down(up(x) * silu(gate(x)))``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.up(x) * silu(self.gate(x)))
        return result


class Block(nn.Module):
    """Attention with grouped heads and rotary positions, then a gated feed-forward block."""

    def __init__(self, config: Any, layer: int, experts: int) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.kv_heads, self.layer = config.num_key_value_heads, layer
        self.head = width // self.heads
        self.sizes = [self.heads * self.head, *[self.kv_heads * self.head] * 2]
        self.norm_1, self.norm_2 = RmsNorm(width), RmsNorm(width)
        self.qkv = Choice(*(nn.Linear(width, sum(self.sizes)) for _ in range(experts)))
        self.out = Choice(*(nn.Linear(width, width, bias=False) for _ in range(experts)))
        inner = config.intermediate_size
        self.mlp = Choice(*(GatedMlp(width, inner) for _ in range(experts)))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
        visual: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x + self.attend(self.norm_1(x), mask, rotary, cache, visual)
        result: torch.Tensor = x + self.mlp(self.norm_2(x), visual)
        return result

    def attend(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
        visual: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x, visual).split(self.sizes, dim=-1)
        q, k, v = (part.view(batch, tokens, -1, self.head).transpose(1, 2) for part in parts)
        q, k = _rotate(q, rotary), _rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (_repeat(heads, self.heads // self.kv_heads) for heads in (k, v))
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width), visual)
        return result


class LanguageModel(PreTrainedModel):  # type: ignore[misc]
    """Embeddings, blocks and the last norm; called as transformers' decoders are."""

    _supports_sdpa = True

    def __init__(self, config: Any, experts: int = 1) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, width)
        layers = range(config.num_hidden_layers)
        self.blocks = nn.ModuleList(Block(config, layer, experts) for layer in layers)
        self.norm = RmsNorm(width)
        head = width // config.num_attention_heads
        steps = torch.arange(0, head, 2, dtype=torch.float32)
        self.register_buffer("frequencies", 10000.0 ** (-steps / head), persistent=False)

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        modality: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """``attention_mask`` bool [batch, 1, tokens, keys]; ``modality`` bool [batch, tokens]."""
        angles = position_ids[..., None].float() * self.frequencies
        angles = torch.cat([angles, angles], -1)[:, None]
        rotary = angles.cos().to(inputs_embeds.dtype), angles.sin().to(inputs_embeds.dtype)
        hidden = inputs_embeds
        for block in self.blocks:
            hidden = block(hidden, attention_mask, rotary, past_key_values, modality)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat([-right, left], dim=-1) * rotary[1]


def _repeat(heads: torch.Tensor, times: int) -> torch.Tensor:
    batch, count, tokens, width = heads.shape
    wide = heads[:, :, None].expand(batch, count, times, tokens, width)
    return wide.reshape(batch, count * times, tokens, width)
