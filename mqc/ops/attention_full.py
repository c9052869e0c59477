"""mqc::attention_full: rotary embedding and attention to all given keys, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mqc.errors import UsageError
from mqc.ops._heads import (
    FORBIDDEN,
    check_rotary,
    end_of,
    repeated,
    rotary_flags,
    rotate,
    rotate_body,
    slice_body,
)
from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_heads: int,
    scale: float,
    rotary: str,
) -> Tensor:
    """softmax(scale * rot(q) rot(k)^T, where mask) v: towers of vision models, resamplers.

    Query head h attends key head h // (Hq / Hkv). Nothing is repeated.

    Args:
        q: float [B, S, Hq, D]; or [B, S, Hq + 2 Hkv, D], keys and values packed after the queries.
        k, v: float [B, T, Hkv, D] and [B, T, Hkv, Dv], or None where packed (then T = S).
        mask: bool [B or 1, 1, S, T], True = may attend; every row attends some key. None: all do.
        cos, sin: [B or 1, S, R], R <= D even, for queries and keys (then T = S); None with rotary
            "none".
        kv_heads: Hkv.
        scale: of the scores.
        rotary: "none", "half" or "interleaved" (:func:`~mqc.ops._heads.rotate`).

    Returns:
        [B, S, Hq * Dv].

    Raises:
        UsageError: on arguments that do not fit each other.
    """
    check_rotary(rotary, cos, sin)
    if (k is None) != (v is None):
        raise UsageError("k and v come together, or packed in q: one of the two is missing")
    if k is None or v is None:
        q, k, v = q.split([q.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    if not k.shape[2] == v.shape[2] == kv_heads or q.shape[2] % kv_heads:
        raise UsageError(
            f"{q.shape[2]} query, {k.shape[2]} key and {v.shape[2]} value heads do not fit "
            f"kv_heads={kv_heads}",
            hint="keys and values have kv_heads heads, a divisor of the query heads",
        )
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if cos is not None and sin is not None:
        if k.shape[2] != q.shape[2]:
            raise UsageError(f"{k.shape[2]} keys cannot turn by the angles of {q.shape[2]} queries")
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = rotate(q, cos, sin, rotary), rotate(k, cos, sin, rotary)
    repeats = q.shape[1] // kv_heads
    if repeats > 1:
        k, v = repeated(k, repeats), repeated(v, repeats)
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    out: Tensor = sdpa(q, k, v, mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def fake(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_heads: int,
    scale: float,
    rotary: str,
) -> Tensor:
    """Shape function: a row of all heads for every query."""
    heads = q.shape[2] if v is not None else q.shape[2] - 2 * kv_heads
    width = q.shape[3] if v is None else v.shape[3]
    return q.new_empty((*q.shape[:2], heads * width))


def _flags(arguments: Arguments) -> tuple[str, ...]:
    packed = ("packed",) if arguments.get("k") is None else ()
    mask = () if arguments.get("mask") is None else ("mask",)
    return (*packed, *mask, *rotary_flags(arguments))


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    apart = () if "packed" in flags else ("k", "v")
    mask = ("mask",) if "mask" in flags else ()
    angles = ("cos", "sin") if "half" in flags or "interleaved" in flags else ()
    return ("q", *apart, *mask, *angles)


def _body(body: Body, flags: Sequence[str]) -> str:
    """Query heads of a key head stand on an axis of their own: nothing is repeated.

    The numbers to add for a mask are made of it alone, so onnxruntime makes them once for all
    layers that read it.
    """
    groups = body.attribute("kv_heads", integer=True)
    q, k, v = "q", "k", "v"
    if "packed" in flags:
        minus = body("Neg", groups)
        first = body("Mul", minus, body.axes(2))
        k, v = slice_body(body, "q", first, minus, 2), slice_body(body, "q", minus, end_of(body), 2)
        q = slice_body(body, "q", body.axes(0), first, 2)
    if "half" in flags or "interleaved" in flags:
        q, k = rotate_body(body, q, flags), rotate_body(body, k, flags)
    minus_one = body.axes(-1)
    grouped = body("Concat", body.axes(0, 0), groups, minus_one, body.dim(q, 3), axis=0)
    swap = [0, 2, 3, 1, 4]  # [B, S, Hkv, Hq / Hkv, D] -> [B, Hkv, Hq / Hkv, S, D]
    queries = body("Transpose", body("Reshape", q, grouped), perm=swap)
    queries = body("Mul", queries, body.attribute("scale"))
    three = body.axes(3)
    keys = body("Transpose", body("Unsqueeze", k, three), perm=[0, 2, 3, 4, 1])
    values = body("Transpose", body("Unsqueeze", v, three), perm=swap)
    scores = body("MatMul", queries, keys)
    if "mask" in flags:
        allowed = body("Where", "mask", body.constant(np.float32(0)), body.constant(FORBIDDEN))
        scores = body("Add", scores, body("Unsqueeze", allowed, body.axes(1)))
    out = body("MatMul", body("Softmax", scores, axis=-1), values)
    rows = body("Transpose", out, perm=[0, 3, 1, 2, 4])
    return body("Reshape", rows, body.axes(0, 0, -1))


OP = register(
    OpDef(
        "attention_full",
        "(Tensor q, Tensor? k, Tensor? v, Tensor? mask, Tensor? cos, Tensor? sin, int kv_heads, "
        "float scale, str rotary) -> Tensor",
        reference,
        fake,
        OnnxForm(
            "AttentionFull",
            _flags,
            _inputs,
            _body,
            {"mask": "bool"},
            attributes=("kv_heads", "scale"),
            outputs=lambda flags: ("out",),
        ),
    )
)
