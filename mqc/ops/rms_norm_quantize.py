"""mqc::rms_norm_quantize: RMSNorm without gain, then quantize_static."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mqc.ops import quantize_static
from mqc.ops._library import Arguments, OnnxForm, OpDef, register
from mqc.ops._modality import modality_inputs
from mqc.ops._split import (
    split_columns,
    split_fake,
    split_flag,
    split_inputs,
    split_outputs,
    with_split,
)

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def reference(
    x: Tensor,
    eps: float,
    scale: Tensor,
    modality: Tensor | None,
    split: Tensor | None,
    unsigned: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) over the last axis; returns (quantized y, y[..., split]).

    Args:
        x: float [..., K].
        scale, modality: as quantize_static takes them.
        split: int64 [k], columns to return in float, or None for none.
        unsigned: uint8 with zero point 128 instead of int8.

    Returns:
        xq int8 or uint8 [..., K], and x_split [..., k] in x's dtype.
    """
    y = torch.ops.aten.rms_norm.default(x, [x.shape[-1]], None, eps)
    return quantize_static.reference(y, scale, modality, unsigned), split_columns(y, split)


def fake(
    x: Tensor,
    eps: float,
    scale: Tensor,
    modality: Tensor | None,
    split: Tensor | None,
    unsigned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Shape function: x's shape as int8 or uint8, and the split columns."""
    return quantize_static.fake(x, scale, modality, unsigned), split_fake(x, split)


def _flags(arguments: Arguments) -> tuple[str, ...]:
    return quantize_static.quantize_flags(arguments) + split_flag(arguments)


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("x", "scale", *modality_inputs(flags), *split_inputs(flags))


def _body(body: Body, flags: Sequence[str]) -> tuple[str, ...]:
    """The form that onnxruntime fuses into one kernel: it wants a gain, so there is one of ones."""
    square = body("Pow", "x", body.constant(np.float32(2)))
    mean = body("ReduceMean", square, body.axes(-1), keepdims=1)
    root = body("Sqrt", body("Add", mean, body.attribute("eps")))
    one = body.constant(np.float32(1))
    gain = body("Expand", one, body.dim("x", -1))
    y = body("Mul", body("Div", "x", root), gain)
    return with_split(body, quantize_static.quantize_body(body, y, flags), y, flags)


OP = register(
    OpDef(
        "rms_norm_quantize",
        "(Tensor x, float eps, Tensor scale, Tensor? modality, Tensor? split, "
        "bool unsigned=False) -> (Tensor xq, Tensor x_split)",
        reference,
        fake,
        OnnxForm(
            "RmsNormQuantize",
            _flags,
            _inputs,
            _body,
            {"modality": "bool|int64", "split": "int64", "xq": "q8"},
            attributes=("eps",),
            outputs=split_outputs,
        ),
    )
)
