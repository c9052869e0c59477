"""mqc::linear_w4a16 and mqc::linear_w8a16: float activations, weights quantized for storage."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mqc.ops._library import Arguments, OnnxForm, OpDef, register
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

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def _linear(
    packed: bool,
    x: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_split: Tensor | None,
    w_split: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """x @ (q * w_scale)^T + bias + x_split @ w_split^T + residual, in x's dtype.

    Computed in float32, or float64 for a float64 x; the residual is added last, in x's dtype.

    Args:
        packed: qweight is packed int4 (uint8 [N, ceil(K/2)]), else int8 [N, K]; either may be in
            layout C16K4 instead (:mod:`mqc.numerics.packing`).
        residual: [..., N] in x's dtype.
        x: float [..., K].
        w_scale: [N] or [N, G].

    Raises:
        UsageError: on dtypes or shapes that do not fit.
    """
    k, dtype = x.shape[-1], compute_dtype(x.dtype)
    if in_tiles(qweight):
        weight = tiled_int8(qweight, w_scale, k, packed).to(dtype)
    else:
        weight = weight_int8(qweight, k, packed).to(dtype)
    n = weight.shape[0]
    groups = groups_of(w_scale, n, k)
    scale = w_scale.to(dtype).reshape(n, groups, 1)
    weight = (weight.reshape(n, groups, -1) * scale).reshape(n, k)
    y = add_terms(x.to(dtype) @ weight.T, bias, x_split, w_split).to(x.dtype)
    return add_residual(y, residual)


def fake(
    x: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_split: Tensor | None,
    w_split: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Shape function: x's rows times N, x's dtype."""
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]))


def _flags(packed: bool, arguments: Arguments) -> tuple[str, ...]:
    odd = odd_flag("x", arguments) if packed else ()
    return weight_flags(arguments) + odd + layout_flag(arguments)


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("x", "qweight", "w_scale", *term_inputs(flags))


def _body(packed: bool, body: Body, flags: Sequence[str]) -> str:
    """Dequantize, transpose and MatMul; all but the MatMul is folded at session creation."""
    weight = body.cast(weight_body(body, flags, packed), "FLOAT")
    last = body.axes(-1)
    if "group" in flags:
        scaled = body("Mul", grouped_weight_body(body, weight), body("Unsqueeze", "w_scale", last))
        weight = body("Reshape", scaled, body("Shape", weight))
    else:
        weight = body("Mul", weight, body("Unsqueeze", "w_scale", last))
    y = body("MatMul", "x", body("Transpose", weight, perm=[1, 0]))
    return terms_body(body, y, flags)


_SCHEMA = (
    "(Tensor x, Tensor qweight, Tensor w_scale, Tensor? bias, Tensor? x_split, "
    "Tensor? w_split, Tensor? residual=None) -> Tensor"
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
                {"qweight": "q8"},
            ),
        )
    )


W4A16 = _define("linear_w4a16", "LinearW4A16", packed=True)
W8A16 = _define("linear_w8a16", "LinearW8A16", packed=False)
