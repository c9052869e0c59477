"""ATen operators that mqc translates to ONNX itself, because the exporter's way is slow or unsafe.

Attention: grouped keys and values are never repeated, the boolean mask becomes an additive one
that all layers share (equal nodes are merged when a session is made), and no row can become NaN,
since a forbidden score is the lowest finite number, not minus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

FORBIDDEN = torch.finfo(torch.float32).min
"""Additive mask of a key that a row may not attend: exp() of it is 0 beside any allowed score."""


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention``: [B,H,T,D], [B,G,L,D], [B,G,L,D] -> [B,H,T,D].

    ``attn_mask`` is bool (True = may attend) or additive, [B or 1, 1, T, L] or, without grouping,
    anything that broadcasts to [B,H,T,L]. With grouping (G < H) the H / G query heads that share a
    key head are stacked along T: one matrix product a key head.

    Raises:
        NotImplementedError: dropout, an implicit causal mask, or grouping with a mask per head.
    """
    if dropout_p or is_causal:
        raise NotImplementedError("attention with dropout or an implicit causal mask")
    rank, width = len(query.shape), int(query.shape[-1])
    heads, groups = query.shape[-3], key.shape[-3]
    grouped = enable_gqa and heads != groups
    mask = _additive(attn_mask)
    scaled = op.Mul(query, op.Constant(value_float=_scale(scale, width)))
    if grouped:
        scaled = op.Reshape(scaled, op.Constant(value_ints=[0, int(groups), -1, width]))
        mask = _stack(mask, int(heads) // int(groups))
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(scaled, turned)
    if mask is not None:
        scores = op.Add(scores, mask)
    result = op.MatMul(op.Softmax(scores, axis=-1), value)
    if grouped:
        result = op.Reshape(result, op.Constant(value_ints=[0, int(heads), -1, width]))
    return result


def _scale(scale: float | None, width: int) -> float:
    return 1.0 / math.sqrt(width) if scale is None else float(scale)


def _additive(mask: Any) -> Any:
    if mask is None or mask.dtype.is_floating_point():
        return mask
    allowed, forbidden = op.Constant(value_float=0.0), op.Constant(value_float=FORBIDDEN)
    return op.Where(mask, allowed, forbidden)


def _stack(mask: Any, times: int) -> Any:
    """The mask of stacked query heads: [B,1,T,L] -> [B,1,times*T,L]."""
    if mask is None:
        return None
    if mask.shape is not None and mask.shape[-3] != 1:
        raise NotImplementedError("grouped attention with a mask per head")
    return op.Concat(*([mask] * times), axis=-2)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}
"""Operator overload -> translation, for ``torch.onnx.export(custom_translation_table=...)``."""
