"""mqc::quantize_static: float activations to int8 (or shifted uint8) with static scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mqc.ops._library import Arguments, OnnxForm, OpDef, register
from mqc.ops._modality import modality_flag, modality_inputs, row_scale, row_scale_body

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body

ZERO_POINT = 128
"""Offset of the unsigned form."""


def reference(x: Tensor, scale: Tensor, modality: Tensor | None, unsigned: bool = False) -> Tensor:
    """clamp(round_half_even(x / scale[row]), -127, 127) as int8, or + 128 as uint8; x's shape.

    The division is done in the wider of x's and scale's dtypes, float32 at least.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    steps = x.to(dtype) / row_scale(x, scale, modality).to(dtype)
    q = torch.round(steps).clamp_(-127, 127)
    return (q + ZERO_POINT).to(torch.uint8) if unsigned else q.to(torch.int8)


def fake(x: Tensor, scale: Tensor, modality: Tensor | None, unsigned: bool = False) -> Tensor:
    """Shape function: x's shape, int8 or uint8."""
    return x.new_empty(x.shape, dtype=torch.uint8 if unsigned else torch.int8)


def quantize_flags(arguments: Arguments) -> tuple[str, ...]:
    """Variant flags of the modality and of the unsigned form."""
    unsigned = ("u8",) if arguments.get("unsigned") else ()
    return modality_flag("scale", arguments) + unsigned


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("x", "scale", *modality_inputs(flags))


def _body(body: Body, flags: Sequence[str]) -> str:
    """QuantizeLinear saturates to the dtype's range; Clip removes its lowest integer.

    ONNX has no row-wise scale, so by modality x is divided first and quantized with scale 1:
    the one rounding division is the same.
    """
    return quantize_body(body, "x", flags)


def quantize_body(body: Body, x: str, flags: Sequence[str]) -> str:
    """``x`` quantized by the variant's input ``scale``, by row where it has a modality."""
    unsigned = "u8" in flags
    zero_point = np.uint8(ZERO_POINT) if unsigned else np.int8(0)
    lowest = np.uint8(ZERO_POINT - 127) if unsigned else np.int8(-127)
    rows = row_scale_body(body, x, "scale", flags)
    if rows is None:
        scale = body("Squeeze", "scale", body.axes(0))
    else:
        x, scale = body("Div", x, rows), body.constant(np.float32(1))
    q = body("QuantizeLinear", x, scale, body.constant(zero_point))
    return body("Clip", q, body.constant(lowest))


OP = register(
    OpDef(
        "quantize_static",
        "(Tensor x, Tensor scale, Tensor? modality, bool unsigned=False) -> Tensor",
        reference,
        fake,
        OnnxForm(
            "QuantizeStatic", quantize_flags, _inputs, _body, {"modality": "bool|int64", "y": "q8"}
        ),
    )
)
