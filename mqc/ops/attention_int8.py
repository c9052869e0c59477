"""mqc::attention_int8: mqc::attention over caches of int8 rows, each with a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mqc.ops.attention import Call, append_body, attend_body, define, heads_body

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body

LARGEST = 127.0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [..., D] as int8, and their scales [...] in float32.

    A row's scale is its largest magnitude over 127, or 1 where the row is zero; values are rounded
    half to even. The CUDA kernels store the same.
    """
    largest = x.float().abs().amax(-1)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    steps = torch.round(x.float() / scale[..., None]).clamp(-LARGEST, LARGEST)
    return steps.to(torch.int8), scale


def reference(*given: Any) -> tuple[Tensor, ...]:
    """:func:`mqc.ops.attention.reference` where new rows are quantized and all rows read as such.

    Args:
        q, k, v, past, mask, cos, sin, scale, rotary: as there.
        key_cache, value_cache: int8 [B, Hkv, C, D] and [B, Hkv, C, Dv]; keys are rotated.
        key_scale, value_scale: float32 [B, Hkv, C], one for each row of a head.

    Returns:
        (out [B, S, Hq * Dv], key cache, value cache, key scales, value scales), the last four of
        max(C, M) rows.

    Raises:
        UsageError: on arguments that do not fit each other.
    """
    call = Call.of(*given)
    q, k, v = call.turned()
    (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
    caches = call.appended(k, v, k_scale, v_scale)
    keys, values = (
        rows.to(q.dtype) * scales[..., None].to(q.dtype)
        for rows, scales in zip(caches[:2], caches[2:], strict=True)
    )
    return call.attend(q, keys, values), *caches


def _body(body: Body, flags: Sequence[str]) -> tuple[str, ...]:
    """The body of attention, with rows quantized before they enter the caches."""
    q, *new = heads_body(body, flags)
    caches, scales, floats = [], [], []
    last, low, high = body.axes(-1), *(body.constant(np.float32(n)) for n in (-LARGEST, LARGEST))
    for name, x in zip(("key", "value"), new, strict=True):
        largest = body("ReduceMax", body("Abs", x), last, keepdims=1)
        some = body("Greater", largest, body.constant(np.float32(0)))
        scale = body("Where", some, body("Div", largest, high), body.constant(np.float32(1)))
        steps = body("Clip", body("Round", body("Div", x, scale)), low, high)
        cache = append_body(body, f"{name}_cache", body.cast(steps, "INT8"), "INT8")
        rows = append_body(body, f"{name}_scale", body("Squeeze", scale, last))
        caches.append(cache)
        scales.append(rows)
        wide = body.cast(cache, "FLOAT")
        floats.append(body("Mul", wide, body("Unsqueeze", rows, last)))
    return (attend_body(body, q, *floats), *caches, *scales)


OP = define(
    "attention_int8",
    "AttentionInt8",
    ("key_cache", "value_cache", "key_scale", "value_scale"),
    reference,
    _body,
    dict.fromkeys(("key_cache", "value_cache", "new_key_cache", "new_value_cache"), "q8"),
)
