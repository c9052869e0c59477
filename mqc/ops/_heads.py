"""What operators of attention share: rotary embedding, repeated heads, and their ONNX bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mqc.errors import UsageError
from mqc.ops._library import Arguments

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body

ROTARY = ("none", "half", "interleaved")
FORBIDDEN = np.float32(torch.finfo(torch.float32).min)
"""Additive mask of a key that a row may not attend."""


def check_rotary(rotary: str, cos: Tensor | None, sin: Tensor | None) -> None:
    """Raises UsageError where ``rotary`` is unknown or does not fit the angles given."""
    if rotary not in ROTARY or (rotary == "none") != (cos is None or sin is None):
        raise UsageError(
            f"rotary {rotary!r} does not fit the given angles",
            hint="cos and sin come with half or interleaved, and not with none",
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: str) -> Tensor:
    """Rotary embedding of the first R of D columns; x [B, H, S, D], cos and sin [B, 1, S, R].

    "half": column i turns with i + R/2; "interleaved": column 2i with 2i + 1. x * cos + t * sin,
    where t is x with the partner's value, negated in the first of each pair.
    """
    size = cos.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    if rotary == "half":
        other = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    else:
        other = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    turned = turned * cos + other * sin
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned


def repeated(x: Tensor, times: int) -> Tensor:
    """Every head ``times`` times, as models write it: the oracle computes what they compute."""
    batch, groups, rows, width = x.shape
    wide = x[:, :, None].expand(batch, groups, times, rows, width)
    return wide.reshape(batch, groups * times, rows, width)


def rotary_flags(arguments: Arguments) -> tuple[str, ...]:
    """The flags of a variant that tell how heads turn."""
    rotary = str(arguments["rotary"])
    if rotary == "none":
        return ()
    partial = arguments["cos"].shape[-1] != arguments["q"].shape[-1]
    return (rotary, *(("partial",) if partial else ()))


def slice_body(body: Body, x: str, start: str, end: str, axis: int, step: int = 1) -> str:
    """``x[..., start:end:step, ...]`` along ``axis``; start and end are int64 [1] values."""
    return body("Slice", x, start, end, body.axes(axis), body.axes(step))


def end_of(body: Body) -> str:
    """An end that takes all that is left."""
    return body.axes(np.iinfo(np.int64).max)


def rotate_body(body: Body, x: str, flags: Sequence[str]) -> str:
    """:func:`rotate` of [B, S, H, D], before heads and tokens change places."""
    zero, two, end = body.axes(0), body.axes(2), end_of(body)
    size = body.dim("cos", -1)
    turned = slice_body(body, x, zero, size, -1) if "partial" in flags else x
    cos, sin = (body("Unsqueeze", name, two) for name in ("cos", "sin"))
    if "half" in flags:
        half = body("Div", size, two)
        second = body("Neg", slice_body(body, turned, half, end, -1))
        other = body("Concat", second, slice_body(body, turned, zero, half, -1), axis=-1)
    else:
        odd = body("Neg", slice_body(body, turned, body.axes(1), end, -1, 2))
        last = body.axes(-1)
        pairs = (odd, slice_body(body, turned, zero, end, -1, 2))
        stacked = body("Concat", *(body("Unsqueeze", part, last) for part in pairs), axis=-1)
        other = body("Reshape", stacked, body("Shape", turned))
    y = body("Add", body("Mul", turned, cos), body("Mul", other, sin))
    if "partial" in flags:
        y = body("Concat", y, slice_body(body, x, size, end, -1), axis=-1)
    return y
