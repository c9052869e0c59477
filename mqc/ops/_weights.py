"""What the linear operators share: weights as int8, the split term, ONNX pieces of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mqc.errors import UsageError
from mqc.numerics.packing import unpack_c16k4, unpack_int4
from mqc.ops._library import Arguments

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: half types are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_int8(qweight: Tensor, k: int, packed: bool) -> Tensor:
    """The weight as int8 [N, k].

    Raises:
        UsageError: where the stored weight does not have k input channels.
    """
    if packed:
        return unpack_int4(qweight, k)
    if qweight.dtype != torch.int8 or qweight.shape[-1] != k:
        raise UsageError(
            f"an 8-bit weight for {k} input channels is int8 [N, {k}], got "
            f"{qweight.dtype} {tuple(qweight.shape)}"
        )
    return qweight


def in_tiles(qweight: Any) -> bool:
    """Whether a weight is stored in layout C16K4, which has five axes."""
    return len(qweight.shape) == 5


def tiled_int8(qweight: Tensor, w_scale: Tensor, k: int, packed: bool) -> Tensor:
    """A weight in layout C16K4 as int8 [N, k], N and the groups being those of its scales.

    Raises:
        UsageError: where the two do not fit each other.
    """
    n = w_scale.shape[0]
    return unpack_c16k4(qweight, n, k, groups_of(w_scale, n, k), 4 if packed else 8)


def groups_of(w_scale: Tensor, n: int, k: int) -> int:
    """Number of scale groups along K: 1 for [N], G for [N, G].

    Raises:
        UsageError: where the scale's shape does not fit the weight.
    """
    groups = w_scale.shape[1] if w_scale.dim() == 2 else 1
    if w_scale.dim() not in (1, 2) or w_scale.shape[0] != n or groups < 1 or k % groups:
        raise UsageError(
            f"weight scales {tuple(w_scale.shape)} do not fit a weight of [{n}, {k}]",
            hint="they are [N], or [N, G] with G a divisor of K",
        )
    return groups


def add_terms(
    y: Tensor, bias: Tensor | None, x_split: Tensor | None, w_split: Tensor | None
) -> Tensor:
    """y + bias + x_split @ w_split^T, in y's dtype."""
    if (x_split is None) != (w_split is None):
        raise UsageError("x_split and w_split come together: one of the two is missing")
    if bias is not None:
        y = y + bias.to(y.dtype)
    if x_split is not None and w_split is not None:
        y = y + x_split.to(y.dtype) @ w_split.to(y.dtype).T
    return y


def add_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    """y + residual, which has y's shape and dtype.

    Raises:
        UsageError: where it has another shape; nothing is broadcast.
    """
    if residual is None:
        return y
    if residual.shape != y.shape or residual.dtype != y.dtype:
        raise UsageError(
            f"a residual {residual.dtype} {tuple(residual.shape)} does not fit a result "
            f"{y.dtype} {tuple(y.shape)}",
            hint="it has the shape and dtype of the linear's result",
        )
    return y + residual


def weight_flags(arguments: Arguments) -> tuple[str, ...]:
    """Variant flags of bias, split, residual and group scales."""
    present = {
        "bias": arguments.get("bias") is not None,
        "split": arguments.get("x_split") is not None,
        "residual": arguments.get("residual") is not None,
        "group": len(arguments["w_scale"].shape) == 2,
    }
    return tuple(flag for flag, on in present.items() if on)


def odd_flag(x_name: str, arguments: Arguments) -> tuple[str, ...]:
    """("odd",) where a packed weight has a padding nibble."""
    return ("odd",) if int(arguments[x_name].shape[-1]) % 2 else ()


def layout_flag(arguments: Arguments) -> tuple[str, ...]:
    """("c16k4",) where the weight is in that layout."""
    return ("c16k4",) if in_tiles(arguments["qweight"]) else ()


def term_inputs(flags: Sequence[str]) -> tuple[str, ...]:
    """Trailing inputs of a variant."""
    bias = ("bias",) if "bias" in flags else ()
    split = ("x_split", "w_split") if "split" in flags else ()
    return bias + split + (("residual",) if "residual" in flags else ())


def weight_body(body: Body, flags: Sequence[str], packed: bool) -> str:
    """int8 [N, K]; folded once, when a session is created."""
    if "c16k4" in flags:
        return _tiled_body(body, packed)
    if not packed:
        return "qweight"
    low, high = _nibbles(body)
    last = body.axes(-1)
    pairs = body("Concat", body("Unsqueeze", low, last), body("Unsqueeze", high, last), axis=-1)
    flat = body("Reshape", pairs, body.axes(0, -1))
    if "odd" in flags:
        flat = body("Slice", flat, body.axes(0), body.axes(-1), body.axes(1))
    # Two's complement of a nibble: (n xor 8) - 8. There is no int8 Sub, so by way of int32.
    shifted = body.cast(body("BitwiseXor", flat, body.constant(np.uint8(8))), "INT32")
    return body.cast(body("Sub", shifted, body.constant(np.int32(8))), "INT8")


def _nibbles(body: Body) -> tuple[str, str]:
    low = body("BitwiseAnd", "qweight", body.constant(np.uint8(15)))
    return low, body("BitShift", "qweight", body.constant(np.uint8(4)), direction="RIGHT")


def _tiled_body(body: Body, packed: bool) -> str:
    """Layout C16K4 to int8 [N, K], by operators on bytes alone."""
    if packed:
        pair = [body("Unsqueeze", half, body.axes(3)) for half in _nibbles(body)]
        halves = body("Concat", *pair, axis=3)
        tiles = body("Transpose", halves, perm=[0, 4, 1, 2, 3, 5])
    else:
        tiles = body("Transpose", "qweight", perm=[0, 3, 1, 2, 4])
    padded = body("Flatten", tiles, axis=2)
    n = body.dim("w_scale", 0)
    rows = body("Slice", padded, body.axes(0), n, body.axes(0))
    if packed:  # n - 8 in two's complement: n & 7 from 8 on, else n | 0xF8
        positive = body.cast(body("BitwiseAnd", rows, body.constant(np.uint8(8))), "BOOL")
        large = body("BitwiseAnd", rows, body.constant(np.uint8(7)))
        small = body("BitwiseOr", rows, body.constant(np.uint8(0xF8)))
        signed = body("Where", positive, large, small)
    else:
        signed = body("BitwiseXor", rows, body.constant(np.uint8(128)))
    return body.cast(signed, "INT8")  # ONNX: integers out of range keep their low bits


def terms_body(body: Body, y: str, flags: Sequence[str]) -> str:
    """y + bias + x_split @ w_split^T + residual."""
    if "bias" in flags:
        y = body("Add", y, "bias")
    if "split" in flags:
        term = body("MatMul", "x_split", body("Transpose", "w_split", perm=[1, 0]))
        y = body("Add", y, term)
    if "residual" in flags:
        y = body("Add", y, "residual")
    return y


def grouped_weight_body(body: Body, weight: str) -> str:
    """View [N, K] as [N, G, K / G]."""
    shape = body("Concat", body.axes(0), body.dim("w_scale", 1), body.axes(-1), axis=0)
    return body("Reshape", weight, shape)
