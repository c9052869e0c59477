"""mqc::attention_int8: mqc::attention over caches of int8 rows, each with a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mqc.ops._library import OnnxForm, OpDef, register
from mqc.ops.attention import (
    append,
    append_body,
    attend,
    attend_body,
    heads_body,
    rows_of,
    turned_heads,
    variant_flags,
)

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


def reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    past: Tensor,
    mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    rotary: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    q, k, v = turned_heads(q, k, v, key_cache, cos, sin, rotary)
    start, end = rows_of(past, q, mask)
    (k, new_key_scale), (v, new_value_scale) = quantize_rows(k), quantize_rows(v)
    rows = mask.shape[3]
    key_cache, value_cache = append(key_cache, k, start, rows), append(value_cache, v, start, rows)
    key_scale = append(key_scale, new_key_scale, start, rows)
    value_scale = append(value_scale, new_value_scale, start, rows)
    keys, values = (
        cache[:, :, :end].to(q.dtype) * scales[:, :, :end, None].to(q.dtype)
        for cache, scales in ((key_cache, key_scale), (value_cache, value_scale))
    )
    out = attend(q, keys, values, mask[..., :end], scale)
    return out, key_cache, value_cache, key_scale, value_scale


def fake(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    past: Tensor,
    mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    rotary: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shape function: the output and the caches, as long as the longer of cache and mask."""
    heads = q.shape[2] if k is not None else q.shape[2] - 2 * key_cache.shape[1]
    rows = torch.sym_max(key_cache.shape[2], mask.shape[3])
    out = q.new_empty((*q.shape[:2], heads * value_cache.shape[3]))
    caches = [c.new_empty((*c.shape[:2], rows, c.shape[3])) for c in (key_cache, value_cache)]
    scales = [s.new_empty((*s.shape[:2], rows)) for s in (key_scale, value_scale)]
    return out, caches[0], caches[1], scales[0], scales[1]


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    apart = () if "packed" in flags else ("k", "v")
    angles = ("cos", "sin") if "half" in flags or "interleaved" in flags else ()
    caches = ("key_cache", "value_cache", "key_scale", "value_scale")
    return ("q", *apart, *caches, "past", "mask", *angles)


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


OP = register(
    OpDef(
        "attention_int8",
        "(Tensor q, Tensor? k, Tensor? v, Tensor key_cache, Tensor value_cache, Tensor key_scale, "
        "Tensor value_scale, Tensor past, Tensor mask, Tensor? cos, Tensor? sin, float scale, "
        "str rotary) -> (Tensor out, Tensor new_key_cache, Tensor new_value_cache, "
        "Tensor new_key_scale, Tensor new_value_scale)",
        reference,
        fake,
        OnnxForm(
            "AttentionInt8",
            variant_flags,
            _inputs,
            _body,
            {
                "past": "int64",
                "mask": "bool",
                **dict.fromkeys(("key_cache", "value_cache"), "q8"),
                **dict.fromkeys(("new_key_cache", "new_value_cache"), "q8"),
            },
            attributes=("scale",),
            outputs=lambda flags: (
                *("out", "new_key_cache", "new_value_cache"),
                *("new_key_scale", "new_value_scale"),
            ),
        ),
    )
)
