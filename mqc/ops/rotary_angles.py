"""mqc::rotary_angles: cosines and sines of rotary positions, of one axis or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def reference(positions: Tensor, freq: Tensor, axes: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of ``positions * freq`` for every column.

    Args:
        positions: int64 [B, S]; with ``axes`` [A, B, S] (multimodal rotary embedding: time, height
            and width, Qwen2-VL, arXiv 2409.12191).
        freq: float [R], radians a position.
        axes: int64 [R], which axis' positions a column takes, or None.

    Returns:
        (cos, sin), each [B, S, R] in freq's dtype.
    """
    columns = positions[..., None] if axes is None else positions[axes].permute(1, 2, 0)
    angle = columns.to(freq.dtype).contiguous() * freq
    return angle.cos(), angle.sin()


def fake(positions: Tensor, freq: Tensor, axes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shape function."""
    made = freq.new_empty((*positions.shape[-2:], freq.shape[0]))
    return made, torch.empty_like(made)


def _flags(arguments: Arguments) -> tuple[str, ...]:
    return () if arguments.get("axes") is None else ("axes",)


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("positions", "freq", *(("axes",) if "axes" in flags else ()))


def _body(body: Body, flags: Sequence[str]) -> tuple[str, ...]:
    if "axes" in flags:
        columns = body("Transpose", body("Gather", "positions", "axes", axis=0), perm=[1, 2, 0])
    else:
        columns = body("Unsqueeze", "positions", body.axes(-1))
    angle = body("Mul", body.cast(columns, "FLOAT"), "freq")
    return body("Cos", angle), body("Sin", angle)


OP = register(
    OpDef(
        "rotary_angles",
        "(Tensor positions, Tensor freq, Tensor? axes) -> (Tensor cos, Tensor sin)",
        reference,
        fake,
        OnnxForm(
            "RotaryAngles",
            _flags,
            _inputs,
            _body,
            {"positions": "int64", "axes": "int64"},
            outputs=lambda flags: ("cos", "sin"),
        ),
    )
)
