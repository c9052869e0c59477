"""mqc::hadamard: the online Hadamard transform of activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mqc.numerics.hadamard import apply_hadamard, hadamard_factors
from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def reference(x: Tensor, block: int) -> Tensor:
    """Each block of the last axis times H_block^T / sqrt(block); x's shape and dtype."""
    y = apply_hadamard(x, block)
    return y.clone() if y is x else y


def fake(x: Tensor, block: int) -> Tensor:
    """Shape function: as x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flags(arguments: Arguments) -> tuple[str, ...]:
    return (f"f{len(hadamard_factors(int(arguments['block'])))}",)


def factor_inputs(flags: Sequence[str]) -> tuple[str, ...]:
    """Names of the factors of a variant, by its flag f0, f1, ..."""
    count = next(int(flag[1:]) for flag in flags if flag[0] == "f" and flag[1:].isdigit())
    return tuple(f"factor{i}" for i in range(count))


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("x", *factor_inputs(flags))


def _constants(arguments: Arguments) -> Mapping[str, Any]:
    return factor_constants(int(arguments["block"]))


def factor_constants(block: int) -> Mapping[str, Any]:
    """Factors as float32 matrices, 1 / sqrt(block) folded into the last one."""
    factors = [f.numpy().astype(np.float32) for f in hadamard_factors(block)]
    if factors:
        factors[-1] = factors[-1] * np.float32(1.0 / math.sqrt(block))
    return {f"factor{i}": factor for i, factor in enumerate(factors)}


def _body(body: Body, flags: Sequence[str]) -> str:
    return hadamard_body(body, "x", flags)


def hadamard_body(body: Body, x: str, flags: Sequence[str]) -> str:
    """One MatMul a factor: the last on the right of the last axis, the others from the left."""
    count = len(factor_inputs(flags))
    if count == 0:
        return x
    if count == 1:
        return _turned(body, x, count)
    # onnxruntime has no product of one matrix with none from the left.
    rows = body("Greater", body("Size", x), body.constant(np.int64(0)))
    return body.choose(
        rows, lambda inner: _turned(inner, x, count), lambda inner: inner("Identity", x)
    )


def _turned(body: Body, x: str, count: int) -> str:
    sizes = [body.dim(f"factor{i}", 0) for i in range(count)]
    minus = body.axes(-1)
    last = f"factor{count - 1}"  # symmetric, or the only one: transposed below
    y = body("Reshape", x, body("Concat", minus, sizes[-1], axis=0))
    y = body("MatMul", y, body("Transpose", last, perm=[1, 0]))
    right = sizes[-1]
    for i in reversed(range(count - 1)):
        y = body("Reshape", y, body("Concat", minus, sizes[i], right, axis=0))
        y = body("MatMul", f"factor{i}", y)
        right = body("Mul", right, sizes[i])
    return body("Reshape", y, body("Shape", x), allowzero=1)  # there may be no rows


OP = register(
    OpDef(
        "hadamard",
        "(Tensor x, int block) -> Tensor",
        reference,
        fake,
        OnnxForm("Hadamard", _flags, _inputs, _body, {}, _constants, ("block",)),
    )
)
