"""Attention for vision towers that pack several images: one call is one segment.

Towers with a variable grid split their patches by ``cu_seqlens.tolist()``, which no graph can
hold. transformers hands the boundaries to the attention function instead when the attention
implementation is a flash one, and takes for flash every implementation whose name says so. mqc
registers such a function through the public ``AttentionInterface``; it computes plain SDPA. This
file is the only place that relies on that convention.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

NAME = "mqc_flash_segments"


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside segments; ``query``, ``key``, ``value``: [1, heads, patches, head_dim].

    ``cu_seq_lens_q`` holds the segments' boundaries (int32 [segments + 1]). With two entries the
    whole call is one segment and needs no mask; with more, patches of other segments are masked.
    Returns ([1, patches, heads, head_dim], None), as transformers' attention functions do.
    """
    mask = None
    if cu_seq_lens_q is not None and cu_seq_lens_q.shape[0] != 2:
        index = torch.arange(query.shape[2], device=query.device)
        segment = (index[:, None] >= cu_seq_lens_q[None, 1:]).sum(-1)
        mask = (segment[:, None] == segment[None, :])[None, None]
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def use_segment_attention(model: PreTrainedModel) -> None:
    """Make the vision part of ``model`` call :func:`segment_attention`."""
    AttentionInterface.register(NAME, segment_attention)
    model.set_attn_implementation({"vision_config": NAME})
