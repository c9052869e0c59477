"""mqc::activation_quantize: (gated) activation, blockwise Hadamard transform, quantize_static."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mqc.errors import UsageError
from mqc.numerics.hadamard import hadamard_factors
from mqc.ops import hadamard, quantize_static
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

aten = torch.ops.aten

QUICK_GELU = 1.702
"""quick_gelu(x) = x * sigmoid(1.702 x), CLIP's approximation of GELU."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": aten.silu.default,
    "gelu": aten.gelu.default,
    "gelu_tanh": lambda x: aten.gelu.default(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(x * QUICK_GELU),
    "relu": aten.relu.default,
}
"""The functions that ``activation`` may name."""


def reference(
    x: Tensor,
    activation: str,
    gated: bool,
    hadamard_block: int,
    scale: Tensor,
    modality: Tensor | None,
    split: Tensor | None,
    unsigned: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = H(act(x)), or H(act(gate) * up) with x = [gate, up]; (quantized y, y[..., split]).

    Args:
        x: float [..., N], or [..., 2 N] if gated, the gate first.
        activation: a name of ``ACTIVATIONS``.
        hadamard_block: size of the transform's blocks (mqc::hadamard); 1 is no transform.
        scale, modality: as quantize_static takes them.
        split: int64 [k], columns of y to return in float, or None for none.
        unsigned: uint8 with zero point 128 instead of int8.

    Returns:
        xq int8 or uint8 [..., N], and x_split [..., k] in x's dtype.

    Raises:
        UsageError: an unknown activation, or a gated x with an odd last axis.
    """
    function = ACTIVATIONS.get(activation)
    if function is None:
        raise UsageError(
            f"unknown activation {activation!r}", hint=f"use one of {', '.join(ACTIVATIONS)}"
        )
    y = function(x[..., : _width(x, gated)])
    if gated:
        y = y * x[..., _width(x, gated) :]
    if hadamard_block != 1:
        y = hadamard.reference(y, hadamard_block)
    return quantize_static.reference(y, scale, modality, unsigned), split_columns(y, split)


def _width(x: Tensor, gated: bool) -> int:
    if gated and x.shape[-1] % 2:
        raise UsageError(f"a gated activation has an even last axis, got {tuple(x.shape)}")
    return x.shape[-1] // 2 if gated else x.shape[-1]


def fake(
    x: Tensor,
    activation: str,
    gated: bool,
    hadamard_block: int,
    scale: Tensor,
    modality: Tensor | None,
    split: Tensor | None,
    unsigned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Shape function: rows of x times N, int8 or uint8, and the split columns."""
    y = x.new_empty((*x.shape[:-1], _width(x, gated)))
    return quantize_static.fake(y, scale, modality, unsigned), split_fake(y, split)


def _flags(arguments: Arguments) -> tuple[str, ...]:
    name = str(arguments["activation"]).replace("_", "")
    gated = ("gated",) if arguments.get("gated") else ()
    factors = len(hadamard_factors(int(arguments["hadamard_block"])))
    rest = quantize_static.quantize_flags(arguments) + split_flag(arguments)
    return (name, *gated, f"f{factors}", *rest)


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    factors = hadamard.factor_inputs(flags)
    return ("x", "scale", *modality_inputs(flags), *split_inputs(flags), *factors)


def _constants(arguments: Arguments) -> Mapping[str, Any]:
    return hadamard.factor_constants(int(arguments["hadamard_block"]))


def _activation_body(body: Body, x: str, name: str) -> str:
    if name == "silu":
        return body("Mul", x, body("Sigmoid", x))
    if name == "quickgelu":
        return body("Mul", x, body("Sigmoid", body("Mul", x, body.constant(np.float32(1.702)))))
    if name in ("gelu", "gelutanh"):
        return body("Gelu", x, approximate="tanh" if name == "gelutanh" else "none")
    return body("Relu", x) if name == "relu" else x


def _body(body: Body, flags: Sequence[str]) -> tuple[str, ...]:
    x = "x"
    if "gated" in flags:
        two, last = body.axes(2), body.axes(-1)
        half = body("Div", body.dim("x", -1), two)
        x = body("Slice", "x", body.axes(0), half, last)
        up = body("Slice", "x", half, body.axes(np.iinfo(np.int64).max), last)
    y = _activation_body(body, x, flags[0])
    if "gated" in flags:
        y = body("Mul", y, up)
    y = hadamard.hadamard_body(body, y, flags)
    return with_split(body, quantize_static.quantize_body(body, y, flags), y, flags)


OP = register(
    OpDef(
        "activation_quantize",
        "(Tensor x, str activation, bool gated, int hadamard_block, Tensor scale, "
        "Tensor? modality, Tensor? split, bool unsigned=False) -> (Tensor xq, Tensor x_split)",
        reference,
        fake,
        OnnxForm(
            "ActivationQuantize",
            _flags,
            _inputs,
            _body,
            {"modality": "bool|int64", "split": "int64", "xq": "q8"},
            _constants,
            ("hadamard_block",),
            split_outputs,
        ),
    )
)
