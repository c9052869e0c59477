"""mqc::embedding_w8: token embeddings stored in int8 with one scale a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def reference(ids: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """qweight[ids] * scale[ids]; ids int64 [...], qweight int8 [V, D], scale [V]; [..., D]."""
    return qweight[ids].to(scale.dtype) * scale[ids][..., None]


def fake(ids: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Shape function: ids' shape times D, scale's dtype."""
    return ids.new_empty((*ids.shape, qweight.shape[1]), dtype=scale.dtype)


def _flags(arguments: Arguments) -> tuple[str, ...]:
    return ()


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("ids", "qweight", "scale")


def _body(body: Body, flags: Sequence[str]) -> str:
    rows = body.cast(body("Gather", "qweight", "ids", axis=0), "FLOAT")
    scale = body("Unsqueeze", body("Gather", "scale", "ids", axis=0), body.axes(-1))
    return body("Mul", rows, scale)


OP = register(
    OpDef(
        "embedding_w8",
        "(Tensor ids, Tensor qweight, Tensor scale) -> Tensor",
        reference,
        fake,
        OnnxForm("EmbeddingW8", _flags, _inputs, _body, {"ids": "int64", "qweight": "q8"}),
    )
)
