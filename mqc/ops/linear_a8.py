"""mqc::linear_w4a8 and mqc::linear_w8a8: integer activations times integer weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mqc.errors import UsageError
from mqc.ops._library import Arguments, OnnxForm, OpDef, register
from mqc.ops._modality import modality_flag, modality_inputs, row_scale, row_scale_body
from mqc.ops._weights import (
    add_residual,
    add_terms,
    compute_dtype,
    grouped_weight_body,
    groups_of,
    in_tiles,
    layout_flag,
    odd_flag,
    term_inputs,
    terms_body,
    tiled_int8,
    weight_body,
    weight_flags,
    weight_int8,
)
from mqc.ops.quantize_static import ZERO_POINT

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body

_EXACT = 2**24
"""Integers up to this magnitude, and so all partial sums below it, are exact in float32."""


def integer_matmul(xq: Tensor, weight: Tensor, weight_bound: int) -> Tensor:
    """xq . weight^T exactly, as int32 [..., N]; xq int8 (or uint8 + 128) [..., K], weight [N, K].

    Float32 products over chunks of K so short that every partial sum is an integer below 2^24:
    exact in any summation order, on any number of threads. int32 holds K up to 131071.
    """
    x = xq.to(torch.float32)
    if xq.dtype == torch.uint8:
        x -= ZERO_POINT
    k = xq.shape[-1]
    chunk = _EXACT // (128 * weight_bound)
    total = torch.zeros((*xq.shape[:-1], weight.shape[0]), dtype=torch.int32, device=xq.device)
    for start in range(0, k, chunk):
        part = weight[:, start : start + chunk].to(torch.float32)
        total += (x[..., start : start + chunk] @ part.T).to(torch.int32)
    return total


def _linear(
    packed: bool,
    xq: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    x_scale: Tensor,
    modality: Tensor | None,
    bias: Tensor | None,
    x_split: Tensor | None,
    w_split: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """(xq . w^T) * w_scale * x_scale[row] + bias + x_split @ w_split^T + residual; w_scale's dtype.

    Args:
        packed: qweight is packed int4 (uint8 [N, ceil(K/2)]), else int8 [N, K]; either may be in
            layout C16K4 instead (:mod:`mqc.numerics.packing`).
        xq: int8, or uint8 shifted by 128, [..., K].
        w_scale: [N] or [N, G]; with groups, the group products are scaled, then summed.
        x_scale, modality: see `mqc.ops`.
        x_split, w_split: [..., k] and [N, k], a rank-k term in float.
        residual: [..., N] in w_scale's dtype, added last.

    Raises:
        UsageError: on dtypes or shapes that do not fit.
    """
    if xq.dtype not in (torch.int8, torch.uint8):
        raise UsageError(f"quantized activations are int8 or uint8, got {xq.dtype}")
    k = xq.shape[-1]
    if in_tiles(qweight):
        weight = tiled_int8(qweight, w_scale, k, packed)
    else:
        weight = weight_int8(qweight, k, packed)
    n = weight.shape[0]
    groups = groups_of(w_scale, n, k)
    bound = 8 if packed else 128
    scale = w_scale.to(compute_dtype(w_scale.dtype)).reshape(n, groups)
    y = torch.zeros((*xq.shape[:-1], n), dtype=scale.dtype, device=xq.device)
    size = k // groups
    for g in range(groups):
        span = slice(g * size, (g + 1) * size)
        y += integer_matmul(xq[..., span], weight[:, span], bound).to(scale.dtype) * scale[:, g]
    y *= row_scale(xq, x_scale, modality).to(scale.dtype)
    y = add_terms(y, bias, x_split, w_split).to(w_scale.dtype)
    return add_residual(y, residual)


def fake(
    xq: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    x_scale: Tensor,
    modality: Tensor | None,
    bias: Tensor | None,
    x_split: Tensor | None,
    w_split: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Shape function: xq's rows times N, in w_scale's dtype."""
    return xq.new_empty((*xq.shape[:-1], w_scale.shape[0]), dtype=w_scale.dtype)


