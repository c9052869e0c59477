"""Activation scales by row: one for all, by a modality mask, or by a count of visual tokens."""

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


def row_scale(x: Tensor, scale: Tensor, modality: Tensor | None) -> Tensor:
    """Scale of each row of x [..., K], broadcastable to x: [1], or [B, S, 1] by modality.

    Raises:
        UsageError: where scale and modality do not fit each other or x.
    """
    if scale.numel() == 1:
        return scale.reshape(1)
    if scale.shape != (2,):
        raise UsageError(f"activation scales are [1] or [2], got {tuple(scale.shape)}")
    if modality is None:
        raise UsageError(
            "two activation scales (text, visual) need a modality argument",
            hint="pass a bool [B, S] mask or an int64 [B] count, or a scale of one element",
        )
    if modality.dtype == torch.bool and modality.shape == x.shape[:-1]:
        visual = modality
    elif modality.dtype == torch.int64 and x.dim() == 3 and modality.shape == x.shape[:1]:
        visual = torch.arange(x.shape[1], device=x.device) < modality[:, None]
    else:
        raise UsageError(
            f"modality {modality.dtype} {tuple(modality.shape)} does not fit rows "
            f"{tuple(x.shape[:-1])}",
            hint="it is bool, of the shape of the rows, or int64 [B] for x of [B, S, K]",
        )
    return torch.where(visual, scale[1], scale[0])[..., None]


def modality_flag(scale_name: str, arguments: Arguments) -> tuple[str, ...]:
    """("mask",), ("count",) or (): how a call finds its row scales in ONNX."""
    modality = arguments.get("modality")
    if modality is None or tuple(arguments[scale_name].shape) == (1,):
        return ()
    return ("mask",) if str(modality.dtype) == "BOOL" else ("count",)


def modality_inputs(flags: Sequence[str]) -> tuple[str, ...]:
    """The modality input of a variant, or nothing."""
    return ("modality",) if "mask" in flags or "count" in flags else ()


def row_scale_body(body: Body, x: str, scale: str, flags: Sequence[str]) -> str | None:
    """Row scales [B, S, 1] of a variant with a modality; None where one scale serves all rows."""
    if not modality_inputs(flags):
        return None
    visual = "modality"
    if "count" in flags:
        scalar = body.axes(0)
        rows = body("Squeeze", body.dim(x, 1), scalar)
        zero, one = body.constant(np.int64(0)), body.constant(np.int64(1))
        index = body("Range", zero, rows, one)
        visual = body("Less", index, body("Unsqueeze", "modality", body.axes(1)))
    text_scale = body("Gather", scale, body.constant(np.int64(0)))
    visual_scale = body("Gather", scale, body.constant(np.int64(1)))
    return body("Unsqueeze", body("Where", visual, visual_scale, text_scale), body.axes(-1))
