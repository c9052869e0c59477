"""mqc::rank_update: the split-off columns of a linear, in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def reference(y: Tensor, x_split: Tensor, w_split: Tensor) -> Tensor:
    """y [..., N] + x_split [..., k] @ w_split [N, k]^T; y's dtype, half types through float32."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return (y.to(dtype) + x_split.to(dtype) @ w_split.to(dtype).T).to(y.dtype)


def fake(y: Tensor, x_split: Tensor, w_split: Tensor) -> Tensor:
    """Shape function: as y."""
    return torch.empty_like(y)


def _flags(arguments: Arguments) -> tuple[str, ...]:
    return ()


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("y_in", "x_split", "w_split")


def _body(body: Body, flags: Sequence[str]) -> str:
    term = body("MatMul", "x_split", body("Transpose", "w_split", perm=[1, 0]))
    return body("Add", "y_in", term)


OP = register(
    OpDef(
        "rank_update",
        "(Tensor y, Tensor x_split, Tensor w_split) -> Tensor",
        reference,
        fake,
        OnnxForm("RankUpdate", _flags, _inputs, _body, {}),
    )
)