def _flags(packed: bool, arguments: Arguments) -> tuple[str, ...]:
    signed = () if str(arguments["xq"].dtype) == "UINT8" else ("s8",)
    odd = odd_flag("xq", arguments) if packed else ()
    flags = modality_flag("x_scale", arguments) + weight_flags(arguments) + odd + signed
    return flags + layout_flag(arguments)


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("xq", "qweight", "w_scale", "x_scale", *modality_inputs(flags), *term_inputs(flags))


def _body(packed: bool, body: Body, flags: Sequence[str]) -> str:
    """DequantizeLinear of u8 activations and s8 weights, then MatMul.

    onnxruntime fuses this to one integer product that scales its int32 sums on the way out
    (MatMulIntegerToFloat); a plain MatMulInteger would leave Cast and Mul as extra passes over
    the output. Signed activations have no fast product there and are shifted by 128 first.
    """
    x = "xq"
    if "s8" in flags:
        wide = body("Add", body.cast(x, "INT32"), body.constant(np.int32(ZERO_POINT)))
        x = body.cast(wide, "UINT8")
    zero_point = body.constant(np.uint8(ZERO_POINT))
    weight = weight_body(body, flags, packed)
    rows = row_scale_body(body, "xq", "x_scale", flags)
    if rows is None:
        scale = body("Squeeze", "x_scale", body.axes(0))
    else:
        scale = body.constant(np.float32(1))
    if "group" in flags:
        y = _grouped_product(body, x, weight, zero_point)
        y = y if rows is not None else body("Mul", y, scale)
    else:
        left = body("DequantizeLinear", x, scale, zero_point)
        transposed = body("Transpose", weight, perm=[1, 0])
        y = body("MatMul", left, body("DequantizeLinear", transposed, "w_scale", axis=1))
    if rows is not None:
        y = body("Mul", y, rows)
    return terms_body(body, y, flags)


def _grouped_product(body: Body, x: str, weight: str, zero_point: str) -> str:
    """One batched integer product over groups, [G, M, N], scaled and summed over G; [..., N].

    Weights stay one byte a value; slower than the per-channel form, for onnxruntime packs
    constant weights ahead only where they are matrices.
    """
    groups = body.dim("w_scale", 1)
    w = body("Transpose", grouped_weight_body(body, weight), perm=[1, 2, 0])
    size = body.dim(w, 1)
    split = body("Concat", body.axes(-1), groups, size, axis=0)
    rows = body("Transpose", body("Reshape", x, split), perm=[1, 0, 2])
    product = body.cast(body("MatMulInteger", rows, w, zero_point), "FLOAT")
    by_group = body("Unsqueeze", body("Transpose", "w_scale", perm=[1, 0]), body.axes(1))
    total = body("ReduceSum", body("Mul", product, by_group), body.axes(0), keepdims=0)
    outer = body("Shape", "xq", start=0, end=-1)
    shape = body("Concat", outer, body.dim("w_scale", 0), axis=0)
    return body("Reshape", total, shape, allowzero=1)  # there may be no rows


_SCHEMA = (
    "(Tensor xq, Tensor qweight, Tensor w_scale, Tensor x_scale, Tensor? modality, "
    "Tensor? bias, Tensor? x_split, Tensor? w_split, Tensor? residual=None) -> Tensor"
)


def _define(name: str, onnx_name: str, packed: bool) -> OpDef:
    return register(
        OpDef(
            name,
            _SCHEMA,
            functools.partial(_linear, packed),
            fake,
            OnnxForm(
                onnx_name,
                functools.partial(_flags, packed),
                _inputs,
                functools.partial(_body, packed),
                {"xq": "q8", "qweight": "q8", "modality": "bool|int64"},
            ),
        )
    )


W4A8 = _define("linear_w4a8", "LinearW4A8", packed=True)
W8A8 = _define("linear_w8a8", "LinearW8A8", packed=False)
